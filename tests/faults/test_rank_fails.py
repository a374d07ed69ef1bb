"""One of two processes of ``--gpus 2`` fails: what the run is recorded as, and what the terminal shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault(9)
DRIVER = """\
import os
import signal
from importlib.metadata import EntryPoint

from beitctl import cli, launch, registry
from beitctl.api import Plugin
from beitctl.errors import DivergedError, UserError


class Faulty(Plugin):
    mode: str

    def plan(self):
        return {}

    def run(self, job):
        if os.environ["RANK"] == "1" and self.mode == "diverged":
            raise DivergedError("the loss is nan")
        if self.mode == "refused":
            raise UserError("mode: cannot be so; choose another")
        if os.environ["RANK"] == "1" and self.mode == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"value": 1}


if __name__ == "__main__":
    entries = {"beitctl.stages": (EntryPoint("faulty", "driver:Faulty", "beitctl.stages"),)}
    registry._entries = lambda group: entries.get(group, ())
    start = launch.run
    launch.run = lambda gpus, arguments: start(gpus, arguments, module="driver")
    cli.main()
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What ``faulty --gpus 2`` does, by its mode: exit code, stderr and manifest."""

    def run(mode):
        if mode not in done:
            folder = tmp_path_factory.mktemp(mode)
            (folder / "driver.py").write_text(DRIVER)
            (folder / "r.toml").write_text(f'[recipe]\nsummary = "x"\n[faulty]\nmode = "{mode}"\n')
            env = {key: value for key, value in os.environ.items() if not key.startswith("BEITCTL_")}
            ended = subprocess.run(
                [sys.executable, "-m", "driver", "faulty", "--recipe", "r.toml", "--gpus", "2"],
                cwd=folder, env={**env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert Path(folder, "runs").is_dir(), ended.stderr
            (manifest,) = Path(folder, "runs/r/faulty").glob("*/manifest.json")
            done[mode] = ended.returncode, ended.stderr, json.loads(manifest.read_text())
        return done[mode]

    done = {}
    return run


def test_a_run_of_two_ranks_without_a_fault_is_done(ran):
    code, err, manifest = ran("none")
    assert (code, manifest["status"], manifest["world"]) == (0, "ok", 2), err


@pytest.mark.parametrize("mode", ["diverged", "killed"])
def test_a_run_is_recorded_as_failed_if_only_rank_1_failed(ran, mode):
    _, err, manifest = ran(mode)
    assert (manifest["status"], manifest["exit"], manifest["metrics"]) == ("failed", 1, {}), err


@pytest.mark.parametrize(("mode", "code"), [("diverged", 6), ("killed", 137)])
def test_the_exit_code_is_that_of_the_rank_that_failed_by_itself(ran, mode, code):
    assert ran(mode)[0] == code


def test_the_terminal_shows_the_reason_and_that_the_others_only_miss_a_process(ran):
    lines = [line for line in ran("diverged")[1].splitlines() if not line.startswith("faulty: running in")]
    assert lines == [
        "error (rank 1): the loss is nan",
        "error: another process of this run ended; its message is above",
    ]


def test_what_all_ranks_refuse_alike_is_told_once(ran):
    code, err, manifest = ran("refused")
    assert (code, manifest["exit"], err.count("mode: cannot be so")) == (2, 2, 1), err
