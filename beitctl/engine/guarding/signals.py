"""Polite stops: signals and a ``stop`` file only raise a flag; the loop saves and leaves."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Literal, Self

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_S = 1.0
"""A signal repeated within this time is the same request: schedulers and launchers both pass signals on."""


class Signals:
    """Inside this context SIGTERM, SIGUSR1 and Ctrl-C are requests; a second one leaves at once.

    A second SIGUSR1 does not: Slurm sends it as a warning, and SIGTERM when the time is up.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._flag: Literal["stop", "interrupt"] | None = None
        self._file = folder / "stop" if folder else None
        self._checked = 0.0
        self._last: dict[int, float] = {}
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> Literal["stop", "interrupt"] | None:
        """What was asked for so far; a file called ``stop`` in the run folder asks too, and is removed."""
        if self._flag is None and self._file and time.monotonic() - self._checked > 1:
            self._checked = time.monotonic()
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()
                self._flag = "stop"
        return self._flag

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now, before = time.monotonic(), self._last.get(number)
        self._last[number] = now
        if before is not None and now - before > ECHO_S and number != signal.SIGUSR1:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        if self._flag is None and os.environ.get("RANK", "0") == "0":
            os.write(2, _text(number).encode())  # safe inside a signal handler
        if self._flag is None:
            self._flag = "interrupt" if number == signal.SIGINT else "stop"


def _text(number: int) -> str:
    """What was received, and what follows."""
    if number == signal.SIGINT:
        return "\nCtrl-C: finishing this step, then saving (once more to leave now)\n"
    return f"\n{signal.Signals(number).name} received: finishing this step, then saving\n"


def worker_ignores_signals(worker: int) -> None:
    """Data-loading workers leave stopping to their parent, which a terminal signals too."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
