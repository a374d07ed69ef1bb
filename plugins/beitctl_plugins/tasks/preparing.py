"""Steps of preparation that several tasks share."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from beitctl.api import Example, TextTokenizer, Tools
from beitctl.data.images import Crop, random_crop, resized
from beitctl.errors import DataError, UserError
from beitctl_plugins.tasks.augmenting import augmented

Test = Literal["centre", "squash"]
"""How a picture is seen in evaluation, see ``view_of``."""
LONGEST = 16
"""Times the shorter side: what lies beyond it is cut off before a picture is resized."""


def loaded(tools: Tools) -> TextTokenizer:
    """The text tokenizer.

    Raises:
        UserError: the stage has none, or the model has no language branch for it.
    """
    if tools.tokenizer is None:
        raise UserError('this task reads text: set text_tokenizer, for example to "@train-tokenizer.text"')
    if tools.model.vocabulary < tools.tokenizer.size:
        raise UserError(
            f"vocabulary ({tools.model.vocabulary}) is smaller than the {tools.tokenizer.size} ids of the "
            "text tokenizer; raise vocabulary in the model's table"
        )
    return tools.tokenizer


def framed(ids: Sequence[int], tokenizer: TextTokenizer) -> NDArray[np.int64]:
    """The ids of a text between those of its start and its end (``<s>`` and ``</s>``), (S,) int64."""
    return np.array([tokenizer.start_id, *ids, tokenizer.end_id], dtype=np.int64)


def longest(setting: int, tools: Tools) -> int:
    """Longest text in tokens by a task's setting, where 0 stands for the model's.

    Raises:
        UserError: the model reads no text as long, or no word has room.
    """
    if setting == 1:
        raise UserError("the task's text_tokens (1) must be 0 or at least 2: start and end take two")
    if setting > tools.model.text_tokens:
        raise UserError(f"the task's text_tokens ({setting}) exceed the model's ({tools.model.text_tokens})")
    return setting or tools.model.text_tokens


def window(ids: Sequence[int], longest: int, draw: np.random.Generator) -> Sequence[int]:
    """A random stretch of a text that is too long; over many epochs all of it is seen."""
    if len(ids) <= longest:
        return ids
    first = int(draw.integers(len(ids) - longest + 1))
    return ids[first : first + longest]


def caption_of(example: Example, draw: np.random.Generator, tools: Tools) -> str:
    """One caption: any of them in training, the first in evaluation.

    Raises:
        DataError: the example has none.
    """
    if not example.captions:
        raise DataError(f"{example.id}: no caption")
    return example.captions[int(draw.integers(len(example.captions))) if tools.train else 0]


def view_of(
    example: Example, draw: np.random.Generator, tools: Tools, scale: tuple[float, float],
    *, test: Test = "centre", crop_pct: float = 1.0, augment: str = "",
) -> Any:  # fmt: skip
    """(3, H, W) uint8: a random crop and flip in training; in evaluation always the same view.

    Args:
        example: what the picture is of.
        draw: the source of all randomness, in training alone.
        tools: say whether it is training, and at which size.
        scale: smallest and largest share of the picture that a training crop shows.
        test: ``centre``: the shorter side is resized to the model's side / ``crop_pct``, and the middle is
            cut out (ImageNet); ``squash``: all of the picture, whatever its shape (BEiT-3's and VLMo's
            other tasks).
        crop_pct: share of the shorter side that is seen (BEiT-1, BEiT v2: 0.875 below 384 pixels).
        augment: RandAugment behind the training crop, as of ``augmenting.Augment``.

    Raises:
        DataError: the example has no picture, or it cannot be read.
    """
    if example.image is None:
        raise DataError(f"{example.id}: no picture")
    picture = tools.pictures.open(example.image, example.id)
    side = tools.model.side_px
    if tools.train:
        width, height = picture.size
        crop = random_crop(width, height, draw, scale=scale)
        pixels = tools.pictures.crop(picture, crop, side).transpose(1, 2, 0)
        return augmented(pixels, augment, draw, tools.model.pixels).transpose(2, 0, 1)
    if test == "squash":
        return tools.pictures.crop(picture, Crop(0, 0, picture.height, picture.width), side)
    return middle(picture.pixels, side, crop_pct).transpose(2, 0, 1)


def middle(pixels: NDArray[np.uint8], side: int, crop_pct: float) -> NDArray[np.uint8]:
    """(side, side, 3) from the middle of a picture (H, W, 3) whose shorter side was made side / ``crop_pct``.

    Sizes and places are rounded as by torchvision's Resize and CenterCrop. Of a very long picture only the
    middle is resized.
    """
    height, width = pixels.shape[:2]
    most = LONGEST * min(height, width)
    top, left = (max(0, length - most) // 2 for length in (height, width))
    pixels = pixels[top : top + most, left : left + most]
    height, width = pixels.shape[:2]
    short = int(side / crop_pct)
    size = [int(short * length / min(height, width)) for length in (height, width)]
    top, left = (round((length - side) / 2) for length in size)
    return np.ascontiguousarray(resized(pixels, size[1], size[0])[top : top + side, left : left + side])
