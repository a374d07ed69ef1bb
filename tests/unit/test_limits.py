"""``--max-time``: how times are written, when a run stops, and that it does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_stubs import beitctl, place  # noqa: F401 - the fixture works by being here

from beitctl import cli, limits
from beitctl.errors import UserError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13_800),
        ("90m", 5400),
        ("2h", 7200),
        ("1d12h", 129_600),
        ("45s", 45),
        (" 3H ", 10_800),
        ("2:30:00", 9000),
        ("100:00:01", 360_001),
        ("1-02:00:00", 93_600),
        ("30", 1800),
        ("1.5", 90),
    ],
)
def test_a_time_is_words_a_clock_or_minutes(text, seconds):
    assert limits.seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0h", "soon", "-5", "2:30", "2:70:00", "3m5h", "1.5h", "1e3", "nan", "3 h", "٣"]
)
def test_anything_else_is_refused_with_what_is_meant(text):
    with pytest.raises(UserError, match=r"--max-time .*: is no time above 0; write 3h50m, 90m, 2:30:00"):
        limits.seconds(text)


def test_without_a_limit_there_is_no_deadline():
    assert limits.deadline(None, {}) is None


def test_the_time_counts_from_the_start_of_the_process():
    assert limits.deadline("1h", {}) == limits.STARTED + 3600


def test_the_deadline_of_the_parent_counts_where_it_started_this_process():
    assert limits.deadline("1h", {limits.DEADLINE: "123.5"}) == 123.5


def test_a_slurm_job_stops_five_minutes_before_its_end():
    end = int(limits.STARTED) + 10_000
    assert limits.deadline(None, {limits.JOB_END: str(end)}) == pytest.approx(end - 300)


def test_a_short_slurm_job_stops_half_way_at_the_latest():
    end = int(limits.STARTED) + 100
    assert limits.deadline(None, {limits.JOB_END: str(end)}) == pytest.approx(limits.STARTED + 50, abs=1)


def test_a_job_that_has_ended_before_this_process_began_sets_no_limit():
    assert limits.deadline(None, {limits.JOB_END: str(int(limits.STARTED) - 10)}) is None


def test_max_time_goes_before_the_end_of_the_slurm_job():
    assert limits.deadline("1h", {limits.JOB_END: "1"}) == limits.STARTED + 3600


@pytest.mark.parametrize("command", [("make", "--recipe", "r.toml"), ("run", "r.toml")])
def test_a_wrong_time_is_wrong_usage_and_runs_nothing(capsys, command):
    code, _, err = beitctl(capsys, *command, "--max-time", "soon")
    assert (code, "--max-time soon: is no time above 0" in err, Path("runs").exists()) == (2, True, False)


def test_processes_of_gpus_get_the_deadline_of_their_parent(capsys, monkeypatch):
    seen = []
    monkeypatch.setenv(limits.DEADLINE, "")  # restored afterwards
    monkeypatch.delenv(limits.DEADLINE)
    monkeypatch.setattr(cli.launch, "run", lambda *_: seen.append(os.environ.get(limits.DEADLINE)) or 75)
    beitctl(capsys, "make", "--recipe", "r.toml", "--gpus", "2", "--max-time", "1h")
    assert seen == [str(limits.STARTED + 3600)]


SLOW = """\
import sys, time
from importlib.metadata import EntryPoint
from pathlib import Path
from beitctl import cli, registry, running
from beitctl.api import Plugin


class Slow(Plugin):
    seconds: float

    def plan(self):
        return {}

    def run(self, job):
        time.sleep(self.seconds)
        return {}


if __name__ == "__main__":
    entries = {"beitctl.stages": (EntryPoint("slow", "driver:Slow", "beitctl.stages"),)}
    registry._entries = lambda group: entries.get(group, ())
    running.write_page = running.write_pipeline_page = lambda *_: None
    cli.main()
"""


def test_a_run_stops_when_its_time_is_over_over_all_stages_with_75():
    Path("driver.py").write_text(SLOW)
    Path("s.toml").write_text(
        '[recipe]\nsummary = "s"\n[slow.a]\nseconds = 0.1\n[slow.b]\nseconds = 60\n[slow.c]\nseconds = 60\n'
    )
    command = [sys.executable, "driver.py", "run", "s.toml", "--max-time", "3s"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, "stopped by SIGUSR1; the same command goes on" in done.stderr) == (75, True), (
        done.stderr
    )
    status = {
        path.parent.parent.name: json.loads(path.read_text())["status"]
        for path in Path("runs/s").rglob("manifest.json")
    }
    assert status == {"slow.a": "ok", "slow.b": "stopped"}
