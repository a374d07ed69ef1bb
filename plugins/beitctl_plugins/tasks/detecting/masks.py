"""Masks of objects as COCO writes them, to pixels and back.

A run-length encoding has the lengths of the runs of 0 and 1 in turn, down each column, 0 first; ``counts`` is
a list of them, or text in which every length takes some characters of 6 bits (COCO's ``maskApi.c``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beitctl_plugins.tasks.detecting.polygons import filled

Bits = NDArray[np.bool_]


def decoded(mask: Any, height: int, width: int) -> Bits:
    """(height, width) pixels of a mask: a list of polygons, or a run-length encoding.

    Raises:
        TypeError: it is neither.
        ValueError: it has another size, or cannot be read.
    """
    if isinstance(mask, Mapping):
        return _from_runs(mask, height, width)
    if isinstance(mask, Sequence) and not isinstance(mask, str | bytes):
        return _from_polygons(mask, height, width)
    raise TypeError(f"a mask is a list of polygons or a run-length encoding, not {type(mask).__name__}")


def _from_polygons(polygons: Sequence[Any], height: int, width: int) -> Bits:
    found = np.zeros((height, width), bool)
    for polygon in polygons:
        points = np.asarray(polygon, np.float64).ravel()
        if len(points) < 6 or len(points) % 2 or not np.isfinite(points).all():
            raise ValueError(f"a polygon has an x and a y of three points or more, not {len(points)} numbers")
        found |= filled(points.reshape(-1, 2), height, width)
    return found


def _from_runs(mask: Mapping[str, Any], height: int, width: int) -> Bits:
    size, counts = list(mask.get("size", ())), mask.get("counts")
    if size != [height, width]:
        raise ValueError(f"it is of the size {size}, the picture [{height}, {width}]")
    if isinstance(counts, str | bytes):
        counts = lengths_in(counts)
    if not isinstance(counts, Sequence):
        raise TypeError("it has no run lengths")
    runs = np.asarray(counts, np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its run lengths add up to {runs.sum()}, not to {height * width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def encoded(mask: Bits) -> dict[str, Any]:
    """A mask (H, W) as a compressed run-length encoding: ``size`` and ``counts``, as of COCO's results."""
    flat = np.asarray(mask, bool).T.ravel()
    ends = np.concatenate([np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    runs = np.diff(ends, prepend=0).tolist()
    return {"size": list(mask.shape), "counts": text_of([0, *runs] if flat.size and flat[0] else runs)}


def text_of(lengths: Sequence[int]) -> str:
    """Run lengths as text: from the fourth on, each as what it is more than the one two before it."""
    found = []
    for place, length in enumerate(lengths):
        value = length - lengths[place - 2] if place > 2 else length
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            found.append(chr((bits | (32 if more else 0)) + 48))
    return "".join(found)


def lengths_in(text: str | bytes) -> list[int]:
    """The way back of ``text_of``.

    Raises:
        ValueError: the text is none of this kind.
    """
    found: list[int] = []
    value = shift = 0
    for letter in text if isinstance(text, bytes) else text.encode("ascii", "replace"):
        bits = letter - 48
        if not 0 <= bits < 64:
            raise ValueError("its compressed text has letters that it cannot have")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("its compressed text ends too early")
    return found
