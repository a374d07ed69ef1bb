"""Back to the last checkpoint, and past the data that a run diverged on.

The batches of a step are a pure function of its data index. That is the number of the step plus an offset,
which grows with every rollback and stands in every checkpoint.
"""

import time
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from beitctl.engine.dist import Ranks
from beitctl.engine.guarding.guard import Verdict
from beitctl.engine.saving import files
from beitctl.engine.saving.checkpoint import Found
from beitctl.errors import DivergedError

LIST = "rollbacks.jsonl"
"""File in the run folder: one line for every rollback."""
ADVICE = "Lower peak_lr, lengthen warmup_steps, or set clip_norm"


class Shifted(Dataset[Any]):
    """The batches of steps when ``offset`` steps' worth of data are left out.

    Data whose batches depend on the step besides (a temperature) have a method ``at(step, index)``.
    """

    def __init__(self, data: Any, offset: int) -> None:
        self.data, self.offset = data, offset

    def __getitem__(self, step: int) -> Any:
        index = step + self.offset
        at = getattr(self.data, "at", None)
        return at(step, index) if callable(at) else self.data[index]


class Rollbacks:
    """The returns to a checkpoint in this process; the same on all ranks."""

    def __init__(self, folder: Path, ranks: Ranks, limit: int) -> None:
        """None so far, at most ``limit``; they are listed in the run folder."""
        self.path, self.ranks, self.limit = folder / LIST, ranks, limit
        self.count = 0
        self._last: tuple[int, int] | None = None

    def take(self, verdict: Verdict, found: Found | None, offset: int) -> int:
        """The new data offset when a run goes on from a checkpoint after a verdict at data ``offset``.

        Raises:
            DivergedError: it must not, or there is no checkpoint; says what was tried.
        """
        refusal = self._refusal(verdict, found)
        if found is None or refusal:
            tried = f" after {self.count} rollbacks (they are in {self.path})" if self.count else ""
            raise DivergedError(
                f"{verdict.reason}; steps without a finite gradient left the weights as they are. {refusal}"
                f"{tried}. {ADVICE}"
            )
        self.count += 1
        self._last = (found.step, verdict.step)
        new = offset + verdict.step - found.step
        if self.ranks.main:
            row = {
                "step": verdict.step, "reason": verdict.reason, "checkpoint": found.step,
                "skipped": [found.step + offset, verdict.step + offset - 1], "data_offset": new,
                "time": time.time(),
            }  # fmt: skip
            files.append(self.path, [row])
        return new

    def _refusal(self, verdict: Verdict, found: Found | None) -> str:
        """Why the run must not go back; empty if it may."""
        if self.count >= self.limit:
            return f"No rollback is left (train.max_rollbacks = {self.limit})"
        if found is None:
            return "There is no checkpoint of this run to go back to"
        if self._last is not None and found.step == self._last[0] and verdict.step <= self._last[1]:
            return f"Other data after {found.path.name} did not help"
        return ""
