"""What of a recipe is run, in which order, in which folder, and what is left alone."""

import json
from pathlib import Path

import pytest
from run_stubs import Make, beitctl, calls, folders, place  # noqa: F401 - the fixture works by being here

from beitctl import pipeline, recipe, runs
from beitctl.errors import DataError, UserError


def run(capsys, *arguments):
    code, out, err = beitctl(capsys, *arguments)
    assert code == 0, err
    return out, err


def other_code(monkeypatch):
    monkeypatch.setattr(runs, "code_hash", lambda plugin: "other")


def break_it(fault):
    Path("fault").write_text(fault)


def repair():
    Path("fault").unlink()


def test_a_stage_runs_in_a_folder_of_its_own_below_its_recipe_and_table(capsys):
    out, _ = run(capsys, "make", "--recipe", "r.toml", "--only", "second")
    assert out == f"{folders('make.second')[0]}\n"


def test_a_run_folder_holds_the_recipe_the_resolved_table_the_events_and_the_manifest(capsys):
    run(capsys, "make", "--recipe", "r.toml", "--only", "second", "--set", "make.second.value=5")
    (folder,) = folders("make.second")
    assert (folder / "recipe.toml").read_text() == Path("r.toml").read_text()
    assert (folder / "resolved.toml").read_text().split() == ["[make.second]", "value", "=", "5"]
    assert [json.loads(line)["event"] for line in (folder / "events.jsonl").read_text().splitlines()] == [
        "start",
        "note",
        "end",
    ]
    manifest = json.loads((folder / "manifest.json").read_text())
    wanted = {"stage": "make", "key": "make.second", "recipe": "r", "status": "ok", "exit": 0, "world": 1}
    assert wanted.items() <= manifest.items()
    assert manifest["metrics"] == {"value": 5, "inner": {"twice": 10}}
    assert manifest["command"][:2] == ["beitctl", "make"]
    assert {"python", "beitctl", "torch"} <= manifest["versions"].keys()
    assert folder.name.endswith(f"-{manifest['id']}")


def test_a_finished_stage_is_not_run_again(capsys):
    first, _ = run(capsys, "use", "--recipe", "r.toml")
    second, err = run(capsys, "use", "--recipe", "r.toml")
    assert (second, f"already done: {second.strip()}" in err, len(folders("use"))) == (first, True, 1)


def test_a_changed_setting_makes_a_new_run(capsys):
    run(capsys, "use", "--recipe", "r.toml")
    run(capsys, "use", "--recipe", "r.toml", "--set", "factor=4")
    assert len(folders("use")) == 2


def test_changed_data_make_a_new_run(capsys):
    run(capsys, "make", "--recipe", "r.toml")
    Path("data.txt").write_text("more")
    run(capsys, "make", "--recipe", "r.toml")
    assert len(folders("make.first")) == 2


def test_changed_code_makes_a_new_run_of_what_is_asked_for(capsys, monkeypatch):
    run(capsys, "use", "--recipe", "r.toml")
    other_code(monkeypatch)
    run(capsys, "use", "--recipe", "r.toml")
    assert len(folders("use")) == 2


def test_changed_code_does_not_make_a_stage_repeat_what_it_refers_to(capsys, monkeypatch):
    run(capsys, "use", "--recipe", "r.toml")
    other_code(monkeypatch)
    run(capsys, "use", "--recipe", "r.toml")
    assert len(folders("make.first")) == 1


def test_no_resume_makes_a_new_run(capsys):
    run(capsys, "use", "--recipe", "r.toml")
    run(capsys, "use", "--recipe", "r.toml", "--no-resume")
    assert (len(folders("use")), len(folders("make.first"))) == (2, 1)


def test_a_run_that_failed_is_continued_in_its_folder(capsys):
    break_it("stopped")
    assert beitctl(capsys, "make", "--recipe", "r.toml")[0] == 75
    repair()
    run(capsys, "make", "--recipe", "r.toml")
    (folder,) = folders("make.first")
    assert calls(folder) == ["begun", "resumed"]


def test_a_continued_run_keeps_its_id_and_the_time_when_it_began(capsys, monkeypatch):
    break_it("stopped")
    beitctl(capsys, "make", "--recipe", "r.toml")
    (folder,) = folders("make.first")
    before = runs.read(folder).manifest
    repair()
    other_code(monkeypatch)
    run(capsys, "make", "--recipe", "r.toml")
    after = runs.read(folder).manifest
    assert [after[key] for key in ("id", "started")] == [before[key] for key in ("id", "started")]
    assert after["code_hash"] == "other"


def test_a_stage_runs_first_what_it_refers_to(capsys):
    _, err = run(capsys, "use", "--recipe", "r.toml")
    assert "[use] needs [make.first], which has no finished run: running that first" in err
    seen = runs.read(folders("use")[0]).metrics["seen"]
    assert seen == str(folders("make.first")[0])


