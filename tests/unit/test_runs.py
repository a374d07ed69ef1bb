"""Run folders: identity, manifest, lock."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from run_stubs import Make, Use, place  # noqa: F401 - the fixture works by being here

from beitctl import recipe, runs
from beitctl.errors import UserError
from beitctl.runs import Run, Workplace


def tables(*overrides):
    return recipe.load("r.toml", overrides).tables


def parent(fingerprint="a", folder="runs/a"):
    return Run(Path(folder), {"fingerprint": fingerprint})


def identity(key, *overrides, **parents):
    return runs.identify(tables(*overrides)[key], parents)


def made(folder, **manifest):
    folder.mkdir(parents=True)
    base = {"key": "use", "config_hash": "c", "fingerprint": "f", "started": "2026-01-01"}
    (folder / "manifest.json").write_text(json.dumps(base | manifest))
    return folder


def test_runs_are_below_the_current_folder_or_beitctl_runs(monkeypatch):
    assert runs.root() == Path("runs")
    monkeypatch.setenv("BEITCTL_RUNS", "~/all")
    assert runs.root() == Path.home() / "all"


def test_the_same_table_with_the_same_inputs_is_the_same():
    assert identity("use", **{"make.first": parent()}) == identity(
        "use", **{"make.first": parent(folder="b")}
    )


@pytest.mark.parametrize(
    ("overrides", "fingerprint"), [(["use.factor=4"], "a"), ([], "b")], ids=["setting", "input"]
)
def test_another_setting_or_input_is_another_config(overrides, fingerprint):
    before = identity("use", **{"make.first": parent()})
    after = identity("use", *overrides, **{"make.first": parent(fingerprint)})
    assert (before.config != after.config, before.code == after.code) == (True, True)
    assert before.fingerprint != after.fingerprint


def test_a_setting_given_at_its_default_is_the_same_config():
    assert identity("use", "use.factor=3") == identity("use")


def test_other_data_are_another_config():
    before = identity("make.first")
    Path("data.txt").write_text("more")
    assert identity("make.first").config != before.config


def test_other_code_is_another_fingerprint_of_the_same_config(monkeypatch):
    before = identity("use")
    monkeypatch.setattr(runs, "code_hash", lambda plugin: "other")
    after = identity("use")
    assert (before.config == after.config, before.fingerprint != after.fingerprint) == (True, True)


def acme(monkeypatch, tmp_path, text):
    """A plugin of another package, whose source is ``text``."""
    folder = tmp_path / "acme_code"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text(text)
    module = ModuleType("acme_code")
    module.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "acme_code", module)
    return type("Colour", (Use,), {"__module__": "acme_code.sub"})(of="x")


def test_the_code_of_a_plugin_of_another_package_counts(monkeypatch, tmp_path):
    before = runs.code_hash(acme(monkeypatch, tmp_path, "A = 1\n"))
    after = runs.code_hash(acme(monkeypatch, tmp_path, "A = 2\n"))
    assert before != after


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: [value], lambda value: {"a": value}])
def test_the_code_of_plugins_inside_settings_counts(monkeypatch, tmp_path, wrap):
    plugin = Make.model_construct(value=wrap(acme(monkeypatch, tmp_path, "A = 1\n")), fault_file="")
    before = runs.code_hash(plugin)
    acme(monkeypatch, tmp_path, "A = 3\n")
    after = runs.code_hash(plugin)
    assert before != after


def test_runs_of_a_table_are_found_newest_first(tmp_path):
    for day in (2, 3, 1):
        made(tmp_path / f"run-{day}", started=f"2026-01-0{day}")
    assert [run.folder.name for run in runs.find(tmp_path, "use")] == ["run-3", "run-2", "run-1"]


def test_other_tables_and_broken_manifests_are_passed_over(tmp_path):
    made(tmp_path / "other", key="make.first")
    for name, text in {"torn": '{"key": "use", ', "list": "[]", "foreign": '{"key": "use"}'}.items():
        (made(tmp_path / name) / "manifest.json").write_text(text)
    (tmp_path / "empty").mkdir()
    assert runs.find(tmp_path, "use") == []


def test_where_there_is_no_folder_there_are_no_runs(tmp_path):
    assert runs.find(tmp_path / "none", "use") == []


def test_folders_of_the_same_second_differ(tmp_path):
    found = {runs.new_folder(tmp_path, runs.Identity("c", "d", "")) for _ in range(2)}
    assert len(found) == 2
    assert all(re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", folder.name) for folder in found)


def test_a_file_that_cannot_be_written_keeps_its_old_text(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    file = tmp_path / "manifest.json"
    runs.write_file(file, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        runs.write_file(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir() if path.suffix != ".toml"] == [
        ("manifest.json", "old")
    ]


def test_a_workplace_is_for_one_process_and_names_it(tmp_path):
    first = Workplace(tmp_path)
    with pytest.raises(
        UserError, match=rf"another process \(pid {os.getpid()}\) works on this run; wait for it"
    ):
        Workplace(tmp_path)
    first.close()
    Workplace(tmp_path).close()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_ends_with_its_process_even_when_that_is_killed(tmp_path):
    code = "import pathlib, sys; from beitctl import runs; work = runs.Workplace(pathlib.Path(sys.argv[1]))"
    child = subprocess.Popen(
        [sys.executable, "-c", f"{code}; input()", tmp_path], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "lock").exists() or not (tmp_path / "lock").read_text():
        assert child.poll() is None
    with pytest.raises(UserError, match=f"pid {child.pid}"):
        Workplace(tmp_path)
    child.kill()
    child.communicate()
    Workplace(tmp_path).close()


def test_a_manifest_says_running_until_the_end(tmp_path):
    work = Workplace(tmp_path)
    table = tables()["use"]
    facts = runs.facts(table, "r", identity("use"), {"make.first": parent()}, command=["beitctl"], world=1)
    work.begin(table, facts)
    running = dict(runs.read(tmp_path).manifest)
    work.end("ok", 0, {"a": 1})
    work.close()
    ended = runs.read(tmp_path).manifest
    assert (running["status"], running["exit"], running["ended"]) == ("running", None, None)
    assert (ended["status"], ended["exit"], ended["metrics"]) == ("ok", 0, {"a": 1})
    assert ended["started"] < ended["ended"]
    assert ended["parents"] == {"@make.first": {"folder": str(Path("runs/a").resolve()), "fingerprint": "a"}}


def test_a_resolved_table_stands_under_its_key():
    assert runs.resolved(tables()["make.second"]) == "[make.second]\nvalue = 2\n"


def test_a_page_is_up_to_date_if_it_is_newer_than_all_runs(tmp_path):
    page, folder = tmp_path / "report.html", made(tmp_path / "run")
    assert not runs.up_to_date(page, [folder])
    page.touch()
    os.utime(page, ns=(0, (folder / "manifest.json").stat().st_mtime_ns + 1))
    assert runs.up_to_date(page, [folder])
    os.utime(page, ns=(0, (folder / "manifest.json").stat().st_mtime_ns - 1))
    assert not runs.up_to_date(page, [folder])


def test_the_commit_of_a_checkout_is_recorded_and_nothing_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "beitctl" / "runs.py"))
    assert runs._git() == {}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "r.toml"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    clean = runs._git()
    Path("r.toml").write_text("changed")
    assert (len(clean["commit"]), clean["changed"], runs._git()["changed"]) == (40, False, True)
