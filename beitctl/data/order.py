"""Which example comes when: pure functions of (seed, epoch, position), so that resuming needs one integer.

Nothing here depends on the number of ranks, workers or micro-batches.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 16_384
"""Examples that are mixed with one another where reading far apart is slow."""
BLOCK = 4096
"""Places of a mixture in which every part has its share."""


def digest(*parts: int | str | bytes) -> bytes:
    """Hash of a list of values, 16 bytes; no two different lists share an encoding."""
    coded = bytearray()
    for part in parts:
        if isinstance(part, str):
            tag, data = b"s", part.encode()
        elif isinstance(part, bytes):
            tag, data = b"b", part
        else:
            tag, data = b"i", str(index(part)).encode()
        coded += tag + len(data).to_bytes(8, "little") + data
    return blake2b(coded, digest_size=16).digest()


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers that belong to a key such as (seed, "crop", epoch, position).

    Equal keys give equal numbers on every machine, different keys independent ones (Philox, counter-based).
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest(*key), "little")))


def permutation(n: int, seed: int, name: str, epoch: int) -> NDArray[np.integer]:
    """Order of one epoch: each of 0..n-1 exactly once, (n,), read-only."""
    narrow = n <= np.iinfo(np.int32).max  # half the memory
    order: NDArray[np.integer] = np.arange(n, dtype=np.int32) if narrow else np.arange(n, dtype=np.int64)
    generator(seed, "order", name, epoch).shuffle(order)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Part:
    """Examples of one source, as far as their order goes."""

    count: int
    shards: tuple[int, ...] = ()
    """Sizes of the runs of examples that lie together; empty: any is read as fast as any other."""
    weight: float = 1.0
    """Share of the sequence, beside the weights of the other parts."""
    window: int = 0
    """Most examples of shards to mix with one another, if fewer than ``WINDOW``; 0: ``WINDOW``."""


class Order:
    """The endless sequence in which a stream reads its examples: a pure function of seed and position.

    Every part goes through its examples once in each of its epochs. Without shards an epoch is a random
    permutation. With them it is a permutation of the shards, laid end to end and cut into windows of at
    most ``WINDOW`` examples, and a permutation of each window: reads stay within a few shards at a time.
    Of several parts each has its share of every ``BLOCK`` positions, at random places.
    """

    def __init__(self, parts: Sequence[Part], name: str) -> None:
        """Set up the order of the parts, whose examples have consecutive indices, under a name.

        Two sequences of one run are shuffled differently if their names differ.

        Raises:
            ValueError: there is nothing in a part, shards do not add up, or a weight is too small a share.
        """
        self.parts, self.name = tuple(parts), name
        self.starts = np.cumsum([0, *(part.count for part in parts)])
        for part in parts:
            if part.count < 1 or (part.shards and sum(part.shards) != part.count):
                raise ValueError(f"{name}: a part of {part.count} examples in shards of {sum(part.shards)}")
        self.slots = _slots(tuple(part.weight for part in parts))
        self.shuffles = [
            _Shards(part.shards, part.window) if part.shards else _Whole(part.count) for part in parts
        ]

    def at(self, position: int, seed: int) -> tuple[int, int]:
        """Epoch of its part, and index, of the example at a position.

        Raises:
            ValueError: the position is negative.
        """
        if position < 0:
            raise ValueError(f"no example at position {position}")
        if len(self.parts) == 1:
            number, place = 0, position
        else:
            block, slot = divmod(position, BLOCK)
            numbers, before = _mixed(self.slots, seed, self.name, block)
            number = int(numbers[slot])
            place = block * self.slots[number] + int(before[slot])
        part = self.parts[number]
        name = self.name if len(self.parts) == 1 else f"{self.name}/{number}"
        epoch, place = divmod(place, part.count)
        return epoch, int(self.starts[number]) + self.shuffles[number].at(place, seed, name, epoch)


def _slots(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Positions of a block that each part has: in proportion to the weights, by largest remainder."""
    if len(weights) == 1:
        return (BLOCK,)
    exact = np.array(weights, np.float64) / sum(weights) * BLOCK
    if not (exact >= 1).all():
        raise ValueError(f"a part has less than 1/{BLOCK} of all weights: {weights}")
    counts = np.floor(exact).astype(np.int64)
    rest = BLOCK - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    return tuple(counts.tolist())


