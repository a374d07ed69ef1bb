"""A window of steps under the profiler: a Chrome trace of every rank, and its operations by time."""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

ROWS = 30
"""Operations in the table."""
SILENT = "6"
"""Level above all messages of the profiler's library, which misses the GPU where there is none."""


class Window:
    """Profiles the steps of a window, one after the other; everything it cannot do is a warning.

    The trace goes to ``folder/profile/rank-N.json.gz`` (open it in ui.perfetto.dev), the table of operations
    by their own time to ``rank-N.txt`` beside it. A run that ends inside the window writes what there is.

    Args:
        folder: of the run.
        rank: of this process.
        steps: first and last step, counted from 1; None profiles nothing.
        warn: called with what the user should know.
    """

    def __init__(
        self, folder: Path, rank: int, steps: tuple[int, int] | None, warn: Callable[[str], None]
    ) -> None:
        self.folder, self.rank, self.steps, self.warn = folder / "profile", rank, steps, warn
        self._profile: profile | None = None
        self._seen = 0

    def __enter__(self) -> Self:
        if self.steps and self.steps[0] == 1:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def step(self, number: int) -> None:
        """Tell that a step is done, by its number from 1; a run that resumes may begin anywhere."""
        if self.steps is None:
            return
        first, last = self.steps
        if self._profile is not None:
            if number <= last:
                self._seen += 1
                self._profile.step()
            if number >= last:
                self._finish()
        elif first <= number + 1 <= last:
            self._start()

    def _start(self) -> None:
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        if not cuda:
            os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)
        made = profile(activities=[ProfilerActivity.CPU, *cuda])
        try:
            made.start()
        except (RuntimeError, OSError) as error:
            self._give_up(error)
        else:
            self._profile, self._seen = made, 0

    def _finish(self) -> None:
        made, self._profile = self._profile, None
        if made is None:
            return
        try:
            made.stop()
            if self._seen:
                self._write(made)
        except (RuntimeError, OSError) as error:
            self._give_up(error)

    def _write(self, made: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        made.export_chrome_trace(str(self.folder / f"rank-{self.rank}.json.gz"))
        where = "device" if torch.cuda.is_available() else "cpu"
        table = made.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=ROWS)
        steps = f"{self._seen} step{'s' if self._seen > 1 else ''} of rank {self.rank}\n"
        (self.folder / f"rank-{self.rank}.txt").write_text(steps + table, encoding="utf-8")

    def _give_up(self, error: Exception) -> None:
        self.steps = None  # the run goes on without
        self.warn(f"no profile of rank {self.rank} in {self.folder}: {error}; the run goes on without it")
