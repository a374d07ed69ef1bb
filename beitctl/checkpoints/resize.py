"""Position tables for another resolution: absolute positions and relative-position biases.

Letters: h, w rows and columns of the patch grid that a table was made for, h', w' of the new one; d channels;
H heads; s offsets along an axis. A grid is always (rows, columns); patches and offsets are stored row by row.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

Floats = NDArray[np.float64]
Grid = tuple[int, int]


def absolute(table: Tensor, source: Grid, target: Grid, leading: int) -> Tensor:
    """Resize a table of absolute positions: (leading + h*w, d) -> (leading + h'*w', d).

    Bicubic, corners not aligned, no antialiasing. The first ``leading`` rows (class token, unused rows) are
    kept bit for bit, and so is the dtype. With equal grids the very same tensor comes back.

    Raises:
        ValueError: A grid is below 1 x 1, or the rows of the table do not fit the source grid.

    Source: microsoft/unilm, beit/run_class_finetuning.py (BEiT-3 and VLMo load in the same way).
    """
    _check_rows(table, source, target, source[0] * source[1], leading)
    if source == target:
        return table
    kept = table[:leading]
    image = table[leading:].reshape(1, *source, -1).permute(0, 3, 1, 2)  # (1, d, h, w)
    image = F.interpolate(image, size=target, mode="bicubic", align_corners=False)  # (1, d, h', w')
    return torch.cat((kept, image[0].permute(1, 2, 0).flatten(0, 1)))


def relative(table: Tensor, source: Grid, target: Grid, trailing: int = 3) -> Tensor:
    """Resize a table of relative-position biases for a grid of another size.

    ((2h-1)(2w-1) + trailing, H) -> ((2h'-1)(2w'-1) + trailing, H). Every axis is treated by itself, so grids
    need not be square:

    - It grows: the biases are placed at ``geometric_coordinates``, and a cubic spline through them is read at
      the new offsets. Near offsets about keep their meaning, far ones are stretched. An offset beyond the
      outermost coordinate takes the value there. Fewer than four old offsets lower the degree of the spline.
    - It shrinks: the offsets that remain, the centre of the axis, are kept, so each means exactly what it
      meant. The official code has no sensible answer here: its ratio cannot fall below 1.01.
    - It stays: its coordinates are unchanged.

    The last ``trailing`` rows (those of the class token) are kept bit for bit. Computed in fp64 on the CPU,
    head by head and without gradients; the result is fp32, on the device of the table. With equal grids the
    very same tensor comes back.

    Raises:
        ValueError: A grid is below 1 x 1, or the rows of the table do not fit the source grid.

    Source: microsoft/unilm, beit/run_class_finetuning.py, the "geometric" interpolation; its ``interp2d`` is
    ``RectBivariateSpline`` in SciPy 1.14 and later.
    """
    before, after = _offsets(source), _offsets(target)
    _check_rows(table, source, target, before[0] * before[1], trailing)
    if source == target:
        return table
    on_grid = before[0] * before[1]
    biases, kept = table.detach()[:on_grid], table.detach()[on_grid:]
    values = biases.to("cpu", torch.float64).numpy().reshape(*before, -1)
    values = _resample(_centre(values, after), after)
    resized = torch.from_numpy(values.reshape(after[0] * after[1], -1)).to(table.device, torch.float32)
    return torch.cat((resized, kept.float()))


def geometric_ratio(source_offsets: int, target_offsets: int) -> float:
    """Ratio q for which 1 + q + q^2 + ... reaches the farthest new offset.

    The sum has one term per old offset on one side of the centre; a side of 14 patches has 27 offsets. Found
    by bisection on [1.01, 1.5] to a width of 1e-6 as in the official code: q never leaves these bounds.
    """
    terms, farthest = source_offsets // 2, target_offsets // 2
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**terms) / (1 - ratio) > farthest:
            high = ratio
        else:
            low = ratio
    return ratio


def geometric_coordinates(source_offsets: int, target_offsets: int) -> Floats:
    """Where the old offsets of a growing axis lie among the new ones: (s,).

    These are 0, +-1, +-(1 + q), +-(1 + q + q^2) and so on, in rising order.
    """
    ratio = geometric_ratio(source_offsets, target_offsets)
    side = np.cumsum(ratio ** np.arange(source_offsets // 2))
    return np.concatenate((-side[::-1], [0.0], side))


def _offsets(grid: Grid) -> Grid:
    """Number of offsets between two patches along each axis."""
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def _check_rows(table: Tensor, source: Grid, target: Grid, on_grid: int, others: int) -> None:
    for name, grid in (("source", source), ("target", target)):
        if min(grid) < 1:
            raise ValueError(f"{name} grid is {grid[0]} x {grid[1]}, each side must be at least 1 patch")
    if table.ndim != 2:
        raise ValueError(f"position table has shape {tuple(table.shape)}, expected two axes: (rows, values)")
    if len(table) != on_grid + others:
        raise ValueError(
            f"position table has {len(table)} rows, a source grid of {source[0]} x {source[1]} patches needs "
            f"{on_grid + others} ({on_grid} + {others} that are not on the grid): "
            "give the grid that the table was made for"
        )


def _whole(offsets: int) -> Floats:
    return np.arange(offsets, dtype=np.float64) - offsets // 2


def _centre(values: Floats, after: Grid) -> Floats:
    """The offsets that are left of the axes that shrink."""
    rows, columns = (max(0, (old - new) // 2) for old, new in zip(values.shape[:2], after, strict=True))
    return values[rows : values.shape[0] - rows, columns : values.shape[1] - columns]


def _resample(values: Floats, after: Grid) -> Floats:
    """Grow (rows, columns, H) to the offsets ``after``; no axis of the values is longer than that."""
    if values.shape[:2] == after:
        return values
    places = []
    for axis, new in enumerate(after):
        old = values.shape[axis]
        places.append(_whole(old) if old == new else geometric_coordinates(old, new))
        if old == 1:  # a spline needs two points: the only bias holds at every offset
            values, places[axis] = values.repeat(2, axis), np.array([0.0, 1.0])
    degrees = {f"k{name}": min(3, len(place) - 1) for name, place in zip("xy", places, strict=True)}
    heads = [
        RectBivariateSpline(*places, values[:, :, head], **degrees)(_whole(after[0]), _whole(after[1]))
        for head in range(values.shape[2])
    ]
    return np.stack(heads, axis=-1)
