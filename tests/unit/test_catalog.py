"""The commands recipes, plugins and doctor."""

import json
import os
import sys
from pathlib import Path

from run_stubs import STAGES, beitctl, install, place  # noqa: F401 - the fixture works by being here

from beitctl import doctor


def test_plugins_ls_shows_a_stage_with_the_name_of_a_command_as_broken(capsys, monkeypatch):
    install(monkeypatch, {**STAGES, "run": "run_stubs:Make"})
    _, out, _ = beitctl(capsys, "plugins", "ls", "--json")
    assert {row["name"]: row["state"] for row in json.loads(out)}["run"].startswith(
        "broken: the stage 'run' of unknown has the name of a command"
    )


def test_recipes_ls_lists_names_and_summaries(capsys, monkeypatch):
    monkeypatch.setenv("BEITCTL_RECIPES", ".")
    _, out, _ = beitctl(capsys, "recipes", "ls", "--json")
    (row,) = (row for row in json.loads(out) if row["name"] == "r")
    assert (row["summary"], row["stages"]) == ("Two numbers", ["make.first", "make.second", "use"])
    assert any(
        line.startswith("r ") and "Two numbers" in line
        for line in beitctl(capsys, "recipes", "ls")[1].splitlines()
    )


def test_recipes_ls_names_what_is_wrong_with_a_recipe(capsys, monkeypatch):
    monkeypatch.setenv("BEITCTL_RECIPES", ".")
    Path("bad.toml").write_text("[recipe]\n")
    _, out, _ = beitctl(capsys, "recipes", "ls")
    assert any(line.startswith("bad ") and "broken: bad.toml" in line for line in out.splitlines())


def test_recipes_show_prints_the_file(capsys):
    assert beitctl(capsys, "recipes", "show", "r.toml")[1] == Path("r.toml").read_text()


def test_recipes_copy_keeps_comments_and_changes_settings(capsys):
    code, _, _ = beitctl(capsys, "recipes", "copy", "r.toml", "own.toml", "--set", "make.second.value=8")
    assert code == 0
    assert Path("own.toml").read_text() == Path("r.toml").read_text().replace("value = 2", "value = 8")


def test_recipes_copy_overwrites_with_force_only(capsys):
    Path("own.toml").touch()
    code, _, err = beitctl(capsys, "recipes", "copy", "r.toml", "own.toml")
    assert (code, "own.toml exists already" in err) == (2, True)
    assert beitctl(capsys, "recipes", "copy", "r.toml", "own.toml", "--force")[0] == 0
    assert Path("own.toml").read_text() == Path("r.toml").read_text()


def test_recipes_check_says_ok_and_names_every_problem_of_every_file(capsys):
    for name in ("a", "b"):
        Path(f"{name}.toml").write_text('[recipe]\nsummary = "x"\n[make]\n')
    code, out, err = beitctl(capsys, "recipes", "check", "a.toml", "r.toml", "b.toml", "none.toml")
    assert (code, out) == (2, "r.toml: ok\n")
    assert ["a.toml:" in err, "b.toml:" in err, "error: none.toml: no such recipe file" in err] == [True] * 3


def test_recipes_schema_is_json_or_a_file(capsys):
    _, out, _ = beitctl(capsys, "recipes", "schema")
    beitctl(capsys, "recipes", "schema", "--write")
    assert json.loads(out) == json.loads(Path("beitctl.schema.json").read_text())
    assert "make" in json.loads(out)["properties"]


def test_plugins_ls_tells_broken_from_ok(capsys):
    _, out, _ = beitctl(capsys, "plugins", "ls", "--json")
    state = {row["name"]: row["state"] for row in json.loads(out)}
    assert (state["make"], state["broken"].startswith("broken: plugin 'broken'")) == ("ok", True)


def test_doctor_lists_findings_and_says_what_is_next(capsys, monkeypatch):
    monkeypatch.setenv("BEITCTL_RUNZ", "x")
    code, out, err = beitctl(capsys, "doctor", "--json")
    found = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert {
        "python",
        "beitctl",
        "torch",
        "CPU cores",
        "memory",
        "runs",
        "extra demo",
        "BEITCTL_RUNS",
    } <= found.keys()
    assert found["BEITCTL_RUNZ"]["state"] == "note"
    assert err == "ready. Next: beitctl recipes ls, or beitctl run tiny\n"


def test_doctor_ends_with_4_and_the_pip_command_if_something_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["no-such-package>=3"])
    code, out, err = beitctl(capsys, "doctor")
    assert code == 4
    assert 'not ready: no-such-package: pip install "no-such-package>=3"' in err
    assert any(line.split()[:2] == ["no-such-package", "missing"] for line in out.splitlines())


def test_doctor_names_an_extra_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ['no-such>=3; extra == "cloud"'])
    (finding,) = doctor._extras()
    assert (finding.state, finding.fix) == ("note", 'pip install "beitctl[cloud]"')


def test_doctor_survives_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = doctor._torch()
    assert (finding.name, finding.state) == ("torch", "missing")


def test_doctor_asks_for_another_folder_if_runs_cannot_be_written(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    finding = doctor._disk()
    assert (finding.state, finding.fix) == ("missing", "set BEITCTL_RUNS to a folder of yours")
