"""A picture together with the class of every pixel: reading, and the views that training sees.

Source of the training views: BEiT's segmentation code, which is mmsegmentation 0.11: random resize, random
crop, flip, photometric distortion.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from beitctl.data.images import FAULTS
from beitctl.engine.learner import PIXELS
from beitctl.errors import DataError

IGNORED = -1
"""Class of pixels that count nowhere."""
MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
"""Pillow's names of pictures with one number a pixel."""
TRIES = 10
"""Crops that are drawn until one is not nearly all of one class."""
LONGEST = 4
"""Times the target of the shorter side: what the longer side may become in training, 2048 of 512."""
BRIGHTNESS, FACTORS, HUE_DEGREES = 32, (0.5, 1.5), 36
"""Photometric distortion: +-32 of 255; contrast and saturation times 0.5 to 1.5; hue +-36 degrees."""

Pixels = NDArray[np.uint8]
Classes = NDArray[np.int16]


@dataclass(frozen=True)
class Numbers:
    """What the grey values of a picture of classes mean."""

    classes: int
    """How many classes there are."""
    background: bool
    """Whether 0 is the first class; else 0 counts nowhere and 1 is the first class."""
    ignored: int
    """Another value that counts nowhere; -1: none."""


@dataclass(frozen=True)
class Training:
    """What is done to a picture in training."""

    scale: tuple[float, float]
    """Smallest and largest size of the picture: its shorter side over that of the view."""
    most_of_one: float
    """Crops with a larger share of one class are drawn again, ten times at most."""
    distort: bool
    """Whether colours are distorted."""
    normalised: str
    """``ModelConfig.pixels``, whose mean fills what is empty."""


def classes_in(image: bytes | Path, id: str, size: tuple[int, int], numbers: Numbers) -> Classes:
    """The class of every pixel, (H, W), -1 where it counts nowhere.

    Args:
        image: the picture of classes, encoded or the path of one; of a palette, the indices are meant.
        id: of the example, for messages.
        size: width and height of the picture that it belongs to.
        numbers: what its values mean.

    Raises:
        DataError: it cannot be read, has colours, has another size, values that mean nothing, or no pixel
            that counts.
    """
    values = _values(image, id, size)
    first = 0 if numbers.background else 1
    nothing = (values == numbers.ignored) | ((values == 0) & (not numbers.background))
    strange = ~nothing & ((values < first) | (values >= numbers.classes + first))
    if strange.any():
        found = ", ".join(map(str, np.unique(values[strange])[:8]))
        ignored = f" and {numbers.ignored} for none" if numbers.ignored >= 0 else ""
        raise DataError(
            f"{id}: the segmentation has the values {found} at {int(strange.sum()):,} pixels; there are "
            f"{numbers.classes} classes, so it may have {first} to {numbers.classes + first - 1}"
            f"{'' if numbers.background else ', 0 for none'}{ignored}"
        )
    if nothing.all():
        raise DataError(f"{id}: not one pixel of the segmentation has a class")
    return np.where(nothing, IGNORED, values - first).astype(np.int16)


def _values(image: bytes | Path, id: str, size: tuple[int, int]) -> NDArray[np.int64]:
    """The numbers of a picture of classes, (H, W)."""
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # its size is that of a picture that was decoded
            Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as found,
        ):
            if found.size != size:
                raise DataError(
                    f"{id}: the segmentation has {found.width} x {found.height} pixels, the picture "
                    f"{size[0]} x {size[1]}; they must be equal"
                )
            if found.mode not in MODES:
                raise DataError(
                    f"{id}: the segmentation is a picture of mode {found.mode}; it must have one number a "
                    "pixel, grey or of a palette"
                )
            return np.asarray(found).astype(np.int64)
    except UnidentifiedImageError as error:
        raise DataError(f"{id}: the segmentation is not a readable picture; replace or remove it") from error
    except FAULTS as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{id}: the segmentation cannot be read ({reason}); replace or remove it") from error


