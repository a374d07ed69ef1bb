"""Retrieval as ranks: which captions and pictures belong together, and how high the first right one stands.

Tables of scores exist in pieces only, so that the 5,000 x 25,000 of COCO need little memory.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beitctl.errors import DivergedError

Ints = NDArray[np.int64]
Scores = Callable[[Ints], Tensor]
"""(q,) numbers of queries to (q, m) scores of all items."""
CHUNK = 256
"""Queries whose scores are in memory at once."""
DEPTHS = (1, 5, 10)


@dataclass(frozen=True)
class Matches:
    """Which of M captions belong to which of n pictures."""

    owners: Ints
    """(M,) number of the picture that each caption was given to, rising."""
    groups: Ints
    """(M,) number of the caption among those that differ."""
    first: Ints
    """(U,) the first caption of each group."""
    pictures: int
    duplicates: bool
    """Whether a picture that was given an equal caption is right too."""

    @classmethod
    def of(cls, captions: Sequence[Sequence[Hashable]], duplicates: bool) -> "Matches":
        """From the captions of every picture."""
        numbers: dict[Hashable, int] = {}
        groups = [numbers.setdefault(caption, len(numbers)) for own in captions for caption in own]
        owners = np.repeat(np.arange(len(captions)), [len(own) for own in captions]).astype(np.int64)
        found = np.array(groups, np.int64)
        _, first = np.unique(found, return_index=True)
        return cls(owners, found, first.astype(np.int64), len(captions), duplicates)

    def _pairs(self) -> tuple[Ints, Ints]:
        """Pictures and groups that belong together, once each."""
        both = np.unique(self.owners * len(self.first) + self.groups)
        return both // len(self.first), both % len(self.first)

    def texts_right(self) -> tuple[Ints, Ints]:
        """Pairs of a picture and a right caption, of equal captions the first; sorted by picture."""
        if not self.duplicates:
            return self.owners, np.arange(len(self.owners))
        pictures, groups = self._pairs()
        return pictures, self.first[groups]

    def pictures_right(self, groups: bool) -> tuple[Ints, Ints]:
        """Pairs of a caption, or of a group of equal ones, and a right picture; sorted by the former."""
        if not groups:
            return np.arange(len(self.owners)), self.owners
        pictures, found = self._pairs()
        order = np.argsort(found, kind="stable")
        return found[order], pictures[order]

    def counts(self) -> tuple[Ints, Ints]:
        """How many captions are right for each picture (n,), and pictures for each caption (M,)."""
        if not self.duplicates:
            return np.bincount(self.owners, minlength=self.pictures), np.ones(len(self.owners), np.int64)
        pictures, groups = self._pairs()
        members = np.bincount(self.groups)
        texts = np.bincount(pictures, weights=members[groups], minlength=self.pictures)
        return texts.astype(np.int64), np.bincount(groups)[self.groups]

    def ranks(self, of_pictures: Scores, of_captions: Scores) -> tuple[Ints, Ints]:
        """How many captions stand above the first right one, for each picture; and the other way round.

        Equal captions must have equal scores.

        Args:
            of_pictures: numbers of pictures to their scores with all captions (q, M).
            of_captions: numbers of captions to their scores with all pictures (q, n); equal captions are
                asked for once where a picture with an equal caption is right.

        Returns:
            (n,) for pictures, and (M,) for captions.

        Raises:
            DivergedError: a score is not a number.
        """
        queries = np.arange(self.pictures)
        texts = first_right(of_pictures, queries, self.texts_right())
        if not self.duplicates:
            asked = np.arange(len(self.owners))
            return texts, first_right(of_captions, asked, self.pictures_right(groups=False))
        by_group = first_right(of_captions, self.first, self.pictures_right(groups=True))
        return texts, by_group[self.groups]

    def by_vectors(self, pictures: Tensor, texts: Tensor) -> tuple[Ints, Ints]:
        """Ranks by the dot products of vectors (n, d) and (M, d).

        Equal captions get one vector, so that rounding does not decide between them.
        """
        one, groups = texts[torch.from_numpy(self.first)], torch.from_numpy(self.groups)
        return self.ranks(
            lambda asked: (pictures[asked] @ one.T)[:, groups],
            lambda asked: one[groups[asked]] @ pictures.T,
        )


def first_right(scores: Scores, queries: Ints, right: tuple[Ints, Ints]) -> Ints:
    """(q,) how many items stand above the first right one of each query; of equal scores the earlier wins.

    Args:
        scores: numbers of queries to their scores with all items.
        queries: the numbers that it is asked for.
        right: pairs of a place in ``queries`` and a right item, sorted by the place.

    Raises:
        DivergedError: a score is not a number, which would stand nowhere.
    """
    found = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), CHUNK):
        table = scores(queries[start : start + CHUNK])
        if table.isnan().any():
            raise DivergedError("retrieval: scores are not numbers; the model diverged")
        low, high = np.searchsorted(right[0], [start, start + CHUNK])
        row, item = (torch.from_numpy(part[low:high].astype(np.int64)) for part in right)
        row = row - start
        values = table[row, item]
        best = table.new_full((len(table),), -torch.inf).scatter_reduce(0, row, values, "amax")
        same = values == best[row]
        items = table.shape[1]
        place = torch.full((len(table),), items).scatter_reduce(0, row[same], item[same], "amin")
        above = (table > best[:, None]).sum(1)
        tied_row, tied_item = (table == best[:, None]).nonzero(as_tuple=True)
        earlier = tied_row[tied_item < place[tied_row]]
        above += torch.bincount(earlier, minlength=len(table))
        found[start : start + CHUNK] = above.numpy()
    return found


def recalls(ranks: tuple[Ints, Ints], matches: Matches) -> dict[str, float]:
    """Recall at 1, 5 and 10 of both ways, the share of queries of which a right item is among so many.

    ``recall@1`` is the mean of both ways, ``mean_recall`` that of all six (BEiT-3's code chooses models
    by it), ``chance_r1`` and ``chance_r5`` are the means of both ways for a random order.
    """
    ways = {"i2t": ranks[0], "t2i": ranks[1]}
    six = {f"{way}_r{k}": float((found < k).mean()) for way, found in ways.items() for k in DEPTHS}
    good, sizes = matches.counts(), (len(matches.owners), matches.pictures)
    by_chance = {
        f"chance_r{k}": float(np.mean([chance(*way, k).mean() for way in zip(good, sizes, strict=True)]))
        for k in (1, 5)
    }
    return {
        "recall@1": (six["i2t_r1"] + six["t2i_r1"]) / 2,
        **six,
        "mean_recall": sum(six.values()) / len(six),
        **by_chance,
        "examples": float(matches.pictures),
        "captions": float(len(matches.owners)),
    }


def chance(good: NDArray[Any], total: int, k: int) -> NDArray[np.float64]:
    """(q,) probability that a right item is among the first k of a random order.

    Args:
        good: (q,) how many items are right.
        total: how many there are.
        k: how many are looked at.
    """
    missed = np.ones(len(good))
    for drawn in range(min(k, total)):
        missed *= np.maximum(0, total - good - drawn) / (total - drawn)
    return 1 - missed
