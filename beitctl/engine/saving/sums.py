"""Checksums of the training state: that of a checkpoint, and whether replicas are still equal.

The checksum of a tensor is that of its bits: every row's sum of the bit patterns of its elements times an
odd number that follows from the row's index, added up modulo 2 ** 64. It is exact, does not depend on how
rows are spread over ranks, and changes when a row is changed or stands in another place.
"""

import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from beitctl.engine.dist import Ranks
from beitctl.engine.saving.pieces import Piece
from beitctl.errors import DivergedError

HALF = 2**32


def own_sum(piece: Piece) -> int:
    """What a piece adds to the checksum of its tensor."""
    words = piece.words()
    first = piece.offsets[0] if piece.offsets else 0
    rows = np.arange(first, first + len(words), dtype=np.uint64)
    values = words.sum(axis=1, dtype=np.uint64) * (2 * rows + 1)
    return int(values.sum(dtype=np.uint64))


def added(own: Sequence[int], ranks: Ranks) -> list[int]:
    """Sums over all ranks modulo 2 ** 64; every rank calls it with as many numbers."""
    halves = ranks.sum([float(half) for value in own for half in divmod(value, HALF)])  # exact in fp64
    pairs = zip(halves[::2], halves[1::2], strict=True)
    return [(int(high) * HALF + int(low)) % HALF**2 for high, low in pairs]


Hashes = dict[tuple[int, ...], dict[str, int]]
"""By the ranks that hold the same part: a hash of it by the tensor's name."""


def hashes_of(pieces: Iterable[Piece]) -> Hashes:
    """Hashes of what other ranks hold as well."""
    found: Hashes = {}
    for piece in pieces:
        if len(piece.holders) > 1:
            found.setdefault(piece.holders, {})[piece.name] = zlib.crc32(piece.words().data)
    return found


def check_replicas(own: Hashes, ranks: Ranks) -> None:
    """Compare what several ranks hold alike; every rank calls it, and all raise or none.

    Raises:
        DivergedError: it is not equal. Names the first tensor and the ranks.
    """
    short = [[holders, zlib.crc32(json.dumps(values).encode())] for holders, values in own.items()]
    holders = _different(ranks.gather_objects(short))
    if not holders:
        return
    found = ranks.gather_objects(own.get(holders, {}))
    name = next(name for name in found[holders[0]] if len({found[rank][name] for rank in holders}) > 1)
    sides: dict[int, list[int]] = {}
    for rank in holders:
        sides.setdefault(found[rank][name], []).append(rank)
    against = " and ".join(f"rank{'s' * (len(same) > 1)} {_listed(same)}" for same in sides.values())
    raise DivergedError(
        f"{name} should be the same on ranks {_listed(holders)}, but {against} hold different bits: a GPU, "
        "its memory or its link made an error, or a tensor was changed on some ranks only. Nothing was "
        "saved; check the machines of these ranks, then run the command again"
    )


def _different(everyone: Iterable[Iterable[Any]]) -> tuple[int, ...]:
    """The first group of ranks whose hashes differ; empty if there is none."""
    known: dict[tuple[int, ...], Any] = {}
    for groups in everyone:
        for holders, value in groups:
            if known.setdefault(tuple(holders), value) != value:
                return tuple(holders)
    return ()


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
