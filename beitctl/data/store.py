"""Token store: the codes of fixed views of pictures, in Parquet shards that carry what made them.

K: views of a picture. N: codes of a view. A shard is written whole or not at all. ``store.json``, which
lists the shards and their checksums, comes last: a folder that has it is a complete store.
"""

import errno
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from beitctl.data.images import Crop
from beitctl.errors import CapacityError, DataError, UserError

FORMAT = 1
NAME = "store.json"
META = ("tokenizer", "codes", "grid", "image_px", "views", "source")
"""What a store must say about itself: fingerprint of the tokenizer, number of codes, codes along one side of
a view, side in pixels of the picture that the tokenizer read, views a picture, fingerprint of the source."""
CROP = tuple(field.name for field in fields(Crop))
TYPES: dict[Any, pa.DataType] = {int: pa.int32(), bool: pa.bool_(), float: pa.float64()}
AGAIN = "run tokenize-images again"


class TokenStoreWriter:
    """Writes a token store shard by shard; opened on an unfinished store, it goes on where that stopped.

    Args:
        folder: made if it does not exist.
        meta: the keys of ``META``, and whatever else decides what a shard holds, such as its size.

    Raises:
        ValueError: a key of ``META`` is missing.
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        missing = [key for key in META if key not in meta]
        if missing:
            raise ValueError(f"a token store needs {', '.join(missing)}")
        self.folder = folder
        self.meta = dict(meta)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error

    def done(self) -> set[int]:
        """Numbers of the shards that are there, whole, and of the same ``meta``."""
        return set(self._shards())

    def skipped(self) -> list[str]:
        """One line for each picture that could not be read, of all shards that are there."""
        shards = self._shards()
        return [line for number in sorted(shards) for line in shards[number]["skipped"]]

    def write_shard(
        self,
        number: int,
        ids: Sequence[str],
        crops: Sequence[Sequence[Crop]],
        codes: NDArray[np.uint16],
        skipped: Sequence[str] = (),
    ) -> None:
        """Write one shard.

        Args:
            number: of the shard, from 0.
            ids: of n pictures.
            crops: K for each picture.
            codes: (n, K, N) of their views.
            skipped: one line for each picture that belongs here but could not be read.

        Raises:
            ValueError: shapes do not fit, or a code is out of range.
            CapacityError: the disk is full.
            UserError: the folder cannot be written.
        """
        shape = (len(ids), self.meta["views"], self.meta["grid"] ** 2)
        if codes.shape != shape or [len(views) for views in crops] != [shape[1]] * shape[0]:
            raise ValueError(
                f"codes of shape {codes.shape} with {len(crops)} lists of crops, expected {shape}"
            )
        if codes.size and int(codes.max()) >= self.meta["codes"]:
            raise ValueError(f"code {int(codes.max())} in a codebook of {self.meta['codes']}")
        head = {"beitctl": json.dumps({"meta": self.meta, "skipped": list(skipped)})}
        buffer = pa.BufferOutputStream()
        table = _table(ids, crops, codes).replace_schema_metadata(head)
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        _write(self.folder / _shard_name(number), buffer.getvalue().to_pybytes())

    def finish(self) -> Path:
        """Write ``store.json``, which makes the store complete; gives its path.

        Raises:
            DataError: a shard before the last one is missing, or a picture is in two shards.
            CapacityError: the disk is full.
        """
        shards = self._shards()
        gaps = sorted(set(range(max(shards, default=0) + 1)) - set(shards))
        if gaps:
            raise DataError(f"{self.folder / _shard_name(gaps[0])}: missing or damaged; {AGAIN}")
        ordered = [shards[number] for number in sorted(shards)]
        ids = [id for entry in ordered for id in entry["ids"]]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise DataError(f"{self.folder}: '{twice}' is in it twice; ids of a source must be unique")
        listed = {
            _shard_name(number): {key: entry[key] for key in ("rows", "bytes", "sha256")}
            for number, entry in zip(sorted(shards), ordered, strict=True)
        }
        record = {"format": FORMAT, **self.meta, "pictures": len(ids)}
        record |= {"skipped": [line for entry in ordered for line in entry["skipped"]], "shards": listed}
        _write(self.folder / NAME, (json.dumps(record, indent=1) + "\n").encode())
        return self.folder / NAME

    def _shards(self) -> dict[int, dict[str, Any]]:
        """The usable shards by number."""
        found = {}
        for path in sorted(self.folder.glob("tokens-[0-9][0-9][0-9][0-9][0-9].parquet")):
            entry = self._usable(path.read_bytes())
            if entry:
                found[int(path.stem.removeprefix("tokens-"))] = entry
        return found

    def _usable(self, data: bytes) -> dict[str, Any] | None:
        """What ``store.json`` says about a shard, or None if it is damaged or of another store."""
        try:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            head = json.loads((table.schema.metadata or {}).get(b"beitctl", b"{}"))
        except (pa.ArrowException, OSError, ValueError):
            return None
        if head.get("meta") != json.loads(json.dumps(self.meta)):
            return None
        return _entry(data, table.column("id").to_pylist()[:: self.meta["views"]], head["skipped"])


class TokenStore:
    """A complete token store, in memory."""

    def __init__(self, folder: Path, record: Mapping[str, Any], tables: Sequence[pa.Table]) -> None:
        self.folder = folder
        self.tokenizer: str = record["tokenizer"]
        self.source: str = record["source"]
        self.codes: int = record["codes"]
        self.grid: int = record["grid"]
        self.image_px: int = record["image_px"]
        self.views: int = record["views"]
        self.skipped: list[str] = record["skipped"]
        table = pa.concat_tables(tables)
        self.ids: list[str] = table.column("id").to_pylist()[:: self.views]
        self._place = {id: place for place, id in enumerate(self.ids)}
        self._crops = [table.column(name).to_numpy() for name in CROP]
        flat = [chunk.flatten().to_numpy() for chunk in table.column("codes").chunks]
        self._codes = np.concatenate(flat).reshape(len(self.ids), self.views, self.grid**2)

    @classmethod
    def open(cls, folder: Path, *, expect: Mapping[str, Any] | None = None) -> Self:
        """Read and verify a store.

        Args:
            folder: that holds ``store.json``.
            expect: what ``store.json`` must say, such as ``{"tokenizer": fingerprint, "grid": 14}``.

        Raises:
            DataError: not complete, damaged, of another format, or not what was expected.
        """
        try:
            record = json.loads((folder / NAME).read_bytes())
        except FileNotFoundError as error:
            raise DataError(f"{folder}: no complete token store (it has no {NAME}); {AGAIN}") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / NAME}: cannot be read ({error}); {AGAIN}") from error
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise DataError(f"{folder / NAME}: not a token store of format {FORMAT}; {AGAIN}")
        for key, wanted in (expect or {}).items():
            if record.get(key) != wanted:
                raise DataError(
                    f"{folder}: made with {key} = {record.get(key)!r}, but this run needs {wanted!r}; {AGAIN}"
                )
        if not record["pictures"]:
            raise DataError(f"{folder}: the token store holds no picture; check the source, then {AGAIN}")
        shards = record["shards"].items()
        return cls(folder, record, [_read_shard(folder / name, entry) for name, entry in shards])

    def view(self, id: str, number: int) -> tuple[Crop, NDArray[np.int64]]:
        """Crop and codes (N,) of one view of a picture.

        Raises:
            DataError: there is no such picture in the store.
            ValueError: there is no such view.
        """
        if id not in self._place:
            raise DataError(f"{self.folder}: no codes of picture '{id}'; {AGAIN} on the source of this run")
        if not 0 <= number < self.views:
            raise ValueError(f"view {number} of {self.views}")
        place = self._place[id]
        crop = Crop(*(column[place * self.views + number].item() for column in self._crops))
        return crop, self._codes[place, number].astype(np.int64)


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.parquet"


def _entry(data: bytes, ids: list[str], skipped: list[str]) -> dict[str, Any]:
    size, checksum = len(data), sha256(data).hexdigest()
    return {"ids": ids, "skipped": skipped, "rows": len(ids), "bytes": size, "sha256": checksum}


def _table(ids: Sequence[str], crops: Sequence[Sequence[Crop]], codes: NDArray[np.uint16]) -> pa.Table:
    """One row a view: id, number of the view, its crop and its codes."""
    _, views, length = codes.shape
    flat = [asdict(crop) for row in crops for crop in row]
    columns = {
        "id": pa.array(np.repeat(np.asarray(ids, dtype=object), views), pa.string()),
        "view": pa.array(np.tile(np.arange(views, dtype=np.int32), len(ids))),
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


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"{path}: the disk is full; free {len(data) / 2**20:.1f} MiB and run the command again"
            raise CapacityError(text) from error
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
