"""Shards, the same bytes for the same examples: Parquet, and tar in img2dataset's layout."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from beitctl.data.tar_keys import key

GROUP_BYTES = 16 * 2**20
"""A row group of Parquet holds at most this much, so that one example is read without much else."""
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("label", pa.string()),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class Ready:
    """An example as it is written."""

    id: str
    image: bytes | None
    """A JPEG."""
    captions: tuple[str, ...] = ()
    label: str | None = None
    text: str | None = None
    copied: bool = False
    """Whether the picture is as it was, byte for byte."""

    @property
    def size(self) -> int:
        """Bytes that it adds to a shard, about."""
        words = sum(
            len(part.encode()) for part in (self.id, *self.captions, self.label or "", self.text or "")
        )
        return words + len(self.image or b"")


class Hashed:
    """A file that is written once, from the beginning, and its hash."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file: BinaryIO | None = file
        self._state = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        """Write bytes."""
        view = memoryview(data)
        if self._file is not None:
            self._file.write(view)
        self._state.update(view)
        self.size += view.nbytes
        return view.nbytes

    def abandon(self) -> None:
        """Write nothing any more: who writes here must still be closed."""
        self._file = None

    def tell(self) -> int:
        """Number of bytes so far."""
        return self.size

    def flush(self) -> None:
        """Leave it to who opened the file."""

    def close(self) -> None:
        """Leave it to who opened the file."""

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def hexdigest(self) -> str:
        """SHA-256 of all bytes so far."""
        return self._state.hexdigest()


class Shard(Protocol):
    """A shard that is being written."""

    def add(self, ready: Ready) -> None:
        """Write an example."""
        ...

    def close(self) -> None:
        """Write the end."""
        ...


class ParquetShard:
    """Rows with id, image, captions, label and text."""

    def __init__(self, file: Hashed) -> None:
        compressed = {name: "NONE" if name == "image" else "ZSTD" for name in SCHEMA.names}
        compressed["captions.list.element"] = compressed.pop("captions")
        # statistics tell readers that no picture is missing; pyarrow repeats no large ones in them
        self._writer = pq.ParquetWriter(
            file, SCHEMA, compression=compressed, use_dictionary=False, write_statistics=True
        )
        self._rows: list[Ready] = []
        self._size = 0

    def add(self, ready: Ready) -> None:
        """Write an example, together with those that fit into a row group."""
        if self._rows and self._size + ready.size > GROUP_BYTES:
            self._flush()
        self._rows.append(ready)
        self._size += ready.size

    def close(self) -> None:
        """Write the last group and the table of contents."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            columns = {
                name: [list(row.captions) if name == "captions" else getattr(row, name) for row in self._rows]
                for name in SCHEMA.names
            }
            table = pa.table(columns, schema=SCHEMA)
            self._writer.write_table(table, row_group_size=len(self._rows))
        self._rows, self._size = [], 0


class TarShard:
    """``KEY.jpg``, ``KEY.txt``, ``KEY.cls`` and ``KEY.json`` for each example."""

    def __init__(self, file: Hashed) -> None:
        stream: Any = file
        self._tar = tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, ready: Ready) -> None:
        """Write an example."""
        name = key(ready.id)
        for ending, content in _members(ready):
            member = tarfile.TarInfo(f"{name}.{ending}")  # no time, no owner: the same bytes on every machine
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self._tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them

    def close(self) -> None:
        """Write the end."""
        self._tar.close()


def _members(ready: Ready) -> Iterator[tuple[str, bytes]]:
    yield "jpg", ready.image or b""
    if ready.captions:
        yield "txt", ready.captions[0].encode()
    if ready.label is not None:
        yield "cls", ready.label.encode()
    row = {"id": ready.id, "captions": list(ready.captions), "label": ready.label, "text": ready.text}
    yield "json", json.dumps(row, ensure_ascii=False).encode()