def test_a_stage_reads_a_finished_run_even_if_a_newer_one_was_stopped(capsys):
    run(capsys, "make", "--recipe", "r.toml")
    break_it("stopped")
    beitctl(capsys, "make", "--recipe", "r.toml", "--only", "first", "--no-resume")
    run(capsys, "use", "--recipe", "r.toml")
    assert [runs.read(folder).ok for folder in folders("make.first")] == [True, False]
    assert runs.read(folders("use")[0]).metrics["seen"] == str(folders("make.first")[0])


def test_a_stage_leaves_alone_what_it_does_not_refer_to(capsys):
    run(capsys, "use", "--recipe", "r.toml")
    assert folders("make.second") == []


def test_inputs_are_found_beside_the_folder_of_out(capsys):
    run(capsys, "make", "--recipe", "r.toml", "--only", "first", "--out", "own/a")
    run(capsys, "use", "--recipe", "r.toml", "--out", "own/b")
    assert runs.read(Path("own/b")).metrics["seen"].endswith("own/a")


def test_out_is_the_run_folder_itself_and_is_continued(capsys):
    break_it("stopped")
    command = ("make", "--recipe", "r.toml", "--only", "first", "--out", "own")
    assert beitctl(capsys, *command)[0] == 75
    repair()
    run(capsys, *command)
    assert calls(Path("own")) == ["begun", "resumed"]


def test_a_finished_run_in_the_folder_of_out_is_used_whatever_code_made_it(capsys, monkeypatch):
    command = ("make", "--recipe", "r.toml", "--only", "first", "--out", "own")
    run(capsys, *command)
    other_code(monkeypatch)
    _, err = run(capsys, *command)
    assert "own: was made by another version of the code; to run again use another --out" in err
    assert calls(Path("own")) == ["begun"]


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (
            "run",
            ["--set", "value=9"],
            "own: this run began with other settings, data or versions:\n  value: 1 -> 9\n",
        ),
        (
            "run",
            ["--only", "second"],
            "own holds a run of [make.first], not of [make.second]; choose another",
        ),
        ("run", ["--no-resume"], "--out own: holds a run already; with --no-resume name a new folder"),
        ("files", [], "--out own: holds files but no run; name a new or an empty folder"),
        ("file", [], "--out own: is a file; name a folder"),
    ],
)
def test_out_is_refused_where_something_else_is(capsys, prepare, arguments, message):
    own = Path("own")
    command = ["make", "--recipe", "r.toml", "--only", "first", "--out", "own"]
    if prepare == "run":
        run(capsys, *command)
    elif prepare == "files":
        own.mkdir()
        (own / "thesis.txt").touch()
    else:
        own.touch()
    arguments = [item.replace("value=", "make.first.value=") for item in arguments]
    code, _, err = beitctl(capsys, *command, *arguments)
    assert (code, message in err) == (2, True), err


def test_out_with_other_data_is_an_error_of_the_data(capsys):
    command = ("make", "--recipe", "r.toml", "--only", "first", "--out", "own")
    run(capsys, *command)
    Path("data.txt").write_text("more")
    code, _, err = beitctl(capsys, *command)
    assert (code, "own: the data are not those that this run started with" in err) == (3, True)


def test_out_takes_one_table_only(capsys):
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml", "--out", "own")
    assert (code, "has make.first, make.second; choose one with --only" in err) == (2, True)


