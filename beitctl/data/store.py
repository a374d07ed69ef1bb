"""Token store: the codes of fixed views of pictures, in Parquet shards that carry what made them.

K: views of a picture. N: codes of a view. A shard is written whole or not at all, and nothing in it depends
on when, where or by how many processes it was written. ``store.json``, which lists the shards and their
checksums, comes last: a folder that has it is a complete store.
"""

import errno
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from beitctl.data.arrays import Arrays, Texts
from beitctl.data.images import Crop
from beitctl.data.store_format import (
    AGAIN,
    CROP,
    FORMAT,
    META,
    MOST_CODES,
    NAME,
    PIXELS,
    Row,
    arrays_of,
    hash_of,
    shard_name,
    table_of,
)
from beitctl.errors import CapacityError, DataError, UserError


def picture_hash(data: bytes) -> bytes:
    """Fingerprint of an encoded picture: blake2b, 16 bytes."""
    return blake2b(data, digest_size=16).digest()


@dataclass(frozen=True)
class Shard:
    """A shard that is there and whole."""

    ids: list[str]
    skipped: list[str]
    """One line for each picture that belongs to it but could not be read."""
    bytes: int
    sha256: str


class TokenStoreWriter:
    """Writes a token store shard by shard; opened on an unfinished store, it goes on where that stopped.

    Ranks of one job may write to one store at once; ``beitctl.data.lock`` keeps other jobs away.

    Args:
        folder: made if it does not exist.
        meta: the keys of ``META``, and whatever else decides what a shard holds, such as its size.

    Raises:
        ValueError: a key of ``META`` is missing.
        UserError: the folder cannot be written, or there are more codes than 16 bits can tell apart.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        missing = [key for key in META if key not in meta]
        if missing:
            raise ValueError(f"a token store needs {', '.join(missing)}")
        if meta["codes"] > MOST_CODES:
            raise UserError(
                f"a token store holds up to {MOST_CODES} codes, the tokenizer has {meta['codes']}"
            )
        self.folder = folder
        self.meta: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **meta, **PIXELS}))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --out") from error

    def clear(self) -> None:
        """Remove what an earlier run wrote, the mark of completeness first."""
        for path in (self.folder / NAME, *sorted(self.folder.glob("tokens-*.parquet*"))):
            path.unlink(missing_ok=True)

    def done(self, numbers: Iterable[int]) -> set[int]:
        """Which of some shards are there and whole.

        Raises:
            UserError: one is of a store with other settings; names them.
        """
        return {number for number in numbers if self._shard(number) is not None}

    def shards(self, count: int) -> list[Shard]:
        """All shards of the store, read and checked.

        Raises:
            DataError: one is missing or damaged.
            UserError: one is of a store with other settings; names them.
        """
        found = []
        for number in range(count):
            shard = self._shard(number)
            if shard is None:
                raise DataError(f"{self.folder / shard_name(number)}: missing or damaged; {AGAIN}")
            found.append(shard)
        return found

    def write_shard(
        self, number: int, rows: Sequence[Row], codes: NDArray[np.uint16], skipped: Sequence[str] = ()
    ) -> None:
        """Write one shard.

        Args:
            number: of the shard, from 0.
            rows: of n pictures.
            codes: (n, K, N) of their views.
            skipped: one line for each picture that belongs here but could not be read.

        Raises:
            ValueError: shapes do not fit, or a code is out of range.
            CapacityError: the disk is full.
            UserError: the folder cannot be written.
        """
        shape = (len(rows), self.meta["views"], self.meta["grid"] ** 2)
        if codes.shape != shape or [len(row.crops) for row in rows] != [shape[1]] * shape[0]:
            raise ValueError(
                f"codes of shape {codes.shape} with {len(rows)} lists of crops, expected {shape}"
            )
        if codes.size and int(codes.max()) >= self.meta["codes"]:
            raise ValueError(f"code {int(codes.max())} in a codebook of {self.meta['codes']}")
        head = {"beitctl": json.dumps({"meta": self.meta, "skipped": list(skipped)})}
        buffer = pa.BufferOutputStream()
        table = table_of(rows, codes).replace_schema_metadata(head)
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        write_whole(self.folder / shard_name(number), buffer.getvalue().to_pybytes())

    def finish(self, shards: Sequence[Shard], made: Mapping[str, Any] | None = None) -> Path:
        """Write ``store.json``, which makes the store complete; gives its path.

        Args:
            shards: all of them, from ``shards``.
            made: when, where and with which versions; the only part that another run may make otherwise.

        Raises:
            DataError: a picture is in it twice.
            CapacityError: the disk is full.
        """
        ids = [id for shard in shards for id in shard.ids]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise DataError(f"{self.folder}: '{twice}' is in it twice; ids of a source must be unique")
        listed = {
            shard_name(number): {"rows": len(shard.ids), "bytes": shard.bytes, "sha256": shard.sha256}
            for number, shard in enumerate(shards)
        }
        record = {**self.meta, "made": dict(made or {}), "pictures": len(ids)}
        record |= {"skipped": [line for shard in shards for line in shard.skipped], "shards": listed}
        write_whole(self.folder / NAME, (json.dumps(record, indent=1) + "\n").encode())
        return self.folder / NAME

    def _shard(self, number: int) -> Shard | None:
        """A shard, or None if it is missing or damaged."""
        path = self.folder / shard_name(number)
        try:
            data = path.read_bytes()
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            head = json.loads((table.schema.metadata or {})[b"beitctl"])
            meta, skipped = {"format": 1, **head["meta"]}, head["skipped"]
        except (pa.ArrowException, OSError, ValueError, LookupError, TypeError):
            return None
        if meta != self.meta:
            raise UserError(
                f"{path} is of a store with other settings: {_differences(meta, self.meta)}; choose another "
                f"folder with --out, or delete {self.folder}"
            )
        ids = table.column("id").to_pylist()[:: self.meta["views"]]
        return Shard(ids, skipped, len(data), sha256(data).hexdigest())


class TokenStore:
    """A complete token store: in memory if it is small, else memory-mapped from the cache."""

    def __init__(self, folder: Path, record: Mapping[str, Any], arrays: Arrays) -> None:
        self.folder = folder
        self.tokenizer: str = record["tokenizer"]
        self.source: str = record["source"]
        self.codes: int = record["codes"]
        self.grid: int = record["grid"]
        self.image_px: int = record["image_px"]
        self.views: int = record["views"]
        self.crop_scale: tuple[float, float] = (record["crop_scale"][0], record["crop_scale"][1])
        self.jitter: float = record["jitter"]
        self.seed: int = record["seed"]
        self.precision: str = record["precision"]
        self.batch: int = record["batch"]
        self.skipped: list[str] = record["skipped"]
        self.sizes: list[int] = [entry["rows"] for entry in record["shards"].values()]
        """Pictures of every shard."""
        self.ids = Texts(arrays["ids"], arrays["ends"])
        self._hashes, self._places = arrays["hashes"], arrays["places"]
        self._pictures, self._codes = arrays["pictures"], arrays["codes"]
        self._crops = [arrays[name] for name in CROP]

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
            found = (
                f", but of format {record['format']}"
                if isinstance(record, dict) and "format" in record
                else ""
            )
            raise DataError(f"{folder / NAME}: not a token store of format {FORMAT}{found}; {AGAIN}")
        for key, wanted in {**PIXELS, **(expect or {})}.items():
            if record.get(key) != json.loads(json.dumps(wanted)):
                raise DataError(
                    f"{folder}: made with {key} = {record.get(key)!r}, but this run needs {wanted!r}; {AGAIN}"
                )
        missing = [key for key in (*META, "pictures", "skipped", "shards") if key not in record]
        if missing:
            raise DataError(f"{folder / NAME}: does not say {', '.join(missing)}; {AGAIN}")
        if not record["pictures"]:
            raise DataError(f"{folder}: the token store holds no picture; check the source, then {AGAIN}")
        return cls(folder, record, arrays_of(folder, record))

    def __contains__(self, id: str) -> bool:
        return self._find(id) is not None

    def view(self, id: str, number: int) -> tuple[Crop, NDArray[np.int64]]:
        """Crop and codes (N,) of one view of a picture.

        Raises:
            DataError: there is no such picture in the store.
            ValueError: there is no such view.
        """
        place = self._row(id)
        if not 0 <= number < self.views:
            raise ValueError(f"view {number} of {self.views}")
        crop = Crop(*(column[place * self.views + number].item() for column in self._crops))
        return crop, self._codes[place, number].astype(np.int64)

    def picture(self, id: str) -> bytes:
        """The ``picture_hash`` of a picture when its codes were made.

        Raises:
            DataError: there is no such picture in the store.
        """
        return bytes(self._pictures[self._row(id)])

    def usage(self) -> NDArray[np.int64]:
        """How often each code stands in the store, (codes,)."""
        counts = np.zeros(self.codes, np.int64)
        for codes in np.array_split(self._codes, max(1, len(self.ids) // 4096)):
            counts += np.bincount(codes.ravel(), minlength=self.codes)
        return counts

    def _row(self, id: str) -> int:
        found = self._find(id)
        if found is None:
            raise DataError(f"{self.folder}: no codes of picture '{id}'; {AGAIN} on the source of this run")
        return found

    def _find(self, id: str) -> int | None:
        """Row of a picture, by the hash of its id."""
        wanted = hash_of(id)
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self._hashes) and self._hashes[place] == wanted:
            if self.ids[row := int(self._places[place])] == id:
                return row
            place += 1
        return None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        CapacityError: the disk is full.
        UserError: it cannot be written.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"{path}: the disk is full; free {len(data) / 2**20:.1f} MiB and run the command again"
            raise CapacityError(text) from error
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [*now, *(key for key in then if key not in now)]
    return ", ".join(
        f"{key} was {json.dumps(then.get(key))}, is {json.dumps(now.get(key))}"
        for key in keys
        if then.get(key) != now.get(key)
    )
