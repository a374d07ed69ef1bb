"""Step number to batches: a pure function, so that resuming needs one integer.

Which samples a step holds, their crops, masks and stochastic depth follow from (seed, objective, epoch,
index). They depend neither on the number of ranks nor on workers or accumulation.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from beitctl.config import ModelConfig
from beitctl.data import order
from beitctl.data.batch import Batch, Portion, collate
from beitctl.data.workers import working_on
from beitctl.errors import ChangedError, DataError

if TYPE_CHECKING:
    from beitctl.api import Example, Examples, Item, Task, Tools

SUBSTITUTES = 16
"""How many other examples are tried in the place of an unreadable one."""


@dataclass(frozen=True)
class Stream:
    """One objective's flow of samples."""

    name: str
    task: "Task"
    examples: "Examples"
    samples: int
    """Samples per step, over all ranks."""
    tools: "Tools"

    @functools.cached_property
    def order(self) -> order.Order:
        """The sequence in which the examples come."""
        mixed = getattr(self.examples, "parts", None) or [(1.0, self.examples)]
        parts = [
            order.Part(len(part), tuple(getattr(part, "shards", ())), weight, getattr(part, "window", 0))
            for weight, part in mixed
        ]
        return order.Order(parts, self.name)

    def positions(self, step: int, parts: int, part: int, seed: int) -> list[int]:
        """Positions of the samples of one of ``parts`` equal shares of a step.

        A share lies together on disk where only a few examples are mixed at a time; else texts whose lengths
        are known are dealt out so that no share has more work than another.
        """
        first = step * self.samples
        near = getattr(self.examples, "window", 0)
        lengths = getattr(self.examples, "lengths", None)
        if parts == 1 or not (near or (lengths is not None and self.task.layout in ("text", "pair"))):
            return [first + offset for offset in order.share(self.samples, parts, part)]
        found = np.array([self.order.at(first + offset, seed)[1] for offset in range(self.samples)])
        if not near and lengths is not None:
            return [first + offset for offset in order.snake(np.asarray(lengths)[found], parts, part)]
        mine = order.share(self.samples, parts, part)
        return [first + int(offset) for offset in np.argsort(found, kind="stable")[mine.start : mine.stop]]


@dataclass(frozen=True)
class Place:
    """Which share of every step this process loads, in how many forward passes."""

    rank: int = 0
    world: int = 1
    micro_samples: int = 0
    """Most samples in one pass; 0: no limit."""

    def passes(self, samples: int) -> int:
        """Forward passes per step, the same on every rank."""
        mine = -(-samples // self.world)
        return 1 if not self.micro_samples else -(-mine // self.micro_samples)


def drawn(stream: Stream, position: int, seed: int) -> "tuple[str, Item, list[tuple[str, str]]]":
    """Id and item at a position of a stream, and what could not be read on the way, named ``stream/id``.

    An unreadable example is replaced by another that depends on nothing but the seed and its place.

    Raises:
        DataError: many examples in a row are unreadable.
        ChangedError: the data are not what they were when the run began.
    """
    epoch, index = stream.order.at(position, seed)
    problems: list[tuple[str, str]] = []
    chosen = index
    for attempt in range(SUBSTITUTES):
        place = f"{stream.name}[{chosen}]"
        working_on(place)
        try:
            example = stream.examples[chosen]
            place = example.id
            working_on(f"{stream.name}/{place}")
            draw = order.generator(seed, stream.name, epoch, index, "prepare", attempt)
            return place, stream.task.prepare(example, draw, stream.tools), problems
        except ChangedError:
            raise
        except DataError as error:
            problems.append((f"{stream.name}/{place}", str(error)))
            reserve = order.generator(seed, stream.name, epoch, index, "reserve", attempt)
            chosen = int(reserve.integers(len(stream.examples)))
    raise DataError(f"{SUBSTITUTES} examples of '{stream.name}' in a row cannot be used: {problems[0][1]}")


class StepData(Dataset[list[Batch]]):
    """The batches of any step, by its number."""

    def __init__(
        self, streams: Sequence[Stream], model: ModelConfig, seed: int, place: Place, multiple: int = 1
    ) -> None:
        """Batches of some streams; ``multiple`` as of ``collate``."""
        self.streams, self.model, self.seed, self.place = streams, model, seed, place
        self.multiple = multiple
        self.passes = place.passes(sum(stream.samples for stream in streams))
        self.rates = np.linspace(0.0, model.drop_path, model.layers)

    def __getitem__(self, step: int) -> list[Batch]:
        """The forward passes of this rank in step ``step``, counted from 0."""
        return [self._batch(step, number) for number in range(self.passes)]

    def _batch(self, step: int, number: int) -> Batch:
        parts = self.passes * self.place.world
        part = number * self.place.world + self.place.rank
        portions, samples, problems = [], [], []
        for stream in self.streams:
            items, keeps = [], []
            for position in stream.positions(step, parts, part, self.seed):
                id, item, bad = drawn(stream, position, self.seed)
                items.append(item)
                keeps.append(self._keep(stream, position))
                samples.append(f"{stream.name}/{id}")
                problems += bad
            keep = np.stack(keeps) if keeps and self.model.drop_path else None
            portions.append(portion_of(stream.name, stream.task, items, keep))
        batch = collate(portions, self.model, self.multiple, step)
        return replace(batch, samples=tuple(samples), problems=tuple(problems))

    def _keep(self, stream: Stream, position: int) -> np.ndarray[Any, Any]:
        """(layers, 2) scales of one sample's branches."""
        if not self.model.drop_path:
            return np.zeros((0, 2), np.float32)
        draw = order.generator(self.seed, stream.name, position, "depth").random((self.model.layers, 2))
        alive = draw >= self.rates[:, None]
        return (alive / (1.0 - self.rates[:, None])).astype(np.float32)


def portion_of(
    name: str, task: "Task", items: "Sequence[Item]", keep: np.ndarray[Any, Any] | None = None
) -> Portion:
    """Items of a task as a part of a batch."""
    return Portion(name, task.layout, items, keep, getattr(task, "causal_text", False))


def fixed(stream: Stream, seed: int, index: int) -> "tuple[Example, Item]":
    """An example of a stream and its item, with draws that depend on nothing but its index.

    Raises:
        DataError: it cannot be used.
        ChangedError: the data are not what they were when the source was opened.
    """
    example = stream.examples[index]
    draw = order.generator(seed, stream.name, "fixed", index)
    return example, stream.task.prepare(example, draw, stream.tools)


def prepared(
    stream: "Stream", seed: int, limit: int = 0, unusable: list[str] | None = None
) -> "Iterator[tuple[Example, Item]]":
    """The examples of a stream once, in order, with fixed draws; those that cannot be read are left out.

    Why they are left out is appended to ``unusable``.
    """
    count = len(stream.examples) if not limit else min(limit, len(stream.examples))
    for index in range(count):
        try:
            yield fixed(stream, seed, index)
        except ChangedError:
            raise
        except DataError as error:
            if unusable is not None:
                unusable.append(str(error))


def batches(
    items: "Mapping[str, tuple[Task, Sequence[Item]]]", model: ModelConfig, samples: int, place: Place
) -> Iterator[Batch]:
    """This rank's share of prepared items of several objectives, at most ``samples`` of each in a batch."""
    longest = max((len(found) for _, found in items.values()), default=0)
    for start in range(0, longest, samples):
        portions = []
        for name, (task, found) in items.items():
            chunk = found[start : start + samples]
            mine = order.share(len(chunk), place.world, place.rank)
            portions.append(portion_of(name, task, chunk[mine.start : mine.stop]))
        yield collate(portions, model)
