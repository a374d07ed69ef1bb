"""Pictures with captions, from a table."""

import os
from array import array
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from beitctl.api import Example, Plugin
from beitctl.data.arrays import Texts
from beitctl.data.order import digest
from beitctl.errors import DataError
from beitctl.report.bars import Bar
from beitctl_plugins.sources.opened import Opened, check_share, existing
from beitctl_plugins.sources.parquet import Parquet
from beitctl_plugins.sources.reading import metadata, names, rows, table_files, table_rows
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.metadata import Grouped, captions_in
from beitctl_plugins.sources.reading.parquet_rows import ParquetRows
from beitctl_plugins.sources.reading.rows import Row, Table, UnusableError, encoded, picture_status, short
from beitctl_plugins.sources.reading.table_files import InGroups
from beitctl_plugins.sources.reading.wording import listed, no_row

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".tsv")


class Pairs(Plugin):
    """Pictures with captions, from a .jsonl, .json, .csv, .tsv or .parquet file.

    A row holds a picture (a path, or in Parquet the bytes) and a caption or a list of them. Rows with the
    same path become one example with all their captions. Rows that cannot be used are left out and listed.
    """

    path: Path
    """The file."""
    image: str = "image"
    """Column of the pictures."""
    caption: str = "caption"
    """Column of the captions."""
    label: str = ""
    """Column of the class; empty: there is none."""
    root: str = ""
    """Folder that the paths of pictures start from; empty: the folder of the file."""
    where: dict[str, str] = Field({})
    """Keep only rows whose columns hold these values, such as ``{ split = "train" }``."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable rows to go on with."""
    check_files: bool = True
    """Whether every picture is looked for before training; without it a missing one shows when it is read."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Tables whose first row has a column of pictures and one of captions; others by name only."""
        if path.suffix.lower() not in rows.ENDINGS or not path.is_file():
            return None
        row = metadata.first_row(path)
        image = metadata.column(row, names.IMAGE_COLUMNS)
        caption = metadata.column(row, names.CAPTION_COLUMNS)
        if not image or not caption or not isinstance(row[image], str):
            doubtful = not row or image or path.suffix.lower() in (".csv", ".tsv")
            return (1, {"path": str(path)}) if doubtful and path.suffix.lower() != ".json" else None
        label = metadata.column(row, names.LABEL_COLUMNS)
        found = {"path": str(path), "image": image, "caption": caption} | ({"label": label} if label else {})
        return 5, found

    def open(self) -> Opened:
        """Read the file and look for every picture.

        Raises:
            DataError: no such file, not readable, nothing usable in it, or too many unusable rows.
        """
        path = existing(self.path)
        if path.suffix.lower() not in ENDINGS or not path.is_file():
            raise DataError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}")
        if path.suffix.lower() == ".parquet" and not self._paths_in(path):
            return self._with_bytes().open()
        table, found, root = self._table(path), _Found(), self._root()
        with Bar(path.name) as counting:
            for row in table.rows():
                if isinstance(row.content, dict) and not metadata.chosen(row.content, self.where):
                    continue
                try:
                    self._take(row, found, root)
                except UnusableError as error:
                    found.problems.append(f"{path.name}:{row.line}: {error}")
                if len(found.starts) % 1000 == 0:
                    counting.at(len(found.starts))
        if not found.starts and not found.problems:
            raise DataError(f"{path}: {no_row(self.where)}")
        check_share(path, found.problems, len(found.starts), self.max_bad_share)
        return self._opened(table, found)

    def _opened(self, table: Table | ParquetRows, found: "_Found") -> Opened:
        first, groups = _grouped(np.frombuffer(found.keys, "S16"))
        every = Texts(np.frombuffer(found.names, np.uint8), np.array(found.name_ends))
        names, starts = Texts.of(every[place] for place in first), np.array(found.starts)
        grouped = Grouped(table, names, groups, starts, np.array(found.ends))
        lengths = np.bincount(groups, np.array(found.caption_bytes)) // np.bincount(
            groups, np.array(found.caption_counts)
        )
        settings = self.model_dump_json(exclude={"path", "root", "max_bad_share", "check_files"})
        own, beside = FileHash.of(table.files, [table.path.name]), FileHash(self._root())
        key = own.key(settings)
        if self.check_files:
            for name, row in zip(names, first.tolist(), strict=True):
                beside.add(name, found.sizes[row], found.modified[row])
            key = beside.key(key)
        state = digest(own.state(), beside.state()).hex()
        lengths = lengths.astype(np.int64)
        if isinstance(table, Table):
            return Opened(grouped, self._example, key, found.problems, lengths=lengths, state=state)
        shards = np.bincount(starts[first], minlength=len(table.sizes)).tolist()  # by the first row of each
        return InGroups(
            grouped,
            self._example,
            key,
            found.problems,
            [count for count in shards if count],
            lengths,
            window=table_files.window(table.sizes, shards),
            state=state,
            notes=table_files.notes(table.path, table.sizes),
        )

    def _root(self) -> str:
        return str(Path(self.root).expanduser() if self.root else self.path.expanduser().parent)

    def _table(self, path: Path) -> Table | ParquetRows:
        columns = [self.image, self.caption, *([self.label] if self.label else []), *self.where]
        return ParquetRows(path, columns) if path.suffix.lower() == ".parquet" else Table(path)

    def _paths_in(self, path: Path) -> bool:
        """Whether a Parquet file holds paths of pictures, and not pictures.

        Raises:
            DataError: it cannot be read, or columns are missing or of a wrong type.
        """
        schema = table_files.opened(path).schema
        columns = table_rows.Columns(self.image, self.caption, self.label, where=self.where)
        table_rows.check_types(path, schema, columns)
        return table_rows.is_text(schema.field(self.image).type)

    def _with_bytes(self) -> Parquet:
        names = ("path", "image", "caption", "label", "root", "where", "max_bad_share")
        return Parquet.model_validate({name: getattr(self, name) for name in names})

    def _take(self, row: Row, found: "_Found", root: str) -> None:
        """Note where a row lies.

        Raises:
            UnusableError: it cannot be used.
        """
        picture, captions, label = self._cells(row.content)
        encoded(label or "")
        status = picture_status(os.path.join(root, picture)) if self.check_files else None
        found.add(row, encoded(picture), status, captions)

    def _cells(self, row: Any) -> tuple[str, tuple[str, ...], str | None]:
        """Picture, captions and class of a row.

        Raises:
            UnusableError: it cannot be used.
        """
        if isinstance(row, UnusableError):
            raise row
        if not isinstance(row, dict):
            raise UnusableError(f"expected an object with columns, found {short(row)}")
        for column in (self.image, self.caption, *([self.label] if self.label else [])):
            if row.get(column) is None:
                raise UnusableError(f"no '{column}'; the row has {listed(row)}")
        captions = captions_in(row[self.caption])
        picture = row[self.image]
        if isinstance(picture, dict):  # as Hugging Face datasets write it
            picture = picture.get("path")
        if not isinstance(picture, str):
            raise UnusableError(f"picture is neither a path nor bytes: {short(picture)}")
        return picture, captions, str(row[self.label]) if self.label else None

    def _example(self, found: tuple[str, list[dict[str, Any]]]) -> Example:
        name, own = found
        cells = [self._cells(row) for row in own]
        captions = tuple(caption for _, some, _ in cells for caption in some)
        return Example(name, Path(self._root(), name), captions, label=cells[-1][2])


