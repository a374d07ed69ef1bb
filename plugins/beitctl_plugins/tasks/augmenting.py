"""RandAugment: pictures changed by a few operations drawn at random (arXiv:1909.13719).

Two kinds: that of VLMo and BEiT-3, and timm's policies by their string. Both are functions of the picture and
the generator that they are given.
"""

import functools
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from pydantic import AfterValidator

from beitctl.engine.learner import PIXELS

BEIT3 = "beit3"
SECTION = re.compile(
    r"m\d+|n[1-9]\d*|p(?:0(?:\.\d+)?|1(?:\.0+)?)|mstd\d+(?:\.\d+)?|mmax\d+|inc[01]|t(?:weights|3a|3aw)"
)
"""One part of timm's strings: what timm reads with another meaning, or passes over, is not among them."""

LAYERS, LEVEL = 2, 0.7
"""N, and M = 7 of 10."""
PROBABILITY = 0.5
"""That an operation which was drawn is carried out."""
FACTOR = LEVEL * 1.8 + 0.1
"""Of brightness and sharpness, 1.36."""
SHEAR, SHIFT_PX, DEGREES = LEVEL * 0.3, LEVEL * 10, LEVEL * 30
"""Pixels a row or column, pixels, degrees; either way with equal probability."""
FILL = (128, 128, 128)
"""Colour where there was no picture."""

Operation = Callable[[Image.Image, np.random.Generator], Image.Image]


def _known(value: str) -> str:
    head, *sections = value.split("-")
    if value in ("", BEIT3) or (head == "rand" and all(map(SECTION.fullmatch, sections))):
        return value
    raise ValueError(
        f"'{value}' is no augmentation: leave it empty, or write \"{BEIT3}\" or a policy of timm such as "
        '"rand-m9-mstd0.5-inc1" (parts: m9, n2, p0.5, mstd0.5, mmax10, inc1, tweights)'
    )


Augment = Annotated[str, AfterValidator(_known)]
"""Setting of a task: "", "beit3" (N 2, M 7, each with probability 0.5), or "rand-...", a policy of timm."""


def augmented(
    pixels: NDArray[np.uint8], policy: str, draw: np.random.Generator, normalised: str = "half"
) -> NDArray[np.uint8]:
    """A picture (H, W, 3) after RandAugment, in the same shape.

    Not for threads: timm draws from the process's global generators, which are put back afterwards.

    Args:
        pixels: (H, W, 3).
        policy: as of ``Augment``.
        draw: the source of all randomness.
        normalised: ``ModelConfig.pixels``; timm fills with the mean colour, the other kind with grey.
    """
    if not policy:
        return pixels
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if policy == BEIT3:
        return np.array(_beit3(picture, draw))
    transform = _timm(policy, normalised)
    with _seeded(draw):
        return np.array(transform(picture))


def _beit3(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    """RandAugment of VLMo and BEiT-3: two operations, drawn with replacement."""
    names = list(OPERATIONS)
    for number in draw.integers(len(names), size=LAYERS):
        if draw.random() < PROBABILITY:
            picture = OPERATIONS[names[number]](picture, draw)
    return picture


def _signed(size: float, draw: np.random.Generator) -> float:
    return size if draw.random() < 0.5 else -size


def _moved(picture: Image.Image, across: tuple[float, ...], down: tuple[float, ...]) -> Image.Image:
    """The picture whose pixel (x, y) is that at (a x + b y + c, d x + e y + f), bilinear, grey outside.

    Pixels are counted by their centres; Pillow counts by corners.
    """
    data = []
    for first, second, shift in (across, down):
        data += [first, second, shift + 0.5 - 0.5 * first - 0.5 * second]
    return picture.transform(
        picture.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=FILL
    )


def _shear_x(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    return _moved(picture, (1, -_signed(SHEAR, draw), 0), (0, 1, 0))


def _shear_y(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    return _moved(picture, (1, 0, 0), (-_signed(SHEAR, draw), 1, 0))


def _translate_x(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    return _moved(picture, (1, 0, _signed(SHIFT_PX, draw)), (0, 1, 0))


def _translate_y(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    return _moved(picture, (1, 0, 0), (0, 1, _signed(SHIFT_PX, draw)))


def _rotate(picture: Image.Image, draw: np.random.Generator) -> Image.Image:
    angle = math.radians(_signed(DEGREES, draw))
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = picture.width / 2, picture.height / 2
    return _moved(picture, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))


OPERATIONS: dict[str, Operation] = {
    "Identity": lambda picture, draw: picture,
    "AutoContrast": lambda picture, draw: ImageOps.autocontrast(picture),
    "Equalize": lambda picture, draw: ImageOps.equalize(picture),
    "Brightness": lambda picture, draw: ImageEnhance.Brightness(picture).enhance(FACTOR),
    "Sharpness": lambda picture, draw: ImageEnhance.Sharpness(picture).enhance(FACTOR),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}


@functools.cache
def _timm(policy: str, normalised: str) -> Callable[[Image.Image], Image.Image]:
    """A policy as timm's ``create_transform`` makes it for bicubic training."""
    from timm.data.auto_augment import rand_augment_transform  # noqa: PLC0415  takes a second

    mean, _ = PIXELS[normalised]
    colour = tuple(min(255, round(255 * value)) for value in mean)
    made: Any = rand_augment_transform(
        policy, {"img_mean": colour, "interpolation": Image.Resampling.BICUBIC}
    )
    for operation in made.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return made  # type: ignore[no-any-return]


def _posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    """The picture with fewer bits; black with none, which timm asks for and Pillow 13 refuses."""
    if bits < 1:
        return Image.new(picture.mode, picture.size)
    return ImageOps.posterize(picture, min(8, bits))


@contextmanager
def _seeded(draw: np.random.Generator) -> Iterator[None]:
    """Python's and NumPy's global generators seeded from another; afterwards they are as they were."""
    python, legacy = random.getstate(), np.random.get_state()
    random.seed(int(draw.integers(2**63)))
    np.random.seed(int(draw.integers(2**32)))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
