"""The guard against tokenizers that cannot become any good: teachers that say nothing, codebooks that die."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from beitctl.errors import DataError, DivergedError

SAME = 0.02
"""Features count as one group within this share of their mean squared distance."""
CONSTANT = 1e-6
"""Share of the features' squared length below which their spread is rounding."""
NARROW = 0.003
"""Spread of the encoder's vectors (1 - squared length of their mean) below which all point one way."""
PATIENCE = 3
"""Windows in a row that must be bad."""


@dataclass(frozen=True)
class Variety:
    """How much a teacher tells apart, on a sample of patches."""

    mean: Tensor
    """(F,) mean feature."""
    groups: int
    """Groups of features that are alike."""
    patches: int
    """Patches of the sample."""


def variety(features: Tensor) -> Variety:
    """Mean and number of groups of a sample of features (n, F).

    Raises:
        DataError: a value is not finite, or all features are equal.
    """
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features).all(-1)).sum())
        raise DataError(
            f"the teacher's features are not finite for {bad} of {len(features)} patches: its weights are "
            "broken or do not belong to the model; check weights, or take another stage"
        )
    mean = features.mean(0)
    spread = (features - mean).square().sum(-1).mean()
    if float(spread) <= CONSTANT * float(features.square().sum(-1).mean()):
        raise DataError(
            f"the teacher gives the same feature for all of {len(features)} patches: there is nothing to "
            "learn. Take another stage or model, and check that its weights are loaded"
        )
    return Variety(mean, _groups(features, 2 * SAME * float(spread)), len(features))


def _groups(features: Tensor, radius: float) -> int:
    """Number of balls of a squared radius that it takes, greedily, to hold all features."""
    left, found = features, 0
    while len(left):
        left = left[(left - left[0]).square().sum(-1) > radius]
        found += 1
    return found


def check_teacher(found: Variety, codes: int, least: float) -> None:
    """Refuse a teacher that tells apart too little for a codebook.

    Args:
        found: of ``variety``.
        codes: size of the codebook.
        least: share of the codes that must be in use (``min_used_share``).

    Raises:
        DataError: it does.
    """
    wanted = math.ceil(least * min(codes, found.patches))
    if found.groups < wanted:
        raise DataError(
            f"the teacher tells apart only {found.groups} kinds of patch among {found.patches}: no more than "
            f"{found.groups} of {codes} codes could mean anything, and min_used_share = {least} asks for "
            f"{wanted}. Take an earlier stage or another model, check that its weights are loaded, or lower "
            "min_used_share"
        )


def spread_of(vectors: Tensor) -> float:
    """1 - squared length of the mean of unit vectors (n, D): 1 where they point everywhere, 0 one way."""
    return 1 - float(vectors.mean(0).square().sum()) if len(vectors) else 1.0


@dataclass
class CollapseGuard:
    """Watches the codebook's use, window by window of training."""

    codes: int
    least: float
    """Share of the codes that must be used in a window; 0 switches the guard off."""
    _bad: list[str] = field(default_factory=list)

    def check(self, step: int, window: Tensor, vectors: Tensor) -> None:
        """Look at one window.

        Args:
            step: number of the step.
            window: (K,) uses of every code since the last look.
            vectors: (n, D) recent vectors of the encoder.

        Raises:
            DivergedError: the codebook is of no use for several windows in a row.
        """
        if not self.least:
            return
        used, uses = int((window > 0).sum()), int(window.sum())
        wanted, spread = self.least * min(self.codes, uses), spread_of(vectors)
        if used < wanted:
            self._bad.append(f"{used} of {self.codes} codes were used, min_used_share asks for {wanted:.0f}")
        elif spread < NARROW:
            self._bad.append(
                f"the encoder's vectors all point the same way (spread {spread:.4f}, at least {NARROW}), so "
                "that codes differ by noise alone"
            )
        else:
            self._bad.clear()
        if len(self._bad) >= PATIENCE:
            raise DivergedError(
                f"the codebook collapsed: at step {step}, for {PATIENCE} windows in a row, {self._bad[-1]}. "
                + _advice(spread)
            )


def _advice(spread: float) -> str:
    drift = spread < 10 * NARROW
    first = (
        'The vectors drifted together: set preset = "small", centre = true, a longer start_after, or a '
        "lower peak_lr"
        if drift
        else "The encoder's vectors differ, but codes do not reach them: set revive_after (100; less for "
        'short runs), preset = "small", fewer codes, or more samples a step'
    )
    return first + ". Nothing was lost: the last checkpoint is in the run folder"


def few_rows(features: Tensor, each: int = 4) -> Tensor:
    """Some patches of every picture, evenly spread: (B * each, F) of (B, N, F)."""
    places = torch.linspace(0, features.shape[1] - 1, min(each, features.shape[1])).long()
    return features[:, places].flatten(0, 1)
