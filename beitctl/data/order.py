"""Which example comes when: pure functions of (seed, epoch, position), so that resuming needs one integer.

Nothing here depends on the number of ranks, workers or micro-batches.
"""

import functools
from hashlib import blake2b
from operator import index

import numpy as np
from numpy.typing import NDArray


def digest(*parts: int | str | bytes) -> bytes:
    """Hash of a list of values, 16 bytes; no two different lists share an encoding."""
    state = blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            tag, data = b"s", part.encode()
        elif isinstance(part, bytes):
            tag, data = b"b", part
        else:
            tag, data = b"i", str(index(part)).encode()
        state.update(tag + len(data).to_bytes(8, "little") + data)
    return state.digest()


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers that belong to a key such as (seed, "crop", epoch, position).

    Equal keys give equal numbers on every machine, different keys independent ones (Philox, counter-based).
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest(*key), "little")))


@functools.lru_cache(maxsize=8)
def permutation(n: int, seed: int, name: str, epoch: int) -> NDArray[np.integer]:
    """Order of one epoch: each of 0..n-1 exactly once, (n,), read-only; the last few are kept."""
    narrow = n <= np.iinfo(np.int32).max  # half the memory
    order: NDArray[np.integer] = np.arange(n, dtype=np.int32) if narrow else np.arange(n, dtype=np.int64)
    generator(seed, "order", name, epoch).shuffle(order)
    order.setflags(write=False)
    return order


def index_at(position: int, n: int, seed: int, name: str) -> tuple[int, int]:
    """Epoch, and index of the example, at a position of an endless sequence over n examples.

    Args:
        position: examples of this source that come before, over the whole run.
        n: examples in the source.
        seed: seed of the run.
        name: name of the sequence, so that two sources of one run are shuffled differently.

    Raises:
        ValueError: n is not positive or position is negative.
    """
    if n < 1 or position < 0:
        raise ValueError(f"no example at position {position} of a source with {n} examples")
    epoch, place = divmod(position, n)
    return epoch, int(permutation(n, seed, name, epoch)[place])


def share(total: int, parts: int, part: int) -> range:
    """One part of 0..total-1: contiguous, and no part is longer than another by more than one.

    Raises:
        ValueError: part does not lie in 0..parts-1.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part ({part}) must lie in 0..{parts - 1}")
    return range(part * total // parts, (part + 1) * total // parts)
