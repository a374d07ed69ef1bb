"""One finished optimizer step, and the pace of the steps since the last one that was logged."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from beitctl.engine.dist import Ranks


@dataclass(frozen=True)
class Step:
    """One finished optimizer step. Numbers stay on the device until ``metrics`` is called."""

    number: int
    """Steps done, this one included."""
    lr: float
    grad_norm: Tensor
    sums: Tensor
    """(terms, 2) losses and right predictions of this rank."""
    counts: tuple[float, ...]
    """Global number of predictions per term."""
    terms: tuple[str, ...]
    weights: tuple[float, ...]
    samples: float
    """Samples over all ranks, of all steps since the last one that is logged, this one included."""
    seconds: float
    """Seconds of those steps: the work of a GPU is known to be done at logged steps alone."""
    wait: float
    """Seconds of ``seconds`` spent waiting for data."""
    ranks: Ranks
    figures: Callable[[], dict[str, float]] = dict
    """What the meter says of those steps."""

    def metrics(self) -> dict[str, float]:
        """Losses and accuracies over all ranks, by name; every rank must call it on the same steps."""
        flat = self.ranks.sum(self.sums.flatten().tolist())
        found: dict[str, float] = {"loss": 0.0}
        for index, (term, count) in enumerate(zip(self.terms, self.counts, strict=True)):
            if count:
                found[f"{term}/loss"] = flat[2 * index] / count
                found[f"{term}/accuracy"] = flat[2 * index + 1] / count
                found["loss"] += self.weights[index] * found[f"{term}/loss"]
        return (
            found
            | {
                "lr": self.lr,
                "grad_norm": float(self.grad_norm),
                "samples_per_s": self.samples / self.seconds,
                "data_wait": self.wait / self.seconds,
            }
            | self.figures()
        )


class Pace:
    """Samples, operations and seconds of the steps since the last one that is logged."""

    def __init__(self) -> None:
        self.samples = self.flops = self.seconds = self.wait = 0.0
        self._mark = time.monotonic()

    def start(self) -> None:
        """A step begins with waiting for its data."""
        self._mark = time.monotonic()

    def loaded(self) -> None:
        """The data of the step are there."""
        self.wait += self._passed()

    def done(self, samples: float, flops: float) -> None:
        """The step is over; ``samples`` and ``flops`` are those of all ranks."""
        self._passed()
        self.samples += samples
        self.flops += flops

    def _passed(self) -> float:
        now = time.monotonic()
        passed, self._mark = now - self._mark, now
        self.seconds += passed
        return passed
