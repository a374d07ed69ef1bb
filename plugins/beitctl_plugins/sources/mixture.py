"""Several sources as one."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from beitctl.api import Example, Examples, Plugin, SourceField
from beitctl.data.order import BLOCK, digest


class Mixture(Plugin):
    """Several sources as one, in proportion to their sizes or to weights.

    Without weights an epoch holds every example of all sources once. With weights every source has its own
    epochs, and comes in every 4,096 samples as often as its weight says.
    """

    sources: list[SourceField] = Field(min_length=1)
    """The sources."""
    weights: list[float] = Field([])
    """A weight for each of them; empty: each example counts alike."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(f"{len(self.weights)} weights for {len(self.sources)} sources; give each one")
        if self.weights and min(self.weights) * BLOCK < sum(self.weights):
            raise ValueError(f"every weight must be at least 1/{BLOCK} of their sum, found {self.weights}")
        return self

    def open(self) -> "Mixed":
        """Open all sources.

        Raises:
            DataError: one of them cannot be used.
        """
        return Mixed([source.open() for source in self.sources], self.weights)


class Mixed:
    """The examples of several sources, one source after the other."""

    def __init__(self, opened: Sequence[Examples], weights: Sequence[float] = ()) -> None:
        self.opened = tuple(opened)
        self.ends = list(accumulate(map(len, opened)))
        self.fingerprint = digest(*(part.fingerprint for part in opened), *map(str, weights)).hex()
        self.parts = list(zip(weights, opened, strict=True)) if weights else []
        self.problems = [line for part in opened for line in getattr(part, "problems", [])]
        self.shards = () if weights else _shards(opened)
        self.lengths = _lengths(opened)
        self.window = min((w for part in opened if (w := getattr(part, "window", 0))), default=0)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        place = range(len(self))[index]
        number = bisect_right(self.ends, place)
        return self.opened[number][place - (self.ends[number - 1] if number else 0)]


def _shards(opened: Sequence[Examples]) -> tuple[int, ...]:
    """Shards of all sources; in one that has none every example is its own. None if no source has any."""
    found: list[int] = []
    for part in opened:
        shards = getattr(part, "shards", ())
        found += shards if len(shards) else [1] * len(part)
    return tuple(found) if any(len(getattr(part, "shards", ())) for part in opened) else ()


def _lengths(opened: Sequence[Examples]) -> Any:
    """Lengths of all texts if all sources know theirs."""
    found = [getattr(part, "lengths", None) for part in opened]
    known = [lengths for lengths in found if lengths is not None]
    return np.concatenate(known) if len(known) == len(found) else None
