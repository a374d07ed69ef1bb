"""When a run is saved, what it goes on from, and what a checkpoint holds besides the tensors."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from beitctl.config import TrainConfig
from beitctl.engine.saving.checkpoint import Checkpoints, Found
from beitctl.engine.session import Session
from beitctl.errors import CapacityError, UserError


class Saves:
    """The checkpoints of a loop; every method is called by all ranks."""

    def __init__(
        self, config: TrainConfig, session: Session, tensors: Callable[[], Mapping[str, Tensor]],
        loaded: Callable[[], None],
    ) -> None:  # fmt: skip
        """None saved so far.

        Args:
            config: how often to save, and how.
            session: where.
            tensors: gives everything that a checkpoint holds.
            loaded: called when they have been filled.
        """
        self.config, self.session, self.tensors, self.loaded = config, session, tensors, loaded
        self.checkpoints = Checkpoints(
            session.folder / "checkpoints", session.ranks, config.keep_checkpoints,
            session.warns("W302", "look at the disk; the run goes on"),
            keep_every_hours=config.keep_every_hours,
        )  # fmt: skip
        self.committed: int | None = None
        """Step of the newest checkpoint of this run."""
        self.due = False
        self._begun = time.monotonic()

    def late(self) -> bool:
        """Whether the last save is longer ago than it should be."""
        return time.monotonic() - self._begun > 60 * self.config.save_every_minutes

    def restore(self) -> Found | None:
        """Load the newest checkpoint that verifies, if the session resumes and there is one.

        Raises:
            UserError: it is of another run.
        """
        found = self.checkpoints.newest() if self.session.resume else None
        if found is None:
            return None
        if found.meta.get("identity") != self.session.identity:
            raise UserError(
                f"{found.path} is a checkpoint from another recipe (identity {found.meta.get('identity')!r}, "
                f"this run is {self.session.identity!r}); use another --out, or the recipe it came from"
            )
        self.load(found)
        return found

    def newest(self) -> Found | None:
        """The newest checkpoint of this run that verifies, when one that is being written is done."""
        self.checkpoints.settle(wait=True)
        return self.checkpoints.newest() if self.committed is not None else None

    def load(self, found: Found) -> None:
        """Fill the tensors with what a checkpoint holds."""
        self.checkpoints.load(found, self.tensors())
        self.loaded()
        self.committed, self.due = found.step, False

    def save(self, step: int, meta: Mapping[str, Any], *, last: bool) -> None:
        """Write a checkpoint, in the background if the settings say so and it is not the last one.

        Raises:
            CapacityError: there is no room for the last one; without any other the run goes on.
        """
        self._begun, self.due = time.monotonic(), False
        body = {"identity": self.session.identity, **meta}
        try:
            if self.config.async_save and not last:
                self.checkpoints.begin(step, self.tensors(), body, self._done)
            else:
                path = self.checkpoints.save(step, self.tensors(), body)
                self._done(step, path, time.monotonic() - self._begun)
        except CapacityError as error:
            if last:
                raise
            text = f"step {step} is not saved: {error}"
            self.session.warn("W302", text, "make room; the run goes on and saves again when it is due")

    def settle(self, *, wait: bool = False) -> None:
        """Take note of a checkpoint that was written in the background."""
        self.checkpoints.settle(wait)

    def _done(self, step: int, path: Path, seconds: float) -> None:
        self.committed = step
        self.session.saved(step, path, seconds)
