"""Polygons to pixels, to the pixel as COCO's ``maskApi.c`` (``rleFrPoly``) does it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FINER = 5
"""Corners are rounded to a fifth of a pixel."""


def filled(points: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) pixels of one polygon, (k, 2) x and y of its corners."""
    u, v = _outline(np.trunc(FINER * points + 0.5).astype(np.int64))
    there = np.flatnonzero(u[1:] != u[:-1]) + 1
    column = (np.minimum(u[there], u[there - 1]) + 0.5) / FINER - 0.5
    row = (np.minimum(v[there], v[there - 1]) + 0.5) / FINER - 0.5
    whole = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    found = np.zeros((height, width), np.bool_)
    if not whole.any():
        return found
    columns = column[whole].astype(np.int64)
    rows = np.ceil(row[whole].clip(0, height)).astype(np.int64)
    first, last = int(columns.min()), int(columns.max())
    size = (last - first + 1) * height
    crossings = np.bincount((columns - first) * height + rows, minlength=size + 1)[:size]
    found[:, first : last + 1] = (crossings.cumsum() % 2).reshape(-1, height).T
    return found


def _outline(corners: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Points, x and y, all along the sides of a polygon (k, 2), without gaps."""
    after = np.roll(corners, -1, axis=0)
    length = np.abs(after - corners)
    flat = length[:, 0] >= length[:, 1]
    along: Any = np.where(flat, 0, 1)
    one = np.arange(len(corners))
    back = corners[one, along] > after[one, along]
    first, last = np.where(back[:, None], after, corners), np.where(back[:, None], corners, after)
    steps = length[one, along]
    slope = (last - first)[one, 1 - along] / np.maximum(steps, 1)
    side = np.repeat(one, steps + 1)
    count = np.arange(len(side)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    step = np.where(back[side], steps[side] - count, count)
    straight = first[side, along[side]] + step
    across = np.trunc(first[side, 1 - along[side]] + slope[side] * step + 0.5).astype(np.int64)
    return np.where(flat[side], straight, across), np.where(flat[side], across, straight)
