"""Where every token of a mixed batch lies; pure NumPy, made on the host.

The residual stream of a batch is one buffer X of shape [T, d], modality-major, in four contiguous segments:

    rows   [ A: images | B: pictures of pairs | C: texts of pairs | D: texts ]
    cuts   0           b0                     nv                 b1          T

Vision experts read rows [0, nv), language experts [nv, T), vision-language experts [b0, b1): plain slices.
Attention reads sequences instead: images, then pairs (picture, then text), then texts.

Fillers are rows at the ends of C and D that mean nothing: with them both segments have a multiple of so many
rows, so that a compiled block and a GPU see few shapes. They are sequences of their own, behind those of
their segment, and no target ever names them.

Letters: P tokens of a picture (class token + patches), S sequences, M longest sequence, T rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Counts and lengths of a batch, and every index that follows from them."""

    picture_tokens: int
    """P: tokens of one picture: class token (DeiT: and distillation token), then patches."""
    images: int
    """Pictures without text."""
    pair_lengths: tuple[int, ...] = ()
    """Text tokens of each pair."""
    text_lengths: tuple[int, ...] = ()
    """Tokens of each text without a picture."""
    causal_text: bool = False
    """Captioning: in pairs, text sees the picture and earlier text, the picture sees no text."""
    fillers: tuple[int, int] | None = None
    """Filler rows at the ends of C and D."""

    @property
    def pairs(self) -> int:
        """Number of picture-text pairs."""
        return len(self.pair_lengths)

    @property
    def pictures(self) -> int:
        """Pictures of both kinds, images first: the order of the pixel tensor."""
        return self.images + self.pairs

    @property
    def sequences(self) -> int:
        """Number S of sequences, those of fillers included."""
        return self.images + self.pairs + len(self.text_lengths) + len(self.fillers or ())

    @cached_property
    def cuts(self) -> tuple[int, int, int, int]:
        """Ends b0, nv, b1, T of the four segments."""
        after_pairs, after_texts = self.fillers or (0, 0)
        b0 = self.images * self.picture_tokens
        nv = b0 + self.pairs * self.picture_tokens
        b1 = nv + sum(self.pair_lengths) + after_pairs
        return b0, nv, b1, b1 + sum(self.text_lengths) + after_texts

    @property
    def tokens(self) -> int:
        """Number T of rows."""
        return self.cuts[3]

    @property
    def real_tokens(self) -> int:
        """Rows that are no filler."""
        return self.tokens - sum(self.fillers or ())

    @property
    def _filled(self) -> tuple[list[int], list[int]]:
        """Sequences of fillers, by their length, behind the pairs and behind the texts."""
        return ([], []) if self.fillers is None else ([self.fillers[0]], [self.fillers[1]])

    @cached_property
    def lengths(self) -> Ints:
        """(S,) tokens of every sequence."""
        picture = self.picture_tokens
        pairs = [picture + length for length in self.pair_lengths]
        behind_pairs, behind_texts = self._filled
        found = [picture] * self.images + pairs + behind_pairs + list(self.text_lengths) + behind_texts
        return np.array(found, dtype=np.int64)

    @cached_property
    def cu_seqlens(self) -> Ints:
        """(S + 1,) start of every sequence in sequence-major order, and T."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @cached_property
    def text_starts(self) -> Ints:
        """Row where each text begins: those of pairs, then those alone."""
        of_pairs, alone = (np.array(n, dtype=np.int64) for n in (self.pair_lengths, self.text_lengths))
        starts = self.cuts[1] + np.cumsum(of_pairs) - of_pairs, self.cuts[2] + np.cumsum(alone) - alone
        return np.concatenate(starts)

    @cached_property
    def text_positions(self) -> Ints:
        """(rows of C and D,) position of each text token in its own text, from 0; 0 of fillers."""
        parts = [[np.arange(n) for n in lengths] for lengths in (self.pair_lengths, self.text_lengths)]
        behind = [[np.zeros(n, np.int64) for n in lengths] for lengths in self._filled]
        return np.concatenate([np.zeros(0, np.int64), *parts[0], *behind[0], *parts[1], *behind[1]])

    @cached_property
    def perm(self) -> Ints:
        """(T,) modality-major row of every token in sequence-major order."""
        b0, nv, _, total = self.cuts
        picture = self.picture_tokens
        parts = [np.arange(b0)]
        for pair, length in enumerate(self.pair_lengths):
            start = self.text_starts[pair]
            parts += [b0 + pair * picture + np.arange(picture), start + np.arange(length)]
        parts.append(np.arange(nv + sum(self.pair_lengths), total))
        return np.concatenate(parts).astype(np.int64)

    @property
    def in_order(self) -> bool:
        """Whether rows lie in the order of their sequences: where there are no pairs."""
        return not self.pairs

    @cached_property
    def row_sequence(self) -> Ints:
        """(T,) sequence that every row belongs to."""
        found = np.empty(self.tokens, dtype=np.int64)
        found[self.perm] = np.repeat(np.arange(self.sequences), self.lengths)
        return found

    @cached_property
    def grids(self) -> list[tuple[str, Ints]]:
        """Rows to padded grids, one (S, M) for each kind: image, pair, text; -1 at padding.

        One grid for all would pad every sequence to the longest pair.
        """
        behind = len(self.fillers or ()) // 2
        counts = [self.images, self.pairs, behind, len(self.text_lengths), behind]
        firsts = np.cumsum([0, *counts])
        grids = []
        for kind, first, count in zip(
            ("image", "pair", "text", "text", "text"), firsts, counts, strict=False
        ):
            lengths = self.lengths[first : first + count]
            grid = np.full((len(lengths), int(lengths.max(initial=0))), -1, dtype=np.int64)
            filled = np.arange(grid.shape[1])[None, :] < lengths[:, None]
            grid[filled] = self.perm[self.cu_seqlens[first] : self.cu_seqlens[first + count]]
            if count:
                grids.append((kind, grid))
        return grids

    @cached_property
    def slots(self) -> Ints:
        """(T,) place of each row in the grids, flattened one after the other."""
        flat = np.concatenate([np.zeros(0, np.int64), *(grid.ravel() for _, grid in self.grids)])
        slots = np.empty(self.tokens, dtype=np.int64)
        slots[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
        return slots

    def image_rows(self, first: int, count: int) -> Ints:
        """(count, P) rows of pictures ``first``.. in the order of the pixel tensor."""
        starts = (first + np.arange(count)) * self.picture_tokens
        return starts[:, None] + np.arange(self.picture_tokens)[None, :]


def plan_of(picture_tokens: int, images: int, pairs: Sequence[int], texts: Sequence[int]) -> BatchPlan:
    """A plan from plain counts and lengths."""
    return BatchPlan(picture_tokens, images, tuple(map(int, pairs)), tuple(map(int, texts)))


def with_fillers(plan: BatchPlan, multiple: int) -> BatchPlan:
    """The plan with fillers that give C and D a multiple of so many rows, and at least two fillers each.

    Two, because the compiler treats sizes 0 and 1 apart.
    """
    sizes = sum(plan.pair_lengths), sum(plan.text_lengths)
    after_pairs, after_texts = (-(-(size + 2) // multiple) * multiple - size for size in sizes)
    return replace(plan, fillers=(after_pairs, after_texts))