def test_a_second_process_on_a_run_folder_is_refused_and_harms_nothing(capsys):
    break_it("stopped")
    beitctl(capsys, "make", "--recipe", "r.toml")
    (folder,) = folders("make.first")
    first = runs.Workplace(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml")
    first.close()
    assert (code, f"{folder}: another process (pid" in err) == (2, True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_run_does_all_tables_and_writes_the_summary_and_the_report(capsys):
    out, err = run(capsys, "run", "r.toml")
    assert out == "runs/r/summary.json\n"
    assert json.loads(Path(out.strip()).read_text()) == {"first": 1, "nested": {"twice": 4}}
    made = [str(folders(key)[0]) for key in ("make.first", "make.second", "use")]
    assert Path("runs/r/report.html").read_text().split() == made
    assert err.splitlines()[-1] == "report: runs/r/report.html"


def test_run_skips_what_is_done(capsys):
    run(capsys, "run", "r.toml")
    _, err = run(capsys, "run", "r.toml")
    assert err.count("cached, runs/r/") == 3


def test_run_repeats_a_table_that_changed_and_what_depends_on_it(capsys):
    run(capsys, "run", "r.toml")
    run(capsys, "run", "r.toml", "--set", "make.first.value=7")
    assert [len(folders(key)) for key in ("make.first", "make.second", "use")] == [2, 1, 2]


def test_run_repeats_what_other_code_made(capsys, monkeypatch):
    run(capsys, "run", "r.toml")
    other_code(monkeypatch)
    run(capsys, "run", "r.toml")
    assert [len(folders(key)) for key in ("make.first", "make.second", "use")] == [2, 2, 2]


def test_run_with_force_repeats_everything(capsys):
    run(capsys, "run", "r.toml")
    run(capsys, "run", "r.toml", "--force")
    assert [len(folders(key)) for key in ("make.first", "make.second", "use")] == [2, 2, 2]


def test_run_until_a_table_leaves_out_what_follows_also_in_the_summary(capsys):
    run(capsys, "run", "r.toml", "--until", "make.first")
    assert [len(folders(key)) for key in ("make.first", "make.second", "use")] == [1, 0, 0]
    assert json.loads(Path("runs/r/summary.json").read_text()) == {"first": 1}


def test_run_until_an_unknown_table_is_refused(capsys):
    code, _, err = beitctl(capsys, "run", "r.toml", "--until", "usage")
    assert (code, err) == (2, "error: --until usage: r has the tables make.first, make.second, use\n")


def test_run_with_out_works_below_that_folder(capsys):
    run(capsys, "run", "r.toml", "--out", "here")
    assert sorted(path.name for path in Path("here").iterdir()) == [
        "make.first", "make.second", "report.html", "summary.json", "use",
    ]  # fmt: skip


def test_run_ends_at_the_first_table_that_fails(capsys):
    break_it("diverged")
    assert beitctl(capsys, "run", "r.toml")[0] == 6
    assert (len(folders("make.first")), len(folders("make.second"))) == (1, 0)


def test_without_a_table_summary_it_holds_all_metrics(capsys):
    text = Path("r.toml").read_text()
    Path("r.toml").write_text(text[: text.index("[summary]")])
    run(capsys, "run", "r.toml", "--until", "make.first")
    metrics = {"value": 1, "inner": {"twice": 2}}
    assert json.loads(Path("runs/r/summary.json").read_text()) == {"make.first": metrics}


def test_a_number_that_a_stage_did_not_return_is_named_with_those_it_did(capsys):
    text = Path("r.toml").read_text()
    Path("r.toml").write_text(text.replace("inner.twice", "inner.thrice"))
    code, _, err = beitctl(capsys, "run", "r.toml")
    wanted = "summary.nested.twice = '@make.second:inner.thrice': no 'thrice'; there is twice"
    assert (code, wanted in err) == (2, True)


def test_the_report_of_a_recipe_is_written_again_only_if_something_ran(capsys):
    run(capsys, "run", "r.toml")
    Path("runs/r/report.html").write_text("kept")
    run(capsys, "run", "r.toml")
    assert Path("runs/r/report.html").read_text() == "kept"
    run(capsys, "run", "r.toml", "--force")
    assert Path("runs/r/report.html").read_text() != "kept"


def test_a_report_that_cannot_be_written_does_not_fail_the_run(capsys, monkeypatch):
    def fail(folder):
        raise ValueError("no fonts")

    monkeypatch.setattr("beitctl.running.write_page", fail)
    _, err = run(capsys, "make", "--recipe", "r.toml", "--only", "second")
    assert "the report could not be written: ValueError: no fonts" in err
    assert runs.read(folders("make.second")[0]).ok


def test_a_report_of_a_recipe_that_cannot_be_written_does_not_fail_it(capsys, monkeypatch):
    def fail(folder, runs):
        raise ValueError("no fonts")

    monkeypatch.setattr("beitctl.running.write_pipeline_page", fail)
    _, err = run(capsys, "run", "r.toml")
    assert "warning: the report could not be written: ValueError: no fonts" in err


def test_a_failure_is_recorded(capsys):
    break_it("diverged")
    beitctl(capsys, "make", "--recipe", "r.toml")
    (folder,) = folders("make.first")
    manifest = runs.read(folder).manifest
    assert (manifest["status"], manifest["exit"]) == ("failed", 6)
    end = json.loads((folder / "events.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["status"], end["exit"]) == ("end", "failed", 6)


def test_a_full_disk_hides_no_error(capsys, monkeypatch):
    break_it("diverged")
    end = runs.Workplace.end

    def full(self, status, exit, metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.Workplace, "end", full)
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml")
    assert (code, "the loss is nan" in err, "the record of this failure is incomplete" in err) == (
        6,
        True,
        True,
    )
    monkeypatch.setattr(runs.Workplace, "end", end)
    repair()
    run(capsys, "make", "--recipe", "r.toml", "--only", "first")  # the lock is free again


def test_an_input_whose_manifest_is_gone_is_named():
    work = pipeline.Pipeline(recipe.load("r.toml"), pipeline.Options(Path("runs/r")))
    work.folders["make.first"] = Path("gone")
    with pytest.raises(UserError, match=r"gone: the manifest of the run of \[make.first\] is gone"):
        work.stage(["use"])


@pytest.mark.parametrize("arguments", [("run", "r.toml"), ("use", "--recipe", "r.toml")])
def test_missing_data_show_before_anything_runs(capsys, monkeypatch, arguments):
    def missing(self):
        raise DataError(f"data/{self.value}: no such folder")

    monkeypatch.setattr(Make, "inputs_fingerprint", missing)
    code, _, err = beitctl(capsys, *arguments)
    assert code == 3
    assert "[make.first] data/1: no such folder" in err
    assert ("[make.second] data/2: no such folder" in err) == (arguments[0] == "run")
    assert not Path("runs/r/make.first").exists()