def _numbers() -> "array[int]":
    return array("q")


@dataclass
class _Found:
    """Where usable rows lie and what they name, without the rows."""

    names: bytearray = field(default_factory=bytearray)
    name_ends: "array[int]" = field(default_factory=_numbers)
    keys: bytearray = field(default_factory=bytearray)
    """Hashes of the names, 16 bytes each."""
    starts: "array[int]" = field(default_factory=_numbers)
    ends: "array[int]" = field(default_factory=_numbers)
    sizes: "array[int]" = field(default_factory=_numbers)
    """Of the pictures, in bytes."""
    modified: "array[int]" = field(default_factory=_numbers)
    caption_bytes: "array[int]" = field(default_factory=_numbers)
    """Of all captions of a row."""
    caption_counts: "array[int]" = field(default_factory=_numbers)
    """Number of captions of a row."""
    problems: list[str] = field(default_factory=list)

    def add(self, row: Row, name: bytes, status: os.stat_result | None, captions: tuple[str, ...]) -> None:
        """Note a row."""
        self.names += name
        self.name_ends.append(len(self.names))
        self.keys += blake2b(name, digest_size=16).digest()
        self.starts.append(row.start)
        self.ends.append(row.end)
        self.sizes.append(status.st_size if status else 0)
        self.modified.append(status.st_mtime_ns if status else 0)
        self.caption_bytes.append(sum(len(caption.encode()) for caption in captions))
        self.caption_counts.append(len(captions))


def _grouped(keys: NDArray[np.bytes_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Equal keys together: first row of each group in order, and the number of the group of every row."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[group]
