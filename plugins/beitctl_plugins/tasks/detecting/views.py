"""Pictures with the objects in them: checked, and made the views that a detector reads.

Source of the training views: large-scale jitter (arXiv:2012.07177) as in ViTDet: resize, crop, flip.
Letters: S side of a view in pixels, k objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beitctl.api import Example, Object, Tools
from beitctl.engine.learner import PIXELS
from beitctl.errors import DataError
from beitctl_plugins.tasks.classes import listed
from beitctl_plugins.tasks.dense_views import Pixels, bilinear
from beitctl_plugins.tasks.detecting.masks import Bits, decoded

LEAST_PX = 1.0
"""Objects of which fewer pixels in width or height are seen have vanished."""


@dataclass(frozen=True)
class Seen:
    """The objects of a view."""

    boxes: NDArray[np.float32]
    """(k, 4) left, top, right, bottom in pixels."""
    classes: NDArray[np.int64]
    """(k,) from 1."""
    masks: NDArray[np.uint8]
    """(k, S, S) 1 where the object is."""


def corners(thing: Object, id: str, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of an object inside its picture.

    Raises:
        DataError: the box is empty or outside the picture.
    """
    left, top, wide, high = thing.box
    found = (max(left, 0.0), max(top, 0.0), min(left + wide, width), min(top + high, height))
    if not (np.isfinite(thing.box).all() and wide > 0 and high > 0):
        raise DataError(f"{id}: the box {list(thing.box)} of '{thing.label}' is empty; correct or remove it")
    if found[0] >= found[2] or found[1] >= found[3]:
        raise DataError(
            f"{id}: the box {list(thing.box)} (left, top, width, height) of '{thing.label}' lies outside the "
            f"picture of {width} x {height} pixels; correct or remove it"
        )
    return found


def mask_of(thing: Object, id: str, width: int, height: int) -> Bits:
    """(height, width) pixels of an object.

    Raises:
        DataError: it has no mask, or one that cannot be read.
    """
    if thing.mask is None:
        raise DataError(
            f"{id}: the object '{thing.label}' with the box {list(thing.box)} has no mask; add it, or set "
            "masks = false to learn boxes alone"
        )
    try:
        return decoded(thing.mask, height, width)
    except (TypeError, ValueError) as error:
        raise DataError(f"{id}: the mask of '{thing.label}', box {list(thing.box)}: {error}") from error


def check_objects(example: Example, size: tuple[int, int], tools: Tools, masks: bool) -> None:
    """Refuse objects that cannot be used, those of crowds too.

    Args:
        example: has the objects.
        size: width and height of its picture.
        tools: hold the names of the classes.
        masks: whether objects need masks.

    Raises:
        DataError: a class that there is not, a box that is empty or outside, a mask that is needed and
            missing or cannot be read.
    """
    for thing in example.objects:
        if thing.label not in tools.labels:
            raise DataError(
                f"{example.id}: '{thing.label}' is none of the classes: {listed(tools.labels)}; add it to "
                "class_names, or remove the object"
            )
        corners(thing, example.id, *size)
        if masks:
            mask_of(thing, example.id, *size)


def fitted_view(pixels: Pixels, side: int, normalised: str) -> tuple[Pixels, tuple[int, int]]:
    """A picture whose longer side is S, in the upper left of (S, S, 3), and its height and width there."""
    tall, wide = pixels.shape[:2]
    factor = side / max(tall, wide)
    height, width = (max(1, min(side, round(length * factor))) for length in (tall, wide))
    view = _empty(side, normalised)
    view[:height, :width] = bilinear(pixels, width, height)
    return view, (height, width)


def _empty(side: int, normalised: str) -> Pixels:
    """(side, side, 3) of the mean colour."""
    return np.full((side, side, 3), [round(255 * value) for value in PIXELS[normalised][0]], np.uint8)


def training_view(
    example: Example, pixels: Pixels, draw: np.random.Generator, tools: Tools,
    scale: tuple[float, float], masks: bool,
) -> tuple[Pixels, Seen]:  # fmt: skip
    """A random view (S, S, 3) of a picture with the objects that can be seen in it.

    The longer side becomes S times a number drawn from ``scale``, then S x S pixels are cut out anywhere.
    Where the picture ends before the square, the mean colour follows. Boxes are those of what is seen of the
    masks, if there are masks. Crowds are left out.

    Args:
        example: has the objects.
        pixels: (H, W, 3), its picture.
        draw: the source of all randomness.
        tools: hold the model's shape and the names of the classes.
        scale: smallest and largest size.
        masks: whether masks are made too; else there are 0 of them.
    """
    side = tools.model.side_px
    tall, wide = pixels.shape[:2]
    factor = side * draw.uniform(*scale) / max(tall, wide)
    height, width = (max(1, round(length * factor)) for length in (tall, wide))
    top, left = (int(draw.integers(max(0, length - side) + 1)) for length in (height, width))
    bottom, right = min(top + side, height), min(left + side, width)
    flip = draw.random() < 0.5
    part = (left * wide / width, top * tall / height, right * wide / width, bottom * tall / height)
    view = _empty(side, tools.model.pixels)
    view[: bottom - top, : right - left] = bilinear(pixels, right - left, bottom - top, part)
    rows = ((np.arange(top, bottom) + 0.5) * tall / height).astype(np.int64)
    columns = ((np.arange(left, right) + 0.5) * wide / width).astype(np.int64)
    stretch = np.array([width / wide, height / tall] * 2)
    found: list[tuple[NDArray[np.float64], int, NDArray[np.uint8]]] = []
    for thing in example.objects:
        if thing.crowd:
            continue
        box = np.array(corners(thing, example.id, wide, tall)) * stretch - [left, top, left, top]
        box = box.clip(0, [right - left, bottom - top] * 2)
        mask = np.zeros((side, side), np.uint8)
        if masks:
            mask[: len(rows), : len(columns)] = mask_of(thing, example.id, wide, tall)[rows[:, None], columns]
            box = _around(mask)
        if min(box[2] - box[0], box[3] - box[1]) >= LEAST_PX:
            found.append((box, tools.labels.index(thing.label) + 1, mask))
    if flip:
        view = np.ascontiguousarray(view[:, ::-1])
        found = [(_mirrored(box, side), number, mask[:, ::-1]) for box, number, mask in found]
    return view, _seen(found, side, masks)


def _around(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Left, top, right and bottom of what is in a mask; 0 if it is empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros(4)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def _mirrored(box: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    return np.array([side - box[2], box[1], side - box[0], box[3]])


def _seen(
    found: Sequence[tuple[NDArray[np.float64], int, NDArray[np.uint8]]], side: int, masks: bool
) -> Seen:
    stacked = np.stack([mask for _, _, mask in found]) if found and masks else np.zeros((0, side, side))
    return Seen(
        np.array([box for box, _, _ in found], np.float32).reshape(-1, 4),
        np.array([number for _, number, _ in found], np.int64),
        stacked.astype(np.uint8),
    )
