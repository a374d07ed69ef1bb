"""The bar of work on many files or examples."""

import time
from types import TracebackType
from typing import TYPE_CHECKING

from beitctl.report.progress import on_terminal

if TYPE_CHECKING:
    from rich.progress import Progress

PATIENCE = 2.0
"""Seconds before it appears."""


class Bar:
    """Says on stderr how far long work is, if that is a terminal and the work takes a while."""

    def __init__(self, title: str, total: int | None = None, *, done: int = 0, quiet: bool = False) -> None:
        """Begin.

        Args:
            title: what is done.
            total: how much there is to do; None: nobody knows.
            done: how much of it was done before.
            quiet: never appear.
        """
        self._title, self._total, self._done = title, total, done
        self._begun, self._wanted = time.monotonic(), not quiet and on_terminal()
        self._progress: Progress | None = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self) -> None:
        """One more is done."""
        self.at(self._done + 1)

    def at(self, done: int) -> None:
        """So many are done."""
        self._done = done
        if not self._wanted or time.monotonic() - self._begun < PATIENCE:
            return
        self._progress = self._progress or self._started()
        self._progress.update(self._progress.task_ids[0], completed=done)

    def _started(self) -> "Progress":
        # rich takes longer to import than the rest of the command line, and is for a terminal only
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
        if self._total is None:
            columns.append(TextColumn("{task.completed:,}"))
        else:
            columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        progress.start()
        progress.add_task(self._title, total=self._total, completed=self._done)
        return progress