def bilinear(
    pixels: Pixels, width: int, height: int, box: tuple[float, float, float, float] | None = None
) -> Pixels:
    """(H, W, 3), or its part in ``box`` (left, top, right, bottom), at another size."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def nearest(classes: Classes, width: int, height: int) -> Classes:
    """(H, W) at another size: every pixel takes the class in its middle."""
    rows = ((np.arange(height) + 0.5) * classes.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * classes.shape[1] / width).astype(np.int64)
    found: Classes = classes[rows[:, None], columns]
    return found


def training_view(
    pixels: Pixels, classes: Classes, side: int, draw: np.random.Generator, settings: Training
) -> tuple[Pixels, Classes]:
    """A random square view (side, side, 3) of a picture, and the classes of its pixels (side, side).

    The shorter side becomes ``side`` times a number drawn from ``scale``, the longer at most four times that.
    Where the picture ends before the square, the mean colour follows, of which nothing counts.

    Args:
        pixels: (H, W, 3).
        classes: (H, W).
        side: of the view, in pixels.
        draw: the source of all randomness.
        settings: what is done.
    """
    tall, wide = pixels.shape[:2]
    target = side * draw.uniform(*settings.scale)
    factor = min(target / min(tall, wide), LONGEST * target / max(tall, wide))
    height, width = (max(1, round(length * factor)) for length in (tall, wide))
    small = nearest(classes, width, height)
    top, left = _place(small, side, draw, settings.most_of_one)
    bottom, right = min(top + side, height), min(left + side, width)
    box = (left * wide / width, top * tall / height, right * wide / width, bottom * tall / height)
    seen = bilinear(pixels, right - left, bottom - top, box)
    if settings.distort:
        seen = distorted(seen, draw)
    mean = [round(255 * value) for value in PIXELS[settings.normalised][0]]
    view = np.full((side, side, 3), mean, np.uint8)
    known = np.full((side, side), IGNORED, np.int16)
    view[: bottom - top, : right - left] = seen
    known[: bottom - top, : right - left] = small[top:bottom, left:right]
    if draw.random() < 0.5:
        view, known = view[:, ::-1], known[:, ::-1]
    return np.ascontiguousarray(view), np.ascontiguousarray(known)


def _place(classes: Classes, side: int, draw: np.random.Generator, most_of_one: float) -> tuple[int, int]:
    """Top and left of a crop in which no class has too large a share, or of the last one drawn."""
    spare = [max(0, length - side) for length in classes.shape]
    top = left = 0
    for _ in range(TRIES):
        top, left = (int(draw.integers(length + 1)) for length in spare)
        part = classes[top : top + side, left : left + side]
        counts = np.bincount(part[part != IGNORED])
        if (counts > 0).sum() > 1 and counts.max() < most_of_one * counts.sum():
            break
    return top, left


def distorted(pixels: Pixels, draw: np.random.Generator) -> Pixels:
    """(H, W, 3) with other brightness, contrast, saturation and hue, each with probability 0.5.

    Contrast comes before or after saturation and hue, with equal probability.
    """
    if draw.random() < 0.5:
        pixels = _clipped(pixels.astype(np.float32) + draw.uniform(-BRIGHTNESS, BRIGHTNESS))
    early = draw.random() < 0.5
    contrast = draw.uniform(*FACTORS) if draw.random() < 0.5 else 1.0
    if early and contrast != 1:
        pixels = _clipped(pixels.astype(np.float32) * contrast)
    saturation = draw.uniform(*FACTORS) if draw.random() < 0.5 else 1.0
    hue = draw.uniform(-HUE_DEGREES, HUE_DEGREES) if draw.random() < 0.5 else 0.0
    if saturation != 1 or hue:
        wheel = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        wheel[..., 1] = _clipped(wheel[..., 1].astype(np.float32) * saturation)
        wheel[..., 0] = wheel[..., 0] + np.uint8(round(hue * 256 / 360) % 256)  # wraps around, as hues do
        size = (wheel.shape[1], wheel.shape[0])
        pixels = np.array(Image.frombytes("HSV", size, wheel.tobytes()).convert("RGB"))
    if not early and contrast != 1:
        pixels = _clipped(pixels.astype(np.float32) * contrast)
    return pixels


def _clipped(values: NDArray[np.float32]) -> Pixels:
    return values.clip(0, 255).astype(np.uint8)
