"""What the files of a token store look like, and how they are laid out in memory or in the cache.

K: views of a picture. N: codes of a view.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from beitctl.data.arrays import Arrays, New, filled
from beitctl.data.images import Crop
from beitctl.data.order import digest
from beitctl.errors import DataError

FORMAT = 2
"""2: shards carry the fingerprint of every picture, and ``store.json`` all that decides what a view shows."""
NAME = "store.json"
PIXELS = {"decoding": 2, "interpolation": "bicubic"}
"""How pixels come from the bytes of a picture; ``decoding`` counts the changes of ``beitctl.data.images``
that alter them."""
META = (
    "tokenizer",
    "codes",
    "grid",
    "image_px",
    "views",
    "source",
    "crop_scale",
    "jitter",
    "seed",
    "precision",
    "batch",
)
"""What a store must say about itself: fingerprint of the tokenizer, number of codes, codes along one side of
a view, side in pixels of the picture that the tokenizer read, views a picture, fingerprint of the source, how
views were drawn, the type that the tokenizer computed in, and views that it read at once."""
CROP = tuple(field.name for field in fields(Crop))
TYPES: dict[Any, pa.DataType] = {int: pa.int32(), bool: pa.bool_(), float: pa.float64()}
NUMBERS: dict[Any, Any] = {int: np.int32, bool: np.bool_, float: np.float64}
SMALL_BYTES = 64 * 2**20
"""Stores up to this size are read into memory whenever they are opened."""
AGAIN = "run tokenize-images again"
MOST_CODES = 2**16


@dataclass(frozen=True)
class Row:
    """What a store says about one picture besides its codes."""

    id: str
    picture: bytes
    """Its ``picture_hash``."""
    crops: Sequence[Crop]
    """K of them."""


def shard_name(number: int) -> str:
    """Name of the file of a shard."""
    return f"tokens-{number:05d}.parquet"


def table_of(rows: Sequence[Row], codes: NDArray[np.uint16]) -> pa.Table:
    """One row a view: id, number of the view, hash of the picture, its crop and its codes."""
    _, views, length = codes.shape
    flat = [asdict(crop) for row in rows for crop in row.crops]
    columns = {
        "id": pa.array([row.id for row in rows for _ in range(views)], pa.string()),
        "view": pa.array(np.tile(np.arange(views, dtype=np.int32), len(rows))),
        "picture": pa.array([row.picture for row in rows for _ in range(views)], pa.binary(16)),
    }
    for field in fields(Crop):
        columns[field.name] = pa.array([crop[field.name] for crop in flat], TYPES[field.type])
    values = pa.array(np.ascontiguousarray(codes, dtype=np.uint16).reshape(-1))
    columns["codes"] = pa.FixedSizeListArray.from_arrays(values, length)
    return pa.table(columns)


def _read_shard(path: Path, entry: Mapping[str, Any]) -> pa.Table:
    """A shard, once size and checksum are those of ``store.json``."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from error
    if len(data) != entry["bytes"]:
        raise DataError(f"{path}: has {len(data)} bytes, but {NAME} says {entry['bytes']}; {AGAIN}")
    if sha256(data).hexdigest() != entry["sha256"]:
        raise DataError(f"{path}: its checksum is not the one in {NAME}, so it is damaged; {AGAIN}")
    return pq.read_table(pa.BufferReader(data))


def hash_of(id: str) -> np.uint64:
    """Number by which an id is looked up; two ids may share one."""
    return np.uint64(int.from_bytes(digest(id)[:8], "little"))


def arrays_of(folder: Path, record: Mapping[str, Any]) -> Arrays:
    """All that a store holds; large ones from the cache, whose shards were verified when they went there."""
    shards = [(folder / name, entry) for name, entry in record["shards"].items()]
    if sum(entry["bytes"] for _, entry in shards) <= SMALL_BYTES:
        arrays: Arrays = {}
        _fill(shards, record, lambda name, shape, kind: arrays.setdefault(name, np.zeros(shape, kind)))
        return arrays
    try:
        states = [path.stat() for path, _ in shards]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); {AGAIN}") from error
    times = [f"{state.st_size} {state.st_mtime_ns}" for state in states]
    key = digest(1, json.dumps(record, sort_keys=True), *times).hex()
    return filled("tokens", key, lambda new: _fill(shards, record, new))


def _fill(shards: Sequence[tuple[Path, Mapping[str, Any]]], record: Mapping[str, Any], new: New) -> None:
    """Verify all shards and lay out what they hold, one after the other."""
    views, length, count = record["views"], record["grid"] ** 2, record["pictures"]
    codes = new("codes", (count, views, length), np.uint16)
    pictures = new("pictures", (count, 16), np.uint8)
    crops = {field.name: new(field.name, (count * views,), NUMBERS[field.type]) for field in fields(Crop)}
    hashes, block, ends = np.zeros(count, np.uint64), bytearray(), np.zeros(count, np.int64)
    row = 0
    for path, entry in shards:
        table = _read_shard(path, entry)
        ids = table.column("id").to_pylist()[::views]
        mine = slice(row, row + len(ids))
        if mine.stop > count or table.num_rows != len(ids) * views:
            raise DataError(f"{path}: does not hold the pictures that {NAME} says; {AGAIN}")
        flat = [chunk.flatten().to_numpy() for chunk in table.column("codes").chunks]
        codes[mine] = np.concatenate([np.zeros(0, np.uint16), *flat]).reshape(len(ids), views, length)
        data = b"".join(table.column("picture").take(np.arange(len(ids)) * views).to_pylist())
        pictures[mine] = np.frombuffer(data, np.uint8).reshape(-1, 16)
        for name, column in crops.items():
            column[mine.start * views : mine.stop * views] = table.column(name).to_numpy()
        for place, id in enumerate(ids, row):
            block += id.encode()
            ends[place], hashes[place] = len(block), hash_of(id)
        row = mine.stop
    order = np.argsort(hashes, kind="stable")
    for name, array in (
        ("ids", np.frombuffer(bytes(block), np.uint8)), ("ends", ends), ("hashes", hashes[order]),
        ("places", order),
    ):  # fmt: skip
        new(name, array.shape, array.dtype)[...] = array
