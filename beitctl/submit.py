"""``--submit slurm``: the same command as a Slurm job of one task per GPU that comes back after exit 75.

submitit writes the job script and gives it to sbatch. In the job every task is a rank (``engine.dist`` reads
Slurm's variables), SIGUSR1 tells them to save some minutes before the end, and exit code 75 requeues the job.
"""

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from beitctl import limits
from beitctl.errors import SetupError, UserError

WARNING_SECONDS = 300
"""How long before the end of a job Slurm sends SIGUSR1."""
MOST_RESTARTS = 1000
"""A job that has come back so often does not again: something is wrong."""
SRUN = ("--open-mode=append", "--kill-on-bad-exit=0", "--wait=300")
"""Logs of earlier starts stay; the exit code is the highest of all ranks, not that of one that was killed
because another had ended."""
OPTIONS = {"--submit": 1, "--nodes": 1, "--gpus": 1, "--partition": 1, "--time": 1, "--slurm": 1}
"""Options that are about the submission, with the number of words that follow them."""
AFTERWARDS = f"""\
code=$?
if [ "$code" -eq 75 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_RESTARTS} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code\""""


class Scheduler(StrEnum):
    """Where a command can be submitted."""

    slurm = "slurm"


@dataclass(frozen=True)
class Request:
    """What a job asks Slurm for; from the command line."""

    nodes: int | None = None
    gpus: int | None = None
    """GPUs, and tasks, of a node."""
    partition: str | None = None
    time: str | None = None
    settings: tuple[str, ...] = ()
    """Further options of sbatch, ``key=value`` each."""

    def refuse_alone(self) -> None:
        """Refuse what belongs to a job where none is asked for.

        Raises:
            UserError: there is such an option.
        """
        given: dict[str, Any] = {"--nodes": self.nodes, "--partition": self.partition, "--time": self.time}
        given["--slurm"] = self.settings or None
        for option, value in given.items():
            if value is not None:
                raise UserError(f"{option} belongs to --submit slurm; add that, or leave {option} out")

    @property
    def world(self) -> int:
        """Processes of the job."""
        return (1 if self.nodes is None else self.nodes) * (1 if self.gpus is None else self.gpus)

    def parameters(self, name: str) -> dict[str, Any]:
        """The request in submitit's terms.

        Raises:
            UserError: a number is too small, a time or a further option cannot be read.
        """
        nodes = 1 if self.nodes is None else self.nodes
        gpus = 1 if self.gpus is None else self.gpus
        if nodes < 1 or gpus < 1:
            raise UserError(f"--nodes {nodes} --gpus {gpus}: must be at least 1")
        minutes = None if self.time is None else math.ceil(limits.seconds(self.time, "--time") / 60)
        warning = WARNING_SECONDS if minutes is None else min(WARNING_SECONDS, 30 * minutes)
        further: dict[str, Any] = {"signal": f"USR1@{warning}", "requeue": True}
        for text in self.settings:
            key, found, value = text.partition("=")
            if not key.strip("-") or any(part.isspace() for part in key):
                raise UserError(
                    f"--slurm {text}: write KEY=VALUE, such as --slurm account=vision, or KEY alone"
                )
            further[key.strip("-").replace("-", "_")] = value if found else True
        return {
            "job_name": name,
            "nodes": nodes,
            "ntasks_per_node": gpus,
            "gpus_per_node": gpus,
            "partition": self.partition,
            "time": minutes,
            "wckey": None,
            "stderr_to_stdout": True,
            "additional_parameters": further,
            "srun_args": list(SRUN),
            "teardown": AFTERWARDS.splitlines(),
        }


@dataclass(frozen=True)
class Submitted:
    """A job that Slurm has taken."""

    job: str
    script: Path
    logs: Path
    """Log of rank 0; the others' have their number in its place."""


def command(arguments: Sequence[str]) -> list[str]:
    """The command that each task runs: this one, without what is about the submission."""
    kept: list[str] = []
    skip = 0
    for word in arguments:
        name, given, _ = word.partition("=")
        if skip:
            skip -= 1
        elif name in OPTIONS:
            skip = 0 if given else OPTIONS[name]
        else:
            kept.append(word)
    return [sys.executable, "-u", "-m", "beitctl", *kept]


def submit(request: Request, arguments: Sequence[str], name: str, folder: Path) -> Submitted:
    """Give a command to Slurm; scripts and logs go to ``folder``.

    Raises:
        SetupError: submitit or Slurm is not there.
        UserError: the request cannot be read, or Slurm refuses it.
    """
    parameters = request.parameters(name)
    executor = _executor(folder)
    executor.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    executor.parameters |= {key: None for key, value in parameters.items() if value is None}
    folder.mkdir(parents=True, exist_ok=True)
    from submitit.core.utils import FailedJobError, FailedSubmissionError  # noqa: PLC0415

    try:
        job = executor._submit_command(shlex.join(command(arguments)))
    except (FailedJobError, FailedSubmissionError) as error:
        said = str(error).strip().splitlines()
        raise UserError(f"sbatch refused the job: {said[-1] if said else error}") from error
    return Submitted(str(job.job_id), Path(job.paths.submission_file), Path(job.paths.stdout))


def _executor(folder: Path) -> Any:
    try:
        from submitit.slurm.slurm import SlurmExecutor  # noqa: PLC0415
    except ImportError as error:
        raise SetupError(
            "--submit slurm needs submitit, which is not installed: pip install 'beitctl[slurm]'"
        ) from error
    try:
        return SlurmExecutor(folder.resolve())
    except RuntimeError as error:
        raise SetupError(
            "--submit slurm: there is no srun on this machine; run the command where jobs are submitted, or "
            "write the script by hand (docs/slurm.md)"
        ) from error


def record(made: Submitted, arguments: Sequence[str]) -> Mapping[str, Any]:
    """What --json says of a job."""
    return {
        "scheduler": Scheduler.slurm.value,
        "job": made.job,
        "script": str(made.script),
        "log": str(made.logs),
        "command": command(arguments),
    }
