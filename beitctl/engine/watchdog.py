"""Ends a process that gets nowhere, with the stacks of its threads on disk: a hang says nothing by itself.

A rank that waits for ever, for a rank that died or for a file system, keeps all others waiting. The watchdog
ends its process with exit code 75, so that a scheduler starts the job again from the last checkpoint.
"""

import faulthandler
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from beitctl.errors import Stopped


class Watchdog:
    """Inside this context a process is ended that calls ``beat`` too seldom; the first call arms it."""

    def __init__(self, folder: Path, rank: int, minutes: float) -> None:
        """Watch over one process.

        Args:
            folder: ``stacks-rank-N.txt`` goes there.
            rank: number of the process.
            minutes: longest time between two beats; 0 switches it off.
        """
        self.path, self.rank, self.limit = folder / f"stacks-rank-{rank}.txt", rank, 60 * minutes
        self._last: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Say that the process got somewhere."""
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        if self.limit:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(10.0, self.limit / 4)):
            if self._last is not None and time.monotonic() - self._last > self.limit:
                self._end()

    def _end(self) -> None:
        """Write down where every thread is, and leave; the process cannot be trusted to end in order."""
        text = (
            f"rank {self.rank}: no step in {self.limit / 60:g} minutes (train.hang_minutes); {self.path} "
            f"says where its threads are. The same command goes on from the last checkpoint\n"
        )
        os.write(2, text.encode())
        try:
            with self.path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        os._exit(Stopped.exit_code)
