"""``--gpus N``: one process per rank on this machine.

torchrun does the same but turns every exit code into 1; those of beitctl mean something.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from beitctl.errors import SetupError, UserError

GRACE_SECONDS = 30.0
KILL_SECONDS = 10.0
POLL_SECONDS = 0.05
BY_TORCHRUN = ("LOCAL_WORLD_SIZE", "WORLD_SIZE")
BY_SLURM = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS")
"""Variables that say how many processes there are on a machine, the best first; Slurm writes ``8(x2)``."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def world(env: Mapping[str, str]) -> int:
    """Number of processes that torchrun, Slurm or this launcher started; 1 for none of them."""
    given = env.get("WORLD_SIZE") or (env.get("SLURM_NTASKS") if "SLURM_PROCID" in env else None) or "1"
    return int(given) if given.isdigit() else 1


def needed(gpus: int | None, env: Mapping[str, str]) -> bool:
    """Whether this process has to start ``gpus`` others; checks the number. None: none was asked for.

    Raises:
        UserError: ``gpus`` is below 1, or not what torchrun or Slurm has started here.
        SetupError: more than the machine has.
    """
    if gpus is None:
        return False
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: must be at least 1")
    if "WORLD_SIZE" in env or world(env) > 1:
        _agree(gpus, env)
        return False
    present = _gpus(env)
    if 0 < present < gpus:
        raise SetupError(f"--gpus {gpus}: this machine offers {present}; use --gpus {present} or less")
    return gpus > 1


def _agree(gpus: int, env: Mapping[str, str]) -> None:
    """Refuse --gpus where somebody has started another number of processes on this machine."""
    names = BY_TORCHRUN if "WORLD_SIZE" in env else BY_SLURM
    name = next(name for name in names if name in env)
    started = re.match(r"\d*", env[name])
    if started is None or started.group() == str(gpus):
        return
    who = "Slurm" if name.startswith("SLURM") else "torchrun"
    raise UserError(
        f"--gpus {gpus}: {who} has started these processes, {name}={env[name]}; leave --gpus out, or let "
        f"{who} start {gpus} on each machine"
    )


def _gpus(env: Mapping[str, str]) -> int:
    """GPUs that CUDA would show, without importing torch; 0 where ranks will run on the CPU."""
    try:
        present = len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        return 0
    visible = env.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, len([part for part in visible.split(",") if part]))


def run(
    ranks: int, arguments: Sequence[str], *, module: str = "beitctl", grace: float = GRACE_SECONDS
) -> int:
    """Start ``python -m beitctl ARGUMENTS`` once per rank and wait.

    Returns:
        The exit code of the first rank that failed, or 0. The other ranks then have ``grace`` seconds to end
        by themselves before they are stopped.
    """
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks)),
    }
    children: list[subprocess.Popen[bytes]] = []
    with _forwarding(children):
        try:
            for rank in range(ranks):
                env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                # a group of its own: Ctrl-C of the terminal then arrives once, from us
                command = [sys.executable, "-m", module, *arguments]
                children.append(subprocess.Popen(command, env=env, process_group=0))
            return _wait(children, grace)
        finally:
            _end(children)


def _wait(children: Sequence["subprocess.Popen[bytes]"], grace: float) -> int:
    """Exit code of the first rank that failed for a reason of its own.

    A rank whose peer is gone fails with 1 in the next collective, at times before the peer has quite ended.
    """
    failed: dict[int, int] = {}
    deadline = float("inf")
    while time.monotonic() < deadline:
        over = [child.poll() is not None for child in children]
        failed |= {c.pid: _code(c.returncode) for c in children if c.returncode and c.pid not in failed}
        if all(over):
            break
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + grace
        time.sleep(POLL_SECONDS)
    return next((code for code in failed.values() if code != 1), 1 if failed else 0)


def _code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _end(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End ranks that still run: politely, then for good."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in children:
            if child.poll() is None:
                _send(child, number)
        deadline = time.monotonic() + KILL_SECONDS
        while time.monotonic() < deadline and any(child.poll() is None for child in children):
            time.sleep(POLL_SECONDS)


def _send(child: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


@contextlib.contextmanager
def _forwarding(children: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Pass signals on to all ranks."""

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            _send(child, number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
