"""What image tokenizers train on: crops of the pictures of some sources."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from beitctl.api import Example, Source, Tools
from beitctl.config import ModelConfig
from beitctl.data.images import Pictures, centre_crop, random_crop
from beitctl.data.loader import Stream
from beitctl.data.opening import opened
from beitctl.errors import DataError

CACHE_MIB = 1024


@dataclass(frozen=True)
class Crops:
    """Prepares one crop of a picture at one or more sizes; speaks the protocol of a task to the loader.

    An item is a tuple of (3, px, px) uint8.
    """

    scale: tuple[float, float]
    sizes: tuple[int, ...]
    layout: ClassVar[Literal["image"]] = "image"

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Any:
        if example.image is None:
            raise DataError(f"{example.id}: no picture")
        picture = tools.pictures.open(example.image, example.id)
        width, height = picture.size
        crop = (
            random_crop(width, height, draw, scale=self.scale) if tools.train else centre_crop(width, height)
        )
        return tuple(tools.pictures.crop(picture, crop, px) for px in self.sizes)


def streams_of(sources: Sequence[Source], samples: int, crops: Crops, model: ModelConfig) -> list[Stream]:
    """A stream for each source, with its share of the ``samples`` pictures of a step, at least one."""
    tools = Tools(model, pictures=Pictures(cache_mib=CACHE_MIB))
    found = [opened(source) for source in sources]
    total = sum(map(len, found))
    counts = [max(1, round(samples * len(examples) / total)) for examples in found]
    task: Any = crops
    return [
        Stream(f"pictures{index}", task, examples, count, tools)
        for index, (examples, count) in enumerate(zip(found, counts, strict=True))
    ]
