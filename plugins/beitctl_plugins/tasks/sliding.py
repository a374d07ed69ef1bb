"""Class probabilities of whole pictures by a model that reads squares: windows, sizes, flips.

Source: BEiT's segmentation code (mmsegmentation 0.11, mode ``slide``; sizes as of its ``SETR_Resize``).
Letters: V classes, H x W pixels, S side of a window.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from beitctl_plugins.tasks.dense_views import bilinear

AT_ONCE = 8
"""Windows in one forward pass."""
STRIP = 2**25
"""Numbers that are resized at a time: 128 MiB."""

Answer = Callable[[Tensor], Tensor]
"""Windows (n, 3, S, S) uint8 to logits (n, V, S, S)."""


@dataclass(frozen=True)
class Windows:
    """How a picture is looked at."""

    side: int
    stride: int
    """From one window to the next, in pixels; the last one ends where the picture does."""
    short_px: int
    """What the shorter side is resized to, before ``scales``."""
    scales: Sequence[float] = (1.0,)
    """Sizes by which answers are averaged; none makes a side shorter than a window."""
    flip: bool = False
    """Whether the mirrored picture is asked too."""

    def sizes(self, height: int, width: int) -> Counter[tuple[int, int]]:
        """Heights and widths at which the picture is seen, and how often each counts."""
        found: Counter[tuple[int, int]] = Counter()
        for scale in self.scales:
            factor = max(self.side, int(self.short_px * scale)) / min(height, width)
            tall, wide = (max(self.side, round(length * factor)) for length in (height, width))
            found[tall, wide] += 1
        return found


def probabilities(
    answer: Answer, pixels: NDArray[np.uint8], windows: Windows, device: torch.device
) -> Tensor:
    """Mean softmax (V, H, W) over sizes and flips of a picture (H, W, 3), at its own size."""
    height, width = pixels.shape[:2]
    total: Tensor | None = None
    turns = (False, True) if windows.flip else (False,)
    for (tall, wide), times in windows.sizes(height, width).items():
        seen = torch.from_numpy(bilinear(pixels, wide, tall).transpose(2, 0, 1)).to(device)
        for turned in turns:
            logits = _slid(answer, seen.flip(2) if turned else seen, windows)
            logits = logits.flip(2) if turned else logits
            if total is None:
                total = logits.new_zeros(len(logits), height, width)
            for rows, strip in _upsampled(logits, height, width):
                total[:, rows] += strip.softmax(0) * times
    assert total is not None
    return total / (len(windows.scales) * len(turns))


def _slid(answer: Answer, picture: Tensor, windows: Windows) -> Tensor:
    """Mean logits (V, h, w) of all windows of a picture (3, h, w) that see a pixel."""
    side = windows.side
    places = [
        (top, left)
        for top in _starts(picture.shape[1], side, windows.stride)
        for left in _starts(picture.shape[2], side, windows.stride)
    ]
    total: Tensor | None = None
    seen = torch.zeros(picture.shape[1:], device=picture.device)
    for first in range(0, len(places), AT_ONCE):
        some = places[first : first + AT_ONCE]
        found = answer(torch.stack([picture[:, y : y + side, x : x + side] for y, x in some]))
        if total is None:
            total = found.new_zeros(found.shape[1], *picture.shape[1:])
        for (top, left), logits in zip(some, found, strict=True):
            total[:, top : top + side, left : left + side] += logits
            seen[top : top + side, left : left + side] += 1
    assert total is not None
    return total / seen


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin along a side."""
    count = -(-max(length - side, 0) // stride) + 1
    return [min(number * stride, length - side) for number in range(count)]


def _upsampled(logits: Tensor, height: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Logits (V, h, w) resized to (V, height, width), bilinear, some rows at a time.

    The rows are those of ``F.interpolate`` without aligned corners; together they would fill the memory.
    """
    wide = F.interpolate(logits[None], (logits.shape[1], width), mode="bilinear", align_corners=False)[0]
    rows = max(1, STRIP // (wide.shape[0] * width))
    last = wide.shape[1] - 1
    for top in range(0, height, rows):
        numbers = torch.arange(top, min(top + rows, height), device=wide.device, dtype=torch.float32)
        places = ((numbers + 0.5) * (wide.shape[1] / height) - 0.5).clamp(min=0)
        lower = places.floor().long().clamp(max=last)
        upper = (lower + 1).clamp(max=last)
        share = (places - lower)[:, None]
        strip = torch.lerp(wide[:, lower], wide[:, upper], share.expand(-1, width))
        yield slice(top, top + len(numbers)), strip
