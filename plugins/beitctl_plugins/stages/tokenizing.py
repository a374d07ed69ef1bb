"""The work of ``tokenize-images``: pictures to views, views to codes, codes to shards. Imports torch.

Threads decode and crop ahead of the encoder. What a shard holds depends on neither their number nor that of
the ranks: the tokenizer reads the views of a shard in the same batches always.
"""

import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beitctl.api import Example, Examples, ImageTokenizer
from beitctl.data.images import Crop, Pictures, random_crop
from beitctl.data.order import generator
from beitctl.data.store import TokenStoreWriter, picture_hash
from beitctl.data.store_format import Row
from beitctl.data.threads import ahead
from beitctl.errors import ChangedError, DataError

if TYPE_CHECKING:
    from beitctl_plugins.stages.tokenize_images import TokenizeImages

BATCH = 64
"""Views that the tokenizer reads at once."""
MOST_THREADS = 16


@dataclass(frozen=True)
class Views:
    """The views of one picture."""

    row: Row
    pixels: NDArray[np.uint8]
    """(K, 3, px, px)."""


@dataclass(frozen=True)
class Unusable:
    """A picture that cannot be read."""

    place: str
    reason: str


class Work:
    """Makes views of the pictures of all sources, encodes them and writes them in shards."""

    def __init__(
        self, stage: "TokenizeImages", tokenizer: ImageTokenizer, opened: Sequence[Examples],
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.stage, self.tokenizer, self.opened = stage, tokenizer, opened
        self.device, self.dtype = device, dtype
        self.pictures = Pictures()
        self.ends = list(accumulate(map(len, opened)))

    @property
    def total(self) -> int:
        """Pictures of all sources."""
        return self.ends[-1]

    @property
    def shards(self) -> int:
        """Shards of the whole store."""
        return -(-self.total // self.stage.shard_pictures)

    @property
    def batch(self) -> int:
        """Pictures whose views the tokenizer reads at once."""
        return max(1, BATCH // self.stage.views)

    def write(
        self, numbers: Sequence[int], writer: TokenStoreWriter, skip: Callable[[Unusable], None],
        wrote: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Write shards by their numbers.

        Args:
            numbers: of the shards.
            writer: of the store.
            skip: called with every picture that cannot be read.
            wrote: called with the number of every shard that is written.
        """
        threads = self.stage.workers or default_threads()
        places = ((number, place) for number in numbers for place in self.places(number))
        with warnings.catch_warnings():
            # Pictures switches warnings off and on again while it reads, which threads do at the same time
            warnings.filterwarnings("ignore", module="PIL")
            with closing(ahead(self._looked_at, places, threads, 2 * self.batch + threads)) as found:
                for number in numbers:
                    self._shard(number, islice(found, len(self.places(number))), writer, skip)
                    wrote(number)

    def places(self, number: int) -> range:
        """Places of a shard's pictures in the row of all sources."""
        first = number * self.stage.shard_pictures
        return range(first, min(self.total, first + self.stage.shard_pictures))

    def example(self, place: int) -> Example:
        """The example at a place in the row of all sources."""
        source = bisect_right(self.ends, place)
        return self.opened[source][place - (self.ends[source - 1] if source else 0)]

    def views(self, example: Example) -> Views:
        """The views of a picture, which follow from the seed and its id.

        Raises:
            DataError: it cannot be read.
        """
        data, name = encoded(example)
        picture = self.pictures.open(data, name)
        stage, rng = self.stage, generator(self.stage.seed, "views", example.id)
        crops: list[Crop] = [
            random_crop(*picture.size, rng, scale=stage.crop_scale, jitter=stage.jitter)
            for _ in range(stage.views)
        ]
        pixels = [self.pictures.crop(picture, crop, self.tokenizer.image_px) for crop in crops]
        return Views(Row(example.id, picture_hash(data), crops), np.stack(pixels))

    def encode(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(n, 3, px, px) to codes (n, N) on the device; the caller's next batch is made meanwhile."""
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype != torch.float32):
            return self.tokenizer.encode(torch.from_numpy(pixels))

    def located(self, ids: Iterable[str]) -> dict[str, int]:
        """Places of pictures by id; those that no source has, or that cannot be read, are left out."""
        wanted, found = set(ids), dict[str, int]()
        for place in range(self.total):
            if len(found) == len(wanted):
                break
            try:
                id = self.example(place).id
            except ChangedError:
                raise
            except DataError:
                continue
            if id in wanted:
                found[id] = place
        return found

    def _looked_at(self, item: tuple[int, int]) -> Views | Unusable:
        _, place = item
        name = f"example {place}"
        try:
            example = self.example(place)
            name = example.id
            return self.views(example)
        except ChangedError:
            raise
        except DataError as error:
            return Unusable(name, str(error))

    def _shard(
        self, number: int, found: Iterator[Views | Unusable], writer: TokenStoreWriter,
        skip: Callable[[Unusable], None],
    ) -> None:  # fmt: skip
        grid, rows, skipped, codes = self.tokenizer.grid, list[Row](), list[str](), list[Tensor]()

        def usable() -> Iterator[Views]:
            for views in found:
                if isinstance(views, Views):
                    yield views
                else:
                    skipped.append(views.reason)
                    skip(views)

        for batch in chunks(usable(), self.batch):
            rows += [views.row for views in batch]
            codes.append(self.encode(np.concatenate([views.pixels for views in batch])))
        empty = torch.zeros((0, grid**2), dtype=torch.int64, device=self.device)
        flat = torch.cat([empty, *codes]).cpu().numpy().astype(np.uint16)
        writer.write_shard(number, rows, flat.reshape(len(rows), self.stage.views, grid**2), skipped)


def encoded(example: Example) -> tuple[bytes, str]:
    """The bytes of an example's picture, and its name for messages.

    Raises:
        DataError: it has none, or its file cannot be read.
    """
    if example.image is None:
        raise DataError(f"{example.id}: no picture")
    if isinstance(example.image, bytes):
        return example.image, example.id
    name = f"{example.id} ({example.image})"
    try:
        return example.image.read_bytes(), name
    except OSError as error:
        raise DataError(f"{name}: not a readable picture ({error.strerror}); replace or remove it") from error


def chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` items, the last one of what is left."""
    while chunk := list(islice(items, size)):
        yield chunk


def default_threads() -> int:
    """One for each core that this process may use, among the ranks on its machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    mine = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(mine(0)) if mine else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // ranks))
