"""``--max-time``: a polite stop after some time, whatever stage runs then.

When it is over this process sends itself SIGUSR1, which means the same as from Slurm: save, exit 75.
"""

import os
import re
import signal
import time
from collections.abc import Mapping
from types import FrameType

from beitctl import failures
from beitctl.errors import UserError

STARTED = time.time()
"""When this process began, but for the time that Python takes."""
DEADLINE = "BEITCTL_DEADLINE"
"""Unix time at which the processes of ``--gpus`` stop; their parent sets it."""
JOB_END = "SLURM_JOB_END_TIME"
"""Unix time at which Slurm ends a job."""
MARGIN_SECONDS = 300.0
"""How long before the end of a Slurm job a run stops by itself."""
UNITS = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
WORDS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", re.ASCII)
CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", re.ASCII)
MINUTES = re.compile(r"\d+(?:\.\d+)?", re.ASCII)


def seconds(text: str, option: str = "--max-time") -> float:
    """Seconds of ``3h50m``, ``90m``, ``2:30:00``, ``1-12:00:00`` or plain minutes.

    Raises:
        UserError: it is none of them, or no time at all.
    """
    given = text.strip().lower()
    found = 0.0
    if MINUTES.fullmatch(given):
        found = 60 * float(given)
    elif match := CLOCK.fullmatch(given) or WORDS.fullmatch(given):
        amounts = (int(part or 0) for part in match.groups())
        found = float(sum(count * unit for count, unit in zip(amounts, UNITS.values(), strict=True)))
    if not found:
        raise UserError(
            f"{option} {text}: is no time above 0; write 3h50m, 90m, 2:30:00 (hours, minutes, seconds) or a "
            "number of minutes"
        )
    return found


def deadline(max_time: str | None, env: Mapping[str, str]) -> float | None:
    """Unix time at which to stop: as the parent says, ``max_time`` after the start, or before Slurm does.

    Raises:
        UserError: ``max_time`` is no time.
    """
    asked = None if max_time is None else STARTED + seconds(max_time)
    if DEADLINE in env:
        return float(env[DEADLINE])
    left = float(env[JOB_END]) - STARTED if env.get(JOB_END, "").isdigit() else 0.0
    if asked is None and left > 0:  # a shell that outlived its job still has the variable
        return STARTED + left - min(MARGIN_SECONDS, left / 2)
    return asked


def stop_at(moment: float) -> None:
    """Send SIGUSR1 to this process at a Unix time; at once if it has passed."""

    def over(number: int, frame: FrameType | None) -> None:
        if failures.rank() == 0:
            os.write(2, b"\nthe time of this run is over\n")
        os.kill(os.getpid(), signal.SIGUSR1)

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, moment - time.time()))
