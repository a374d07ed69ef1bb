"""Stages that do nothing but can go wrong in every way, a recipe for them, and a place to run them."""

import errno
import signal
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from beitctl import cli, registry, running
from beitctl.api import Plugin
from beitctl.config import TrainConfig
from beitctl.errors import DivergedError, Stopped, UserError

FAULTS = {
    "user": UserError("value: cannot be so, make it otherwise"),
    "bug": RuntimeError("unexpected"),
    "full": OSError(errno.ENOSPC, "No space left on device", "/disk/x"),
    "read-only": OSError(errno.EROFS, "Read-only file system", "/disk/x"),
    "stopped": Stopped("stopped at step 3; the same command goes on"),
    "ctrl-c": KeyboardInterrupt(),
    "memory": MemoryError(),
    "diverged": DivergedError("the loss is nan"),
}


class Make(Plugin):
    """Make a number."""

    value: int
    """The number."""
    fault_file: str = ""
    """A file with the name of the fault to have, while it is there."""

    def plan(self):
        return {"value": self.value, "parts": {"large": 12345678, "small": 0.123456}}

    def inputs_fingerprint(self):
        data = Path("data.txt")
        return data.read_text() if data.exists() else ""

    def run(self, job):
        with (job.folder / "calls.txt").open("a") as file:
            file.write(f"{'resumed' if job.resume else 'begun'}\n")
        if self.fault_file and Path(self.fault_file).exists():
            raise FAULTS[Path(self.fault_file).read_text()]
        job.log.note("made")
        return {"value": self.value, "inner": {"twice": 2 * self.value}}


class Measure(Plugin):
    """Measure a number."""

    require: list[str] = []  # noqa: RUF012 - pydantic copies it
    """Conditions on it."""

    def plan(self):
        return {"require": self.require}

    def run(self, job):
        return {"value": 1.0}


class Use(Plugin):
    """Use a number.

    In a second paragraph.
    """

    of: str
    """Where it comes from."""
    factor: int = 3
    """What it is multiplied with."""

    def plan(self):
        return {"factor": self.factor}

    def run(self, job):
        return {"seen": str(job.path(self.of)), "factor": self.factor}


class Learn(Plugin):
    """Train, in name only."""

    train: TrainConfig
    """The training loop."""

    def plan(self):
        return {"steps": self.train.steps}

    def run(self, job):
        return {"steps": self.train.steps}


STAGES = {"make": "run_stubs:Make", "use": "run_stubs:Use", "broken": "no_such_module:Stage"}
TEXT = """\
[recipe]
summary = "Two numbers"  # a comment

[make.first]
value = 1
fault_file = "fault"

[make.second]
value = 2

[use]
of = "@make.first"

[summary]
first = "@make.first:value"
nested.twice = "@make.second:inner.twice"
"""


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """An empty working folder with the recipe ``r.toml``, and the stages above instead of those installed."""
    install(monkeypatch, STAGES)
    monkeypatch.chdir(tmp_path)
    for name in (
        "BEITCTL_RUNS",
        "BEITCTL_RECIPES",
        "WORLD_SIZE",
        "RANK",
        "SLURM_PROCID",
        "SLURM_JOB_END_TIME",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BEITCTL_DEBUG", "")
    monkeypatch.setattr(running, "write_page", lambda folder: (folder / "report.html").write_text("page"))
    monkeypatch.setattr(running, "write_pipeline_page", write_pages)
    Path("r.toml").write_text(TEXT)
    return tmp_path


def write_pages(folder, runs):
    (folder / "report.html").write_text("\n".join(map(str, runs)))


def install(monkeypatch, stages):
    entries = tuple(EntryPoint(n, value, "beitctl.stages") for n, value in sorted(stages.items()))
    found = {"beitctl.stages": entries}
    monkeypatch.setattr(registry, "_entries", lambda group: found.get(group, ()))


def beitctl(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    previous = signal.getsignal(signal.SIGTERM)
    code = cli.execute(arguments)
    assert signal.getsignal(signal.SIGTERM) is previous
    out, err = capsys.readouterr()
    return code, out, err


def folders(key):
    """Run folders of a table of the recipe, oldest first."""
    return sorted(Path("runs/r", key).glob("*-*"))


def calls(folder):
    return (folder / "calls.txt").read_text().split()
