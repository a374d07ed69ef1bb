"""Python's garbage collector during training: a collection at a random step makes all other ranks wait."""

import gc
from typing import Self

from beitctl.engine.guarding.signals import worker_ignores_signals


class Collector:
    """Inside this context nothing is collected after the first step but when ``collect`` is called."""

    def __init__(self) -> None:
        self._automatic = gc.isenabled()
        self._frozen = False

    def freeze(self) -> None:
        """Leave all that exists out of later collections, and switch automatic ones off; only once."""
        if not self._frozen:
            self._frozen = True
            gc.freeze()
            gc.disable()

    def collect(self) -> None:
        """Collect what came after the first step."""
        if self._frozen:
            gc.collect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._frozen:
            gc.unfreeze()
        if self._automatic:
            gc.enable()


def worker_begins(worker: int) -> None:
    """Data-loading workers leave stopping to their parent, but collect garbage by themselves."""
    worker_ignores_signals(worker)
    gc.enable()
