"""What tasks on questions, statements and other texts share: their ids, their words, their pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beitctl.api import Example, Tools
from beitctl.errors import DataError, UserError
from beitctl_plugins.tasks.preparing import framed, loaded, longest

MOST_DRAWN = 1000
"""Examples among which those to draw are chosen."""


def need_language(task: str, tools: Tools) -> None:
    """Refuse a model that reads no text.

    Raises:
        UserError: the model has no language branch.
    """
    if not tools.model.vocabulary:
        raise UserError(
            f"{task} reads text, but the model of init has no language branch (vocabulary is 0): start "
            "from one that was trained on pairs, such as BEiT-3 or VLMo"
        )


def text_ids(example: Example, tools: Tools, setting: int) -> tuple[NDArray[np.int64], bool]:
    """Ids (S,) of the text of an example, start and end included, and whether it was too long.

    Of a text that is too long the beginning is kept, as in BEiT-3's code.

    Args:
        example: has ``text``, or ``token_ids`` in its place.
        tools: the tokenizer, and the model's longest text.
        setting: the task's ``text_tokens``; 0: the model's.

    Raises:
        DataError: there is no text, or an id that the model has not.
    """
    tokenizer, room = loaded(tools), longest(setting, tools) - 2
    if example.token_ids is not None:
        ids: Sequence[int] = [int(number) for number in example.token_ids]
        if wrong := [number for number in ids if not 0 <= number < tools.model.vocabulary]:
            raise DataError(f"{example.id}: id {wrong[0]} is none of the model's {tools.model.vocabulary}")
    else:
        ids = tokenizer.encode(example.text or "")
    if not ids:
        raise DataError(f"{example.id}: no text")
    return framed(ids[:room], tokenizer), len(ids) > room


def text_of(example: Example, tools: Tools) -> str:
    """The text of an example in words."""
    if example.text or example.token_ids is None or tools.tokenizer is None:
        return example.text or ""
    return tools.tokenizer.decode([int(number) for number in example.token_ids])


@dataclass(frozen=True)
class Choices:
    """Which of its classes or answers a model chose, and how surely."""

    places: NDArray[np.int64]
    """(n,) number of the largest logit."""
    sure: NDArray[np.float64]
    """(n,) its probability."""

    @classmethod
    def of(cls, outputs: Sequence[Tensor], *, apart: bool = False) -> "Choices":
        """From logits (n, V), batch by batch; ``apart``: each class has its own probability (sigmoid)."""
        places, sure = [], []
        for logits in outputs:
            exact = logits.detach().cpu().float()
            best = (exact.sigmoid() if apart else exact.softmax(-1)).max(-1)
            places.append(exact.argmax(-1))
            sure.append(best.values)
        return cls(torch.cat(places).numpy(), torch.cat(sure).double().numpy())

    def spread(self) -> list[int]:
        """At most 1,000 places, evenly spread, the surest first."""
        count = len(self.places)
        some = np.unique(np.linspace(0, count - 1, min(count, MOST_DRAWN)).round().astype(np.int64))
        return [int(place) for place in some[np.argsort(-self.sure[some], kind="stable")]]


def picture_of(image: Any, id: str, tools: Tools) -> NDArray[np.uint8]:
    """(H, W, 3): all of a picture, which the gallery makes small."""
    found: NDArray[np.uint8] = tools.pictures.open(image, id).pixels
    return found
