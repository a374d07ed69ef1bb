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

from beitctl.engine.guarding.heartbeat import EVERY_S, Heartbeat
from beitctl.errors import Stopped


class Watchdog:
    """Inside this context a process is ended that calls ``beat`` too seldom; the first call arms it.

    Its thread also writes the heartbeat of the rank.
    """

    def __init__(self, folder: Path, rank: int, minutes: float, world: int = 1) -> None:
        """Watch over one process.

        Args:
            folder: ``stacks-rank-N.txt`` and ``heartbeat-rank-N.json`` go there.
            rank: number of the process.
            minutes: longest time between two beats; 0 switches it off, but not the heartbeat.
            world: number of processes.
        """
        self.path, self.rank, self.limit = folder / f"stacks-rank-{rank}.txt", rank, 60 * minutes
        self.world, self.heartbeat = world, Heartbeat(folder, rank)
        self._last: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Say that the process got somewhere."""
        self._last = time.monotonic()

    def at(self, step: int, phase: str) -> None:
        """Say what the process is about to do, for the heartbeat."""
        self.heartbeat.at(step, phase)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        pause = min(EVERY_S, self.limit / 4) if self.limit else EVERY_S
        while not self._over.wait(pause):
            self.heartbeat.write()
            if self.limit and self._last is not None and time.monotonic() - self._last > self.limit:
                self._end()

    def _end(self) -> None:
        """Write down where every thread is, and leave; the process cannot be trusted to end in order."""
        self.heartbeat.write(at_once=True)
        behind = self.heartbeat.behind(self.world)
        text = (
            f"rank {self.rank}: no step in {self.limit / 60:g} minutes (train.hang_minutes); {self.path} "
            f"says where its threads are{f'; behind: {behind}' if behind else ''}. The same command goes on "
            "from the last checkpoint\n"
        )
        os.write(2, text.encode())
        try:
            with self.path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        os._exit(Stopped.exit_code)
