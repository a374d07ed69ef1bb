"""What an exception means to the person at the terminal: the exit code, and one line of text."""

import contextlib
import errno
import os
import re
import sys
import traceback
from datetime import timedelta
from typing import Any

from beitctl.errors import BeitctlError, Interrupted, Stopped, UserError

UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE = timedelta(seconds=5)
"""How long a process that ends waits to hear what the others end with."""
SAID, HEARD = "beitctl/said", "beitctl/heard"
PEER_GONE = re.compile(
    r"gloo/.*(closed by peer|reset by peer|Broken pipe)"
    r"|ncclRemoteError|Did the remote server shutdown or crash",
    re.DOTALL,
)
"""What torch says in a collective when another process of the group has ended."""


def exit_code(error: BaseException) -> int:
    """The exit code that an exception ends the program with; ``beitctl.errors`` lists them."""
    if isinstance(error, BeitctlError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return Interrupted.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        return 2
    if (isinstance(error, OSError) and error.errno in FULL) or _out_of_memory(error):
        return 5
    return 1


def status(error: BaseException) -> str:
    """``stopped`` for a run that can go on later, else ``failed``."""
    return "stopped" if isinstance(error, Stopped | KeyboardInterrupt | SystemExit) else "failed"


def message(error: BaseException) -> str:
    """What happened and what to do, without a traceback."""
    if isinstance(error, BeitctlError) and type(error) is not BeitctlError:
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from the last checkpoint"
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        return (
            f"{error.filename or 'a file'}: {error.strerror}; change its permissions, or choose another "
            "folder with --out or BEITCTL_RUNS"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return (
            f"{error.filename or 'the disk'}: {error.strerror}; free some space, then give the same command "
            "again: it goes on from the last checkpoint"
        )
    if isinstance(error, RuntimeError) and PEER_GONE.search(str(error)):
        return "another process of this run ended; its message is above"
    if _out_of_memory(error):
        return (
            f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            "use a smaller train.micro_samples or a smaller model"
        )
    return f"{type(error).__name__}: {error} (a fault of beitctl or of a plugin: run again with --debug)"


def show(error: BaseException) -> int:
    """Tell stderr about an exception, once over all processes where they agree; returns the exit code."""
    error = _interrupt_behind(error) or error
    code, place = exit_code(error), rank()
    silent = isinstance(error, SystemExit | BrokenPipeError) or (place > 0 and status(error) == "stopped")
    if not silent:
        if os.environ.get("BEITCTL_DEBUG", "") not in ("", "0"):
            sys.stderr.write("".join(traceback.format_exception(error)))
        where = f" (rank {place})" if place else ""
        start = "" if status(error) == "stopped" else f"error{where}: "
        sys.stderr.write("".join(f"{start}{line}\n" for line in _lines(error)))
        sys.stderr.flush()
    return code


def told_by_main(store: Any, world: int, error: BaseException) -> bool:
    """Whether rank 0 ends with the same words, so that this process need not say them too.

    Every process that ends with an error of the user calls this; of others it is never true. Rank 0 waits
    until the others have heard it, because the store may be its own and end with it. Where rank 0 has no
    error, or is gone, each process speaks for itself.

    Args:
        store: where the processes met; None where there is but one.
        world: number of processes.
        error: what this process ends with.
    """
    own, alike = rank(), False
    if store is None or not isinstance(error, UserError):
        return False
    with contextlib.suppress(RuntimeError):  # torch's errors of a store that is silent, or gone
        if own == 0:
            store.set(SAID, str(error))
            store.wait([f"{HEARD}/{other}" for other in range(1, world)], PATIENCE)
        else:
            store.wait([SAID], PATIENCE)
            alike = bool(store.get(SAID).decode() == str(error))
            store.set(f"{HEARD}/{own}", "")
    return alike


def rank() -> int:
    """Number of this process among those that torchrun, Slurm or --gpus started."""
    given = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(given) if given.isdigit() else 0


def _lines(error: BaseException) -> list[str]:
    problems = getattr(error, "problems", None)
    return list(problems) if isinstance(problems, list) and problems else [message(error)]


def _interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C that typer turned into an exit."""
    exit = error.__context__ if isinstance(error, SystemExit) else None
    cause = exit.__cause__ if exit is not None else None
    return cause if isinstance(cause, KeyboardInterrupt) else None


def _out_of_memory(error: BaseException) -> bool:
    """MemoryError, and torch's own by their names, so that torch need not be imported."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )
