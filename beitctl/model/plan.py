"""Where every token of a mixed batch lies; pure NumPy, made on the host.

The residual stream of a batch is one buffer X of shape [T, d], modality-major, in four contiguous segments:

    rows   [ A: images | B: pictures of pairs | C: texts of pairs | D: texts ]
    cuts   0           b0                     nv                 b1          T

Vision experts read rows [0, nv), language experts [nv, T), vision-language experts [b0, b1): plain slices.
Attention reads sequences instead: images, then pairs (picture, then text), then texts.

Letters: P tokens of a picture (class token + patches), S sequences, M longest sequence, T rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
        """Number S of sequences."""
        return self.images + self.pairs + len(self.text_lengths)

    @cached_property
    def cuts(self) -> tuple[int, int, int, int]:
        """Ends b0, nv, b1, T of the four segments."""
        b0 = self.images * self.picture_tokens
        nv = b0 + self.pairs * self.picture_tokens
        b1 = nv + sum(self.pair_lengths)
        return b0, nv, b1, b1 + sum(self.text_lengths)

    @property
    def tokens(self) -> int:
        """Number T of rows."""
        return self.cuts[3]

    @cached_property
    def lengths(self) -> Ints:
        """(S,) tokens of every sequence."""
        picture = self.picture_tokens
        pairs = [picture + length for length in self.pair_lengths]
        return np.array([picture] * self.images + pairs + list(self.text_lengths), dtype=np.int64)

    @cached_property
    def cu_seqlens(self) -> Ints:
        """(S + 1,) start of every sequence in sequence-major order, and T."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])

    @cached_property
    def text_starts(self) -> Ints:
        """Row where each text begins: those of pairs, then those alone."""
        lengths = np.array(self.pair_lengths + self.text_lengths, dtype=np.int64)
        return self.cuts[1] + np.cumsum(lengths) - lengths

    @cached_property
    def text_positions(self) -> Ints:
        """(rows of C and D,) position of each text token in its own text, from 0."""
        lengths = self.pair_lengths + self.text_lengths
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in lengths)])

    @cached_property
    def perm(self) -> Ints:
        """(T,) modality-major row of every token in sequence-major order."""
        b0, _, b1, total = self.cuts
        picture = self.picture_tokens
        parts = [np.arange(b0)]
        for pair, length in enumerate(self.pair_lengths):
            start = self.text_starts[pair]
            parts += [b0 + pair * picture + np.arange(picture), start + np.arange(length)]
        parts.append(np.arange(b1, total))
        return np.concatenate(parts).astype(np.int64)

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
        ends = np.cumsum([self.images, self.pairs, len(self.text_lengths)])
        grids = []
        for kind, first, last in zip(("image", "pair", "text"), [0, *ends[:-1]], ends, strict=True):
            lengths = self.lengths[first:last]
            grid = np.full((len(lengths), int(lengths.max(initial=0))), -1, dtype=np.int64)
            filled = np.arange(grid.shape[1])[None, :] < lengths[:, None]
            grid[filled] = self.perm[self.cu_seqlens[first] : self.cu_seqlens[last]]
            if len(lengths):
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
