"""Several sources as one."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from beitctl.api import Example, Examples, Plugin, SourceField
from beitctl.data import labels
from beitctl.data.order import BLOCK, digest


class Mixture(Plugin):
    """Several sources as one, in proportion to their sizes or to weights.

    Without weights an epoch holds every example of all sources once. With weights every source has its own
    epochs, and comes in every 4,096 samples as often as its weight says. An example is named by the number of
    its source, from 0, and its name there: ``1/cat.jpg``.
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
        inner = [source for source in self.sources if isinstance(source, Mixture) and source.weights]
        if inner and not self.weights:
            raise ValueError("a mixture with weights is one of the sources; give all sources weights")
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
        self.parts = _parts(opened, weights)
        self.problems = [line for part in opened for line in getattr(part, "problems", [])]
        self.shards = () if weights else _shards(opened)
        self.lengths = _lengths(opened)
        self.state = digest(*(getattr(part, "state", "") for part in opened)).hex()
        self.window = min((w for part in opened if (w := getattr(part, "window", 0))), default=0)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        number, place = self._at(index)
        example = self.opened[number][place]
        return replace(example, id=f"{number}/{example.id}")

    def label(self, index: int) -> str | None:
        """Class of an example, without its picture where that is faster."""
        number, place = self._at(index)
        return labels.label(self.opened[number], place)

    def words(self, index: int) -> tuple[str, ...]:
        """Captions of an example, then its text, without its picture where that is faster."""
        number, place = self._at(index)
        return labels.words(self.opened[number], place)

    def _at(self, index: int) -> tuple[int, int]:
        """Number of the source, and place in it."""
        place = range(len(self))[index]
        number = bisect_right(self.ends, place)
        return number, place - (self.ends[number - 1] if number else 0)


def _parts(opened: Sequence[Examples], weights: Sequence[float]) -> list[tuple[float, Examples]]:
    """Sources with their weights, those inside a source that is a mixture itself in its place."""
    found: list[tuple[float, Examples]] = []
    for weight, examples in zip(weights, opened if weights else (), strict=True):
        inner = getattr(examples, "parts", None) or [(1.0, examples)]
        total = sum(share for share, _ in inner)
        found += [(weight * share / total, part) for share, part in inner]
    return found


def _shards(opened: Sequence[Examples]) -> tuple[int, ...]:
    """Shards of all sources; in one that has none every example is its own. Empty if no source has any."""
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
