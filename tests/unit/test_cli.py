"""Commands, options, output and exit codes."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from run_stubs import FAULTS, STAGES, beitctl, folders, install, place  # noqa: F401 - the fixture works by being here

from beitctl import cli, registry, runs
from beitctl.errors import DataError


def records(out):
    return [json.loads(line) for line in out.splitlines()]


def test_version_is_that_of_the_distribution(capsys):
    assert beitctl(capsys, "--version") == (0, f"beitctl {metadata.version('beitctl')}\n", "")


def test_help_lists_stages_with_their_first_line(capsys):
    code, out, _ = beitctl(capsys, "--help")
    assert code == 0
    assert "make " in out
    assert "Make a number." in out
    assert "second paragraph" not in out


def test_help_names_a_broken_stage_and_the_cause(capsys):
    _, out, _ = beitctl(capsys, "--help")
    text = " ".join(out.replace("│", " ").split())
    assert "broken (broken: unknown: ModuleNotFoundError: No module named 'no_such_module')" in text


def test_a_broken_stage_ends_with_the_error_of_its_plugin(capsys):
    code, _, err = beitctl(capsys, "broken", "--recipe", "r.toml")
    assert code == 2
    assert "plugin 'broken' (unknown) cannot be imported: ModuleNotFoundError" in err


def test_help_of_a_stage_lists_its_settings_with_defaults(capsys):
    _, out, _ = beitctl(capsys, "use", "--help")
    text = " ".join(out.replace("│", " ").split())
    assert "of (required): Where it comes from." in text
    assert "factor (default 3): What it is multiplied with." in text


def test_help_of_a_stage_names_the_settings_one_level_deeper(capsys, monkeypatch):
    install(monkeypatch, {"learn": "run_stubs:Learn"})
    _, out, _ = beitctl(capsys, "learn", "--help")
    text = " ".join(out.replace("│", " ").split())
    assert "* train (required): The training loop. Its settings: steps, optim, precision," in text


def test_stages_come_first_and_in_the_order_of_the_work(monkeypatch):
    names = ["use", "export", "pretrain", "eval", "finetune", "tokenize-images", "train-tokenizer"]
    install(monkeypatch, dict.fromkeys(names, "run_stubs:Use"))
    assert cli._stage_names()[0] == [
        "train-tokenizer", "tokenize-images", "pretrain", "finetune", "eval", "export", "use",
    ]  # fmt: skip


RESERVED = "the stage 'run' of unknown has the name of a command; it must be renamed, or uninstall unknown"


def test_a_stage_with_the_name_of_a_command_is_shown_as_broken_and_the_command_stays(capsys, monkeypatch):
    install(monkeypatch, {**STAGES, "run": "run_stubs:Make"})
    _, out, _ = beitctl(capsys, "--help")
    text = " ".join(out.replace("│", " ").split())
    assert f"run (unknown) (broken: unknown: {RESERVED})" in text
    assert "run Run all stages of a recipe in order" in text


def test_a_stage_with_the_name_of_a_command_does_not_take_its_place(capsys, monkeypatch):
    install(monkeypatch, {**STAGES, "run": "run_stubs:Make"})
    assert beitctl(capsys, "run", "r.toml")[0] == 0


def test_a_stage_with_the_name_of_a_command_is_refused_in_a_recipe(capsys, monkeypatch):
    install(monkeypatch, {**STAGES, "run": "run_stubs:Make"})
    Path("r.toml").write_text('[recipe]\nsummary = "x"\n[run]\nvalue = 1\n')
    code, _, err = beitctl(capsys, "run", "r.toml")
    assert (code, err) == (2, f"error: {RESERVED}\n")


@pytest.mark.parametrize(("typo", "name"), [("mak", "make"), ("recipe", "recipes"), ("doctr", "doctor")])
def test_an_unknown_command_suggests_a_stage_or_a_command(capsys, typo, name):
    code, _, err = beitctl(capsys, typo)
    text = " ".join(err.replace("│", " ").split())
    assert code == 2
    assert f"No such command '{typo}'. Did you mean '{name}'" in text


def test_an_unknown_option_is_wrong_usage(capsys):
    code, _, err = beitctl(capsys, "make", "--recpie", "r.toml")
    assert (code, "--recpie" in err) == (2, True)


def test_json_writes_records_only_and_ends_with_the_metrics(capsys):
    _, out, _ = beitctl(capsys, "make", "--recipe", "r.toml", "--only", "second", "--json")
    found = records(out)
    assert [record["event"] for record in found] == ["start", "note", "end"]
    assert (found[-1]["status"], found[-1]["exit"], found[-1]["metrics"]["value"]) == ("ok", 0, 2)


def test_json_of_what_is_done_already_is_an_end_event(capsys):
    command = ("make", "--recipe", "r.toml", "--only", "second", "--json")
    _, first, _ = beitctl(capsys, *command)
    _, out, _ = beitctl(capsys, *command)
    (end,) = records(out)
    before = records(first)[-1]
    assert {key: end[key] for key in ("event", "run", "status", "metrics")} == {
        key: before[key] for key in ("event", "run", "status", "metrics")
    }


@pytest.mark.parametrize(("fault", "code", "status"), [("diverged", 6, "failed"), ("stopped", 75, "stopped")])
def test_json_of_a_run_that_fails_ends_with_one_end_event(capsys, fault, code, status):
    Path("fault").write_text(fault)
    _, out, _ = beitctl(capsys, "make", "--recipe", "r.toml", "--json")
    ends = [record for record in records(out) if record["event"] == "end"]
    assert [(end["status"], end["exit"]) for end in ends] == [(status, code)]


@pytest.mark.parametrize(
    "arguments",
    [("make", "--recipe", "none.toml"), ("make", "--nonsense"), ("run", "r.toml", "--until", "nowhere")],
)
def test_json_of_a_command_that_starts_nothing_is_an_end_event(capsys, arguments):
    _, out, _ = beitctl(capsys, *arguments, "--json")
    (end,) = records(out)
    assert (end["event"], end["status"], end["exit"]) == ("end", "failed", 2)


def test_json_of_run_ends_with_the_summary(capsys):
    _, out, _ = beitctl(capsys, "run", "r.toml", "--json")
    last = records(out)[-1]
    assert (last["event"], last["summary"]) == ("summary", {"first": 1, "nested": {"twice": 4}})


def test_json_of_run_has_an_end_event_of_every_table_that_was_done_before(capsys):
    beitctl(capsys, "run", "r.toml")
    _, out, _ = beitctl(capsys, "run", "r.toml", "--json")
    found = [(record["event"], record.get("cached"), record.get("exit")) for record in records(out)]
    assert found == [("end", True, 0)] * 3 + [("summary", None, None)]


def test_json_of_run_ends_with_an_end_event_if_a_later_stage_cannot_start(capsys, monkeypatch):
    identify = runs.identify

    def fail(table, parents):
        if table.key == "use":
            raise DataError("no data")
        return identify(table, parents)

    monkeypatch.setattr(runs, "identify", fail)
    _, out, _ = beitctl(capsys, "run", "r.toml", "--json")
    ends = [record["exit"] for record in records(out) if record["event"] == "end"]
    assert ends == [0, 0, 3]


def test_json_of_run_ends_with_an_end_event_if_the_summary_is_wrong(capsys):
    Path("r.toml").write_text(Path("r.toml").read_text().replace("inner.twice", "inner.thrice"))
    _, out, _ = beitctl(capsys, "run", "r.toml", "--json")
    assert (records(out)[-1]["event"], records(out)[-1]["exit"]) == ("end", 2)


def test_after_a_changed_setting_no_next_command_is_named_for_it_would_miss_the_change(capsys):
    command = ("make", "--recipe", "r.toml", "--only", "first", "--set", "make.first.value=4")
    assert "next:" not in beitctl(capsys, *command)[2]


def test_a_bundled_recipe_is_named_by_name_in_the_next_command(capsys, monkeypatch):
    monkeypatch.setenv("BEITCTL_RECIPES", str(Path().resolve()))
    _, _, err = beitctl(capsys, "make", "--recipe", "r", "--only", "first")
    assert err.splitlines()[-1].endswith("next: beitctl make --recipe r --only second")


def test_quiet_leaves_the_folder_on_stdout_and_nothing_on_stderr(capsys):
    code, out, err = beitctl(capsys, "-q", "make", "--recipe", "r.toml", "--only", "second")
    assert (code, out, err) == (0, f"{folders('make.second')[0]}\n", "")


def test_the_last_line_names_the_report_and_the_next_stage(capsys):
    _, _, err = beitctl(capsys, "make", "--recipe", "r.toml", "--only", "first")
    report = folders("make.first")[0] / "report.html"
    assert err.splitlines()[-1] == f"report: {report}   next: beitctl make --recipe r.toml --only second"


def test_after_the_last_stage_only_the_report_is_named(capsys):
    _, _, err = beitctl(capsys, "use", "--recipe", "r.toml")
    assert err.splitlines()[-1] == f"report: {folders('use')[0] / 'report.html'}"


def test_without_recipe_beitctl_toml_of_this_folder_is_used(capsys):
    Path("r.toml").rename("beitctl.toml")
    assert beitctl(capsys, "make", "--only", "second")[0] == 0
    assert Path("runs/beitctl/make.second").is_dir()


def test_only_takes_one_table_of_a_stage(capsys):
    beitctl(capsys, "make", "--recipe", "r.toml", "--only", "make.second")
    assert (folders("make.first"), len(folders("make.second"))) == ([], 1)


def test_a_requirement_is_a_setting_of_every_table_that_is_to_run(capsys, monkeypatch):
    install(monkeypatch, {"measure": "run_stubs:Measure"})
    tables = '[measure.first]\nrequire = ["a>1"]\n[measure.second]\n'
    Path("m.toml").write_text(f'[recipe]\nsummary = "x"\n{tables}')
    asked = ("--require", "recall@1>=0.5", "--require", "b<2", "--dry-run", "--json")
    _, out, _ = beitctl(capsys, "measure", "--recipe", "m.toml", *asked)
    found = json.loads(out)
    assert found["measure.first"]["require"] == ["a>1", "recall@1>=0.5", "b<2"]
    assert found["measure.second"]["require"] == ["recall@1>=0.5", "b<2"]


def test_a_requirement_of_a_stage_that_measures_nothing_is_refused(capsys):
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml", "--only", "second", "--require", "x>1")
    assert (code, "--require: the stage make measures nothing" in err) == (2, True)


def test_only_with_an_unknown_table_names_those_there_are(capsys):
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml", "--only", "third")
    assert (code, err) == (2, "error: --only third: r has no such table of make; it has first, second\n")


def test_a_recipe_without_the_stage_says_what_it_has(capsys):
    Path("r.toml").write_text('[recipe]\nsummary = "x"\n[make]\nvalue = 1\n')
    code, _, err = beitctl(capsys, "use", "--recipe", "r.toml")
    assert (code, "r.toml has no table [use]; it has make. Add one, or use another recipe" in err) == (
        2,
        True,
    )


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys):
    code, out, _ = beitctl(capsys, "make", "--recipe", "r.toml", "--only", "second", "--dry-run")
    assert code == 0
    assert out.splitlines() == [
        "make.second:", "  value: 2", "  parts:", "    large: 12 345 678", "    small: 0.1235",
    ]  # fmt: skip
    assert [path.name for path in Path().iterdir()] == ["r.toml"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--submit", "slurm"), "--submit slurm runs no --dry-run: leave one of them out"),
        (("--nodes", "2"), "--nodes belongs to --submit slurm"),
        (("--max-time", "soon"), "--max-time soon: is no time"),
        (("--gpus", "0"), "--gpus 0: must be at least 1"),
    ],
)
@pytest.mark.parametrize("command", [("make", "--recipe", "r.toml", "--only", "first"), ("run", "r.toml")])
def test_a_dry_run_checks_what_is_said_about_processes_too(capsys, command, asked, said):
    code, out, err = beitctl(capsys, *command, "--dry-run", *asked)
    assert (code, out, said in err) == (2, "", True), err


def test_verify_checks_what_is_said_about_processes_too(capsys):
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml", "--verify", "--submit", "slurm")
    assert (code, "--submit slurm runs no --verify" in err) == (2, True)


def test_one_gpu_is_refused_where_torchrun_has_started_eight(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml", "--gpus", "1")
    assert (code, "--gpus 1: torchrun has started these processes, WORLD_SIZE=8" in err) == (2, True)


def test_a_dry_run_with_json_prints_one_object_of_plans(capsys):
    _, out, _ = beitctl(capsys, "run", "r.toml", "--dry-run", "--json")
    assert list(json.loads(out)) == ["make.first", "make.second", "use"]


def test_a_dry_run_on_a_terminal_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = beitctl(capsys, "make", "--recipe", "r.toml", "--only", "second", "--dry-run")
    assert "│" in out
    assert "12 345 678" in out


def test_gpus_starts_processes_with_the_same_arguments_and_gives_their_exit_code(capsys, monkeypatch):
    started = []
    monkeypatch.setattr(cli.launch, "run", lambda gpus, arguments: started.append((gpus, arguments)) or 6)
    command = ("make", "--recipe", "r.toml", "--gpus", "2", "--json")
    code, out, _ = beitctl(capsys, *command)
    assert (code, out, started) == (6, "", [(2, command)])


def test_gpus_starts_nothing_if_the_recipe_is_wrong(capsys, monkeypatch):
    monkeypatch.setattr(cli.launch, "run", lambda *arguments: pytest.fail("started"))
    assert beitctl(capsys, "make", "--recipe", "none.toml", "--gpus", "2")[0] == 2


def test_the_default_folder_of_runs_can_be_moved(capsys, monkeypatch):
    monkeypatch.setenv("BEITCTL_RUNS", "elsewhere")
    beitctl(capsys, "make", "--recipe", "r.toml", "--only", "second")
    assert [run.ok for run in runs.find(Path("elsewhere/r/make.second"), "make.second")] == [True]


@pytest.mark.parametrize("command", ["recipes show tiny", "pretrain --recipe none.toml --json"])
def test_a_reader_that_goes_away_causes_no_traceback(tmp_path, command):
    script = f"{{ sleep 0.3; {sys.executable} -m beitctl {command}; }} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd=tmp_path)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_polite_signal_before_training_ends_with_75(name):
    code = (
        "import os, signal, sys; from beitctl import cli, doctor; "
        "sys.argv = ['beitctl', 'doctor']; "
        f"doctor.examine = lambda measure: os.kill(os.getpid(), signal.{name}); cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        75,
        f"stopped by {name}; the same command goes on where this one ended\n",
    )


def test_sigterm_while_a_plugin_is_imported_is_no_error_of_the_plugin(tmp_path):
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    code = (
        "import sys; from importlib.metadata import EntryPoint; from beitctl import cli, registry; "
        "registry._entries = lambda group: (EntryPoint('slow', 'slow:Stage', group),); "
        "sys.argv = ['beitctl', 'slow']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "cannot be imported" in done.stderr) == (75, False)


def test_every_stage_has_the_same_options(capsys):
    shared = [
        "--recipe",
        "--set",
        "--out",
        "--allow",
        "--gpus",
        "--max-time",
        "--submit",
        "--resume",
        "--no-resume",
        "--only",
        "--dry-run",
        "--json",
    ]
    for name in registry.names("beitctl.stages"):
        _, out, _ = beitctl(capsys, name, "--help")
        assert [option for option in shared if option not in out] == [], name