@functools.lru_cache(maxsize=32)
def _mixed(
    slots: tuple[int, ...], seed: int, name: str, block: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Part of every position of a block, and how many of that part come before it in the block."""
    parts = np.repeat(np.arange(len(slots)), slots)
    generator(seed, "mixture", name, block).shuffle(parts)
    before = np.empty(BLOCK, np.int64)
    for part, count in enumerate(slots):
        before[parts == part] = np.arange(count)
    return parts, before


class _Whole:
    """The order of examples that may come in any; keeps that of one epoch."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.last: tuple[Any, NDArray[np.integer]] | None = None

    def at(self, place: int, seed: int, name: str, epoch: int) -> int:
        """Index of the example at a place of an epoch."""
        if self.last is None or self.last[0] != (seed, name, epoch):
            self.last = ((seed, name, epoch), permutation(self.count, seed, name, epoch))
        return int(self.last[1][place])


class _Shards:
    """The order of examples that lie in shards; keeps that of one epoch."""

    def __init__(self, sizes: tuple[int, ...], window: int) -> None:
        self.window = min(window, WINDOW) if window else WINDOW
        self.sizes = np.array(sizes, np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.last: tuple[Any, NDArray[np.integer], NDArray[np.int64]] | None = None

    def at(self, place: int, seed: int, name: str, epoch: int) -> int:
        """Index of the example at a place of an epoch."""
        order, ends = self._shuffled(seed, name, epoch)
        number, inner = divmod(place, self.window)
        first = number * self.window
        window = _window(min(self.window, int(ends[-1]) - first), seed, name, epoch, number)
        spot = first + int(window[inner])
        turn = int(np.searchsorted(ends, spot, side="right"))
        shard = int(order[turn])
        return int(self.starts[shard] + self.sizes[shard]) - (int(ends[turn]) - spot)

    def _shuffled(self, seed: int, name: str, epoch: int) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """Order of the shards in an epoch, and where each ends in it."""
        if self.last is None or self.last[0] != (seed, name, epoch):
            order = permutation(len(self.sizes), seed, f"{name}/shards", epoch)
            self.last = ((seed, name, epoch), order, np.cumsum(self.sizes[order]))
        return self.last[1:]


@functools.lru_cache(maxsize=64)
def _window(size: int, seed: int, name: str, epoch: int, window: int) -> NDArray[np.integer]:
    order = np.arange(size, dtype=np.int32)
    generator(seed, "window", name, epoch, window).shuffle(order)
    return order


def share(total: int, parts: int, part: int) -> range:
    """One part of 0..total-1: contiguous, and no part is longer than another by more than one.

    Raises:
        ValueError: part does not lie in 0..parts-1.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part ({part}) must lie in 0..{parts - 1}")
    return range(part * total // parts, (part + 1) * total // parts)


def snake(costs: NDArray[Any], parts: int, part: int) -> list[int]:
    """One part of the places of ``costs``, dealt out so that all parts cost about the same.

    From the dearest to the cheapest, forth and back over the parts; no part is longer than another by more
    than one.

    Raises:
        ValueError: part does not lie in 0..parts-1.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part ({part}) must lie in 0..{parts - 1}")
    dealt = np.argsort(-np.asarray(costs, np.int64), kind="stable")
    turn = np.arange(len(dealt)) % (2 * parts)
    mine = dealt[(turn == part) | (turn == 2 * parts - 1 - part)]
    return sorted(mine.tolist())
