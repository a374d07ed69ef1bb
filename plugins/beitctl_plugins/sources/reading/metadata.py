"""What rows of a table say about pictures: captions and classes."""

import contextlib
import json
import posixpath
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from beitctl.data.arrays import Texts
from beitctl.data.order import digest
from beitctl.errors import DataError
from beitctl.report.naming import printable
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.rows import (
    ENDINGS,
    Table,
    UnusableError,
    encoded,
    megabytes,
    short,
)
from beitctl_plugins.sources.reading.wording import listed

NAME = "file_name"
"""Column of the pictures beside the table, by the convention of Hugging Face."""
CAPTION_BYTES = 2**20
"""Longer captions are left out."""


class Rows(Protocol):
    """A table whose rows can be read again."""

    def row(self, start: int, end: int) -> dict[str, Any]:
        """The row that was found there."""
        ...


class Grouped(Sequence[tuple[str, list[dict[str, Any]]]]):
    """Names of examples, and the rows of each, which are read again from their table."""

    def __init__(
        self,
        table: Rows,
        names: Texts,
        groups: NDArray[np.int64],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> None:
        """Bring rows of one group together.

        Args:
            table: where the rows are.
            names: of the examples.
            groups: per row the number of its example.
            starts: per row where it begins, as the table says.
            ends: per row where it ends.
        """
        order = np.argsort(groups, kind="stable")
        self.table, self.names = table, names
        self._starts, self._ends = starts[order], ends[order]
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=len(names)))])

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> tuple[str, list[dict[str, Any]]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, list[dict[str, Any]]]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        spans = range(int(self._bounds[place]), int(self._bounds[place + 1]))
        return self.names[place], [
            self.table.row(int(self._starts[span]), int(self._ends[span])) for span in spans
        ]


