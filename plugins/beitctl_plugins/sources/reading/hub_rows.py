"""Rows of a Hub data set, judged and made into examples."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from beitctl.api import Example
from beitctl.data.order import digest
from beitctl.errors import DataError
from beitctl.report.bars import Bar
from beitctl_plugins.sources import opened as sources
from beitctl_plugins.sources.reading import table_rows
from beitctl_plugins.sources.reading.metadata import captions_in
from beitctl_plugins.sources.reading.rows import Files, UnusableError
from beitctl_plugins.sources.reading.table_files import BROKEN, one_line
from beitctl_plugins.sources.reading.table_rows import Columns, Judge

BATCH = 1024


class Rows(Protocol):
    """Some columns of all rows."""

    def cells(self, place: int) -> dict[str, Any]:
        """One row."""
        ...


class Loaded:
    """Rows of a data set on disk, memory-mapped."""

    def __init__(self, data: Any, files: Files) -> None:
        self.data, self.files = data, files

    def cells(self, place: int) -> dict[str, Any]:
        """One row."""
        if count := len(self.files.paths):
            self.files.unchanged(place % count)  # one in turn, as there may be thousands
        try:
            found: dict[str, Any] = self.data[place]
        except BROKEN as error:
            raise DataError(
                f"row {place} cannot be read ({one_line(error)}); download the set again"
            ) from error
        return found


@dataclass(frozen=True)
class Reader:
    """Makes examples of rows."""

    place: str
    """What comes before the names of rows in messages."""
    split: str
    folder: Path | None
    """Where the data set is, if it is in a local folder."""
    columns: Columns
    classes: Sequence[str]
    """Names of the classes."""
    need_caption: bool
    rows: Rows
    labels: Rows
    """The column of the class alone."""
    prose: Rows
    """The columns of captions and text alone."""

    def example(self, place: int) -> Example:
        """Example of one row.

        Raises:
            ChangedError: a file is not what it was.
            DataError: the row cannot be used.
        """
        cells, name = self.rows.cells(int(place)), f"{self.split}[{place}]"
        image = self._picture(cells[self.columns.image], name) if self.columns.image else None
        captions, text = self._words(cells, name)
        own = str(cells[self.columns.id]) if self.columns.id else name
        return Example(own, image, captions, text, self._label(cells))

    def label(self, place: int) -> str | None:
        """Class of one row; reads no other column."""
        return self._label(self.labels.cells(int(place)))

    def words(self, place: int) -> tuple[str, ...]:
        """Captions and text of one row; reads no other column."""
        captions, text = self._words(self.prose.cells(int(place)), f"{self.split}[{place}]")
        return (*captions, *([text] if text else []))

    def _label(self, cells: dict[str, Any]) -> str | None:
        label = cells.get(self.columns.label)
        if isinstance(label, int) and self.classes:
            label = self.classes[label] if 0 <= label < len(self.classes) else None
        return None if label is None else str(label)

    def _words(self, cells: dict[str, Any], name: str) -> tuple[tuple[str, ...], str | None]:
        """Captions, and the text."""
        columns = self.columns
        text = cells[columns.text].strip() if columns.text and isinstance(cells[columns.text], str) else None
        if columns.text and not text:
            raise DataError(f"{self.place}{name}: no text in '{columns.text}'")
        captions: tuple[str, ...] = ()
        if columns.caption:
            try:
                captions = captions_in(cells[columns.caption])
            except UnusableError as error:
                if self.need_caption:
                    raise DataError(f"{self.place}{name}: {error}") from error
        return captions, text

    def _picture(self, cell: Any, name: str) -> bytes | Path:
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if isinstance(data, bytes) and data:
            return data
        if isinstance(path, str) and path and (os.path.isabs(path) or self.folder):
            return Path(self.folder or "", path)
        raise DataError(f"{self.place}{name}: no picture in it")


def judged(
    data: Any, judge: Judge, where: str
) -> tuple[NDArray[np.int64], NDArray[np.int64], bytes, list[str]]:
    """Usable rows, lengths of their texts, a hash of all rows, and what was left out.

    Raises:
        DataError: there is no row.
    """
    small = data.data.nbytes <= sources.SMALL_BYTES
    good, lengths, problems = [], [], list[str]()
    key, first = b"", 0
    names = judge.columns.names()
    with Bar(where) as counting:
        for pieces in _pieces(data):
            key = digest(key, *_content(pieces, small))
            for batch in pieces:
                why, sizes = judge.rows(batch.select(names))
                fine = why == table_rows.CHOSEN
                good.append(first + np.flatnonzero(fine))
                lengths.append(sizes[fine])
                for row in np.flatnonzero(~fine).tolist():
                    problems.append(f"{where}[{first + row}]: {judge.columns.why(int(why[row]))}")
                first += batch.num_rows
            counting.at(first)
    if not first:
        raise DataError(f"{where}: no row in it; correct 'split'")
    return np.concatenate(good), np.concatenate(lengths), key, problems


def repeated(data: Any, column: str, rows: NDArray[np.int64]) -> bool:
    """Whether two rows have the same in a column."""
    pieces = (piece for some in _pieces(data.select_columns([column])) for piece in some)
    names = [str(name) for piece in pieces for name in piece.column(0).to_pylist()]
    return len({names[row] for row in rows.tolist()}) < len(rows)


def _pieces(data: Any) -> Iterator[list[Any]]:
    """``BATCH`` rows at a time, in the pieces in which they are memory-mapped: pictures are not copied."""
    table = data.data.table
    if table.num_rows != len(data):  # only some rows are chosen, in an order of their own
        table = data.with_format("arrow")[:]
    for first in range(0, table.num_rows, BATCH):
        yield table.slice(first, BATCH).to_batches()


def _content(pieces: Sequence[Any], small: bool) -> Iterator[str | bytes]:
    """What identifies rows: texts and numbers, and of pictures their sizes or all bytes."""
    for name in pieces[0].schema.names:
        columns = [piece.column(name) for piece in pieces]
        if table_rows.is_picture(columns[0].type):
            data = [pc.struct_field(c, "bytes") if pa.types.is_struct(c.type) else c for c in columns]
            yield str(
                [cell for some in data for cell in (some if small else pc.binary_length(some)).to_pylist()]
            )
        else:
            yield repr([cell for some in columns for cell in some.to_pylist()])
