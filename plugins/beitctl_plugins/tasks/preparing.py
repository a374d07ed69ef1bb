"""Steps of preparation that several tasks share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beitctl.api import Example, TextTokenizer, Tools
from beitctl.data.images import centre_crop, random_crop
from beitctl.errors import DataError, UserError


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


def view_of(example: Example, draw: np.random.Generator, tools: Tools, scale: tuple[float, float]) -> Any:
    """(3, H, W) uint8: a random crop and flip in training, the central square in evaluation.

    Raises:
        DataError: the example has no picture, or it cannot be read.
    """
    if example.image is None:
        raise DataError(f"{example.id}: no picture")
    picture = tools.pictures.open(example.image, example.id)
    width, height = picture.size
    crop = random_crop(width, height, draw, scale=scale) if tools.train else centre_crop(width, height)
    return tools.pictures.crop(picture, crop, tools.model.side_px)
