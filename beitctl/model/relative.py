"""Relative positions: a learned bias of the attention logits for every offset between two tokens.

Pictures as in BEiT (arXiv:2106.08254), texts and pairs as in VLMo's code. The rows of a table are

    [ (2h-1)(2w-1) offsets of patches | class token: as query, as key, to itself ]
    [ text to picture | picture to text ]                                             with a language branch
    [ 2L - 3 offsets of text tokens | first token: as query, as key, to itself ]      with a language branch

Letters: h, w patches along the sides, L longest text, P tokens of a picture, M tokens of a sequence, H heads.
"""

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.config import ModelConfig

if TYPE_CHECKING:
    from beitctl.model.attention import Layout

Ints = NDArray[np.int64]
SPECIAL = 3
"""Rows of the class token, or of a text's first token: as query, as key, to itself."""
CROSS = 2
"""Rows between the modalities."""


def picture_rows(grid: tuple[int, int]) -> int:
    """Rows of a table that belong to pictures."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + SPECIAL


def table_rows(config: ModelConfig) -> int:
    """Rows of a table: 732 for a grid of 14 x 14 without text."""
    text = CROSS + 2 * config.text_tokens if config.vocabulary else 0
    return picture_rows(config.grid) + text


@cache
def picture_index(grid: tuple[int, int]) -> Ints:
    """(P, P) row of the table for every pair of a picture's tokens."""
    h, w = grid
    y, x = (axis.ravel() for axis in np.mgrid[:h, :w])
    patches = (y[:, None] - y[None, :] + h - 1) * (2 * w - 1) + (x[:, None] - x[None, :] + w - 1)
    return _with_first(patches, picture_rows(grid))


def text_index(length: int, config: ModelConfig) -> Ints:
    """(length, length) row of the table for every pair of a text's tokens."""
    at = np.arange(max(0, length - 1))
    first_row = picture_rows(config.grid) + CROSS
    offsets = at[None, :] - at[:, None] + (config.text_tokens - 2) + first_row
    return _with_first(offsets, table_rows(config))[:length, :length]


def pair_index(length: int, config: ModelConfig) -> Ints:
    """(P + length, P + length) rows for a picture followed by its text."""
    pictures, texts = picture_index(config.grid), text_index(length, config)
    cross = picture_rows(config.grid)
    to_text = np.full((len(pictures), length), cross + 1)
    to_picture = np.full((length, len(pictures)), cross)
    return np.block([[pictures, to_text], [to_picture, texts]])


def _with_first(index: Ints, end: int) -> Ints:
    """The index with a first token before it, whose rows are the last three before ``end``."""
    found = np.empty((len(index) + 1, len(index) + 1), np.int64)
    found[1:, 1:] = index
    found[0, :], found[:, 0], found[0, 0] = end - 3, end - 2, end - 1
    return found


class RelativeBias(nn.Module):
    """One table of biases, (rows, H)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(table_rows(config), config.heads))

    def forward(self, layout: "Layout") -> list[Tensor]:
        """Biases (H, M, M) of every grid of a layout; without a sequence the table, (H, rows, 1)."""
        found = [
            F.embedding(grid.relative, self.table).permute(2, 0, 1)
            for grid in layout.grids
            if grid.relative is not None
        ]
        return found or [self.table.T[:, :, None]]
