"""Watches the gradient norm: too many steps without a finite one, or one far above its usual range.

Norms stay on the device until a step that is logged or saved, and are then read in one copy. What the guard
remembers is part of every checkpoint, so that a resumed run judges as one that was never interrupted.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from beitctl.config import TrainConfig

STREAK = 3
"""Steps in a row without a finite gradient after which a run counts as diverged."""
MOST, WITHIN = 10, 1000
"""So many steps without a finite gradient within so many steps count as well."""
REMEMBERED, NEEDED = 200, 50
"""Finite norms that a spike is compared with at most, and at least."""
SPIKE = 8.0
"""Deviations of the logarithm of the norm above its median that make a spike."""
LEAST_DEVIATION = 0.1
"""Smallest deviation of the logarithm that is reckoned with: a norm 2.2 times the median is never a spike."""
QUIET = 100
"""Steps after a warning of a spike without another."""


@dataclass(frozen=True)
class Verdict:
    """That a run has diverged."""

    step: int
    """The last step that shows it, counted from 1."""
    norm: float
    """Its gradient norm."""
    reason: str


class Guard:
    """The gradient norms of a run; the same on all ranks, because the norm is global."""

    def __init__(self, config: TrainConfig, device: torch.device, warn: Callable[[str], None]) -> None:
        """No norm so far; ``warn`` hears of spikes where the settings ask for warnings."""
        self.spikes, self.warn = config.on_spike, warn
        self.streak = 0
        """Steps without a finite gradient at the end of what was read."""
        self.latest = 0.0
        """The last norm that was read."""
        self._unread = torch.zeros(config.log_every_steps, device=device)
        self._count = 0
        self._logs: deque[float] = deque(maxlen=REMEMBERED)
        self._bad: list[int] = []
        self._warned = -QUIET

    def note(self, norm: Tensor) -> None:
        """Keep the norm of a step, 0-d, on the device; at most ``log_every_steps`` until the next reading."""
        self._unread[self._count].copy_(norm)
        self._count += 1

    def read(self, step: int) -> Verdict | None:
        """Judge the norms since the last reading; ``step`` is the number of the last of them."""
        norms = self._unread[: self._count].tolist()
        self._count = 0
        self.latest = norms[-1] if norms else self.latest
        verdict = None
        for number, norm in enumerate(norms, step - len(norms) + 1):
            verdict = self._judge(number, norm) or verdict
        return verdict

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"logs": list(self._logs), "bad": list(self._bad), "streak": self.streak}

    def restore(self, state: Mapping[str, Any], *, forgive: bool = False) -> None:
        """Go on from what a checkpoint held; ``forgive`` leaves the count of steps without a gradient."""
        self._count = 0
        self._logs = deque(state.get("logs", ()), maxlen=REMEMBERED)
        self._bad = [] if forgive else list(state.get("bad", ()))
        self.streak = 0 if forgive else int(state.get("streak", 0))

    def _judge(self, step: int, norm: float) -> Verdict | None:
        if not math.isfinite(norm):
            return self._count_bad(step, norm)
        self.streak = 0
        log = math.log(max(norm, 1e-30))
        deviations = self._deviations(log)
        self._logs.append(log)
        if self.spikes == "off" or deviations <= SPIKE:
            return None
        usual = math.exp(statistics.median(self._logs))
        text = (
            f"gradient norm {norm:.4g} at step {step}, usual are {usual:.4g} "
            f"({deviations:.0f} deviations over the last {len(self._logs)} steps)"
        )
        if self.spikes == "rollback":
            return Verdict(step, norm, text)
        if step - self._warned >= QUIET:
            self._warned = step
            self.warn(text)
        return None

    def _count_bad(self, step: int, norm: float) -> Verdict | None:
        self.streak += 1
        self._bad = [number for number in self._bad if number > step - WITHIN] + [step]
        if self.streak >= STREAK:
            return Verdict(
                step, norm, f"no finite gradient in {self.streak} steps in a row up to step {step}"
            )
        if len(self._bad) >= MOST:
            return Verdict(
                step, norm, f"no finite gradient in {len(self._bad)} of {WITHIN} steps up to step {step}"
            )
        return None

    def _deviations(self, log: float) -> float:
        """How far a norm's logarithm lies above the median, in robust deviations; 0 with too few to tell."""
        if len(self._logs) < NEEDED:
            return 0.0
        middle = statistics.median(self._logs)
        spread = 1.4826 * statistics.median(abs(other - middle) for other in self._logs)
        return (log - middle) / max(spread, LEAST_DEVIATION)