class Metadata:
    """Captions and classes of the pictures of a folder, from a table with a column ``file_name``."""

    def __init__(self, path: Path, caption: str, label: str) -> None:
        self.table = Table(path)
        self.caption, self.label = caption, label

    def rows_of(self, names: Texts, problems: list[str]) -> tuple[Grouped, NDArray[np.int64]]:
        """Rows of every picture, and how many bytes one of its captions has.

        Raises:
            DataError: the table cannot be read, or has not a column that was asked for.
        """
        file = self.table.path
        places = {name: place for place, name in enumerate(names)}
        groups, starts, ends = array("q"), array("q"), array("q")
        sizes, counts = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
        columns: set[str] = set()
        for row in self.table.rows():
            try:
                place = self._place(row.content, places)
                columns.update(row.content)
                groups.append(place)
                starts.append(row.start)
                ends.append(row.end)
                captions = self._captions(row.content)
                counts[place] += len(captions)
                sizes[place] += sum(len(caption.encode()) for caption in captions)
                self._label(row.content)
            except UnusableError as error:
                problems.append(f"{file.name}:{row.line}: {error}")
        self._need(columns)
        grouped = np.array(groups)
        there = np.bincount(grouped, minlength=len(names))
        bare = np.flatnonzero(there == 0).tolist()
        problems += [f"{printable(names[place])}: no row in {file.name}; kept as it is" for place in bare]
        rows = Grouped(self.table, names, grouped, np.array(starts), np.array(ends))
        return rows, sizes // np.maximum(counts, 1)

    def said(self, rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], str | None]:
        """Captions and class that the rows of one picture give; the last class counts."""
        captions: list[str] = []
        label = None
        for row in rows:
            with contextlib.suppress(UnusableError):  # listed when it was opened
                captions += self._captions(row)
            with contextlib.suppress(UnusableError):
                label = self._label(row) or label
        return tuple(captions), label

    def fingerprint(self, folder: str) -> str:
        """Hash of the table and its folder."""
        return FileHash.of(self.table.files, [self.table.path.name]).key(folder, self.caption, self.label)

    def state(self, folder: str) -> str:
        """Hash that changes whenever the table or a file of its folder was touched."""
        return digest(folder, FileHash.of(self.table.files).state()).hex()

    def _place(self, row: Any, places: Mapping[str, int]) -> int:
        if isinstance(row, UnusableError):
            raise row
        if not isinstance(row, dict):
            raise UnusableError(f"expected an object with columns, found {short(row)}")
        name = row.get(NAME)
        if not isinstance(name, str):
            raise UnusableError(f"no '{NAME}'; the row has {listed(row)}")
        place = places.get(name)
        place = places.get(posixpath.normpath(name)) if place is None else place
        if place is None:
            raise UnusableError(f"no picture {short(name)} in the folder")
        return place

    def _captions(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        value = row.get(self.caption)
        if value is None and self.caption == "caption":
            value = row.get("text")
        return () if value is None else captions_in(value)

    def _label(self, row: Mapping[str, Any]) -> str | None:
        value = row.get(self.label)
        if value is None or value == "":
            return None
        encoded(str(value))
        return str(value)

    def _need(self, columns: set[str]) -> None:
        for wanted, usual in ((self.caption, "caption"), (self.label, "label")):
            if wanted not in (usual, *columns):
                raise DataError(f"{self.table.path}: no column '{wanted}'; it has {listed(sorted(columns))}")


def found_in(root: Path, setting: str, problems: list[str]) -> Path | None:
    """The table of a folder: the one that a setting names, or ``metadata.csv`` or ``metadata.jsonl``.

    Raises:
        DataError: the named one is missing or names no pictures, or there are two.
    """
    if setting:
        path = root / Path(setting).expanduser()
        if path.suffix.lower() not in ENDINGS or not path.is_file():
            raise DataError(
                f"{path}: no such file that ends in {', '.join(ENDINGS)}; correct 'metadata', which is "
                "relative to the folder"
            )
        if NAME not in (row := first_row(path)):
            raise DataError(f"{path}: no column '{NAME}'; it has {listed(row)}")
        return path
    found = [path for kind in ("csv", "jsonl") if (path := root / f"metadata.{kind}").is_file()]
    if len(found) > 1:
        raise DataError(f"{root}: both metadata.csv and metadata.jsonl; name one in 'metadata'")
    for path in found:
        if NAME in first_row(path):
            return path
        problems.append(f"{path.name}: not used, as it has no column '{NAME}'")
    return None


def captions_in(value: Any) -> tuple[str, ...]:
    """Captions in a cell; blank ones are dropped where others are left.

    Raises:
        UnusableError: it holds no text, not only text, or too much.
    """
    found = value if isinstance(value, list) else [value]
    kept = [caption for caption in found if not isinstance(caption, str | None) or (caption or "").strip()]
    if not kept or not all(isinstance(caption, str) for caption in kept):
        raise UnusableError(f"caption is not text: {short(value)}")
    for caption in kept:
        if len(caption) > CAPTION_BYTES or len(encoded(caption)) > CAPTION_BYTES:
            raise UnusableError(
                f"caption is longer than {megabytes(CAPTION_BYTES)} ({len(caption):,} characters)"
            )
    return tuple(" ".join(caption.split()) for caption in kept)


def first_row(path: Path) -> dict[str, Any]:
    """First usable row of a table, to guess from; empty where there is none."""
    try:
        if path.suffix.lower() == ".json":
            with path.open("rb") as file:
                text = file.read(2**20).decode(errors="replace").lstrip("\ufeff \t\r\n")
            found = iter([json.JSONDecoder().raw_decode(text[1:].lstrip())[0]] if text[:1] == "[" else [])
        else:
            found = (row.content for row in islice(Table(path).rows(), 5))
        return next((content for content in found if isinstance(content, dict)), {})
    except (DataError, OSError, ValueError, RecursionError):
        return {}


def column(names: Iterable[str], wanted: Sequence[str]) -> str:
    """The first wanted name that is there, in any case; empty where none is."""
    there = {name.lower(): name for name in reversed(list(names)) if isinstance(name, str)}
    return next((there[name] for name in wanted if name in there), "")


def chosen(row: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    """Whether the columns of a row hold the given values."""
    return all(str(row.get(key)) == value for key, value in where.items())
