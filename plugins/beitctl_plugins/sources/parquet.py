"""Rows of Parquet and Arrow files."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from beitctl.api import Example, Plugin
from beitctl.data.order import digest
from beitctl.errors import DataError
from beitctl.report.bars import Bar
from beitctl_plugins.sources import opened as sources
from beitctl_plugins.sources.opened import check_share
from beitctl_plugins.sources.reading import table_files, table_guess, table_rows
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.rows import Files
from beitctl_plugins.sources.reading.shards import Shard, shards
from beitctl_plugins.sources.reading.table_files import ENDINGS, Groups, InGroups, TableFile
from beitctl_plugins.sources.reading.table_rows import Columns, Judge
from beitctl_plugins.sources.reading.wording import no_row

LIGHT_ROWS, PICTURE_ROWS = 4096, 64
"""Rows that are judged at a time, without and with their pictures."""
ROW_BITS = 32


class Parquet(Plugin):
    """Rows of Parquet, Arrow or Feather files, with pictures in them or paths of pictures.

    Pictures are bytes, structs of bytes and path as Hugging Face data sets write them, or paths. A caption is
    a text or a list of texts. Names of classes are taken from the metadata of Hugging Face data sets. At the
    beginning footers and columns without pictures are read; while training one row group at a time, so
    groups should hold at most some 64 MB of pictures. Write larger ones anew, with ``beitctl data pack``
    or a smaller ``row_group_size``.

    An example is named by ``id``, else by the path in the picture's cell if no two are equal, else by file
    and number of the row, from 1.
    """

    path: Path
    """A .parquet, .arrow or .feather file, a folder of them, a pattern with ``*`` or with ``{00..41}``."""
    image: str = "image"
    """Column of the pictures; with ``text`` it may be missing."""
    caption: str = ""
    """Column of the captions; rows without are unusable then. Empty: ``caption`` or ``captions`` if there is
    one, and rows may be without."""
    label: str = ""
    """Column of the class; empty: there is none."""
    text: str = ""
    """Column of prose; empty: there is none."""
    id: str = ""
    """Column with a name for each example; empty: there is none."""
    root: str = ""
    """Folder that the paths of pictures start from; empty: the folder of each file."""
    where: dict[str, str] = Field({})
    """Keep only rows whose columns hold these values, such as ``{ split = "train" }``."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable rows to go on with."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.image and not self.text:
            raise ValueError("image and text are both empty; name the column of at least one")
        if self.text and self.text in (self.caption, self.image):
            raise ValueError(
                f"text is also the column of the captions or pictures: {self.text!r}; remove one"
            )
        return self

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """A table with pictures or prose, or a folder in which most files are tables; others by name only."""
        return table_guess.guess(path)

    def open(self) -> InGroups:
        """Read footers and light columns, and judge every row.

        Raises:
            DataError: no such file, not readable, columns missing, two rows with the same id, nothing usable,
                or too many unusable rows.
        """
        files = shards(self.path, ENDINGS)
        found = _Found(small=sum(file.size for file in files) <= sources.SMALL_BYTES)
        columns = None
        with Bar(self.path.name) as counting:
            for number, file in enumerate(files):
                table = table_files.opened(file.path)
                columns = columns or self._columns(table.schema)
                table_rows.check_types(file.path, table.schema, columns)
                try:
                    self._judge(number, file, table, columns, found)
                except table_files.BROKEN as error:
                    raise DataError(
                        f"{file.path}: cannot be read ({table_files.one_line(error)}); replace or remove it"
                    ) from error
                counting.at(found.count)
        rows = found.rows()
        if not len(rows) and not found.problems:
            raise DataError(f"{self.path}: {no_row(self.where)}")
        check_share(self.path, found.problems, len(rows), self.max_bad_share)
        settings = self.model_dump_json(exclude={"path", "root", "max_bad_share"})
        reader = _Reader(self, columns or Columns(), files, found)
        hashed = FileHash.of(reader.tables.files, [file.name for file in files])
        spoken = reader.columns.caption or reader.columns.text
        return InGroups(
            rows,  # type: ignore[arg-type]
            reader.example,
            hashed.key(settings, found.beside.key()),
            found.problems,
            [count for count in found.usable if count],
            found.lengths() if spoken else None,
            reader.label if reader.columns.label else None,
            table_files.window(found.sizes, found.usable),
            reader.words if spoken else None,
            digest(hashed.state(), found.beside.state()).hex(),
            notes=table_files.notes(self.path, found.sizes),
        )

    def _columns(self, schema: Any) -> Columns:
        """Columns to read, those left empty guessed."""
        caption = self.caption
        if not caption and not self.text:
            names = (name for name in ("caption", "captions") if name in schema.names)
            kinds = ((name, schema.field(name).type) for name in names)
            caption = next((n for n, k in kinds if table_rows.is_text(k) or table_rows.is_list(k)), "")
        absent = self.text and self.image not in schema.names and "image" not in self.model_fields_set
        image = "" if absent else self.image
        return Columns(image, caption, self.label, self.text, self.id, self.where, bool(self.caption))

    def _root(self, file: Shard) -> str:
        return str(Path(self.root).expanduser() if self.root else file.path.parent)

    def _judge(self, number: int, file: Shard, table: TableFile, columns: Columns, found: "_Found") -> None:
        names = table_rows.class_names(table.schema, columns.label)
        found.names.append(found.names[-1] if found.names and found.names[-1] == names else names)
        kind = table.schema.field(columns.image).type if columns.image else pa.null()
        binary = table_rows.is_binary(kind) or pa.types.is_struct(kind)
        leaf = f"{columns.image}.bytes" if pa.types.is_struct(kind) else columns.image
        before = 0
        found.sizes += table.sizes(columns.names())
        for group, count in enumerate(table.counts):
            has_bytes = binary and not found.small and table.nulls(group, leaf) == 0
            read = [name for name in columns.names() if name != columns.image or not has_bytes]
            if has_bytes and pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                read.append(f"{columns.image}.path")
            judge = Judge(columns, names, self._root(file), has_bytes, found.beside)
            heavy = binary and not has_bytes
            start = before
            for batch in table.batches(group, read, PICTURE_ROWS if heavy else LIGHT_ROWS):
                found.add(start - before, judge.rows(batch), _named(batch, columns))
                for row in found.bad:
                    found.problems.append(
                        f"{file.name}:{start + row + 1}: {columns.why(int(found.why[row]))}"
                    )
                start += batch.num_rows
            if start - before != count:
                raise DataError(f"{file.path}: row group {group} has {start - before} rows, not {count}")
            found.group(number, group, before)
            before = start


def _named(batch: Any, columns: Columns) -> NDArray[np.int64]:
    """Numbers that tell apart what examples would be named by; 0 where there is nothing."""
    if columns.id:
        return table_rows.hashes(batch.column(columns.id).cast(pa.string()))
    paths = None
    if columns.image and columns.image in batch.schema.names:
        paths = table_rows.paths_of(batch.column(columns.image))
    return np.zeros(batch.num_rows, np.int64) if paths is None else table_rows.hashes(paths)


@dataclass
class _Found:
    """Usable rows of all groups."""

    small: bool
    """Whether all pictures are looked at, not only the footers."""
    problems: list[str] = field(default_factory=list)
    groups: list[tuple[int, int, int]] = field(default_factory=list)
    """File, number in it, and rows before it."""
    usable: list[int] = field(default_factory=list)
    """Usable rows of each group."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of the needed columns of each group."""
    parts: list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]] = field(default_factory=list)
    """Rows, lengths and names of pieces of groups."""
    bad: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Unusable rows of the last piece."""
    why: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))
    names: list[list[str]] = field(default_factory=list)
    """Names of the classes, by file."""
    beside: FileHash = field(default_factory=FileHash)
    """Pictures that the rows name."""
    count: int = 0
    before: int = 0

    def add(
        self, first: int, judged: tuple[NDArray[np.int8], NDArray[np.int64]], names: NDArray[np.int64]
    ) -> None:
        """Note a piece of the group that is read."""
        self.why, lengths = judged
        good = np.flatnonzero(self.why == table_rows.CHOSEN)
        self.bad = np.flatnonzero((self.why != table_rows.CHOSEN) & (self.why != table_rows.OTHER))
        place = np.int64(len(self.groups)) << ROW_BITS
        self.count += len(good)
        self.parts.append((place + first + good, lengths[good].astype(np.int32), names[good]))

    def group(self, file: int, group: int, before: int) -> None:
        """A group is read to its end."""
        self.usable.append(self.count - self.before)
        self.before = self.count
        self.groups.append((file, group, before))

    def rows(self) -> NDArray[np.int64]:
        """Number of the group and row in it, of every usable row."""
        return np.concatenate([part[0] for part in self.parts] or [np.zeros(0, np.int64)])

    def lengths(self) -> NDArray[np.int32]:
        """Of the texts, in bytes."""
        return np.concatenate([part[1] for part in self.parts])

    def twice(self) -> tuple[int, int] | None:
        """Places of two rows that are named the same; (-1, -1) if one has no name."""
        names = np.concatenate([part[2] for part in self.parts] or [np.zeros(0, np.int64)])
        if not names.all():
            return -1, -1
        order = np.argsort(names, kind="stable")
        same = np.flatnonzero(names[order][1:] == names[order][:-1])
        return (int(order[same[0]]), int(order[same[0] + 1])) if len(same) else None


class _Place(NamedTuple):
    table: Any
    row: int
    """In the table."""
    file: int
    line: int
    """In the file, from 1."""


class _Reader:
    """Makes examples of rows."""

    def __init__(self, source: Parquet, columns: Columns, files: Sequence[Shard], found: _Found) -> None:
        self.source, self.columns, self.files, self.names = source, columns, files, found.names
        self.groups = np.array(found.groups, np.int64).reshape(-1, 3)
        paths = Files(str(file.path) for file in files)
        self.tables = Groups(paths, dataclasses.replace(columns, where={}).names())
        self.classes = Groups(paths, columns.label_names())
        self.prose = Groups(paths, columns.word_names())
        twice = found.twice()
        if columns.id and twice:
            self._refuse(*(self._at(int(found.rows()[place])) for place in twice))
        self.by_path = twice is None

    def _refuse(self, first: "_Place", second: "_Place") -> None:
        """Refuse two rows whose ids have the same hash, if they are the same."""
        column = self.columns.id
        name, other = (place.table.column(column)[place.row].as_py() for place in (first, second))
        if name == other:
            places = " and ".join(self._where(place.file, place.line) for place in (first, second))
            raise DataError(
                f"{places} have the same '{column}', {name!r}, but it must name one example; correct it, or "
                "set another column or none as 'id'"
            )

    def _at(self, place: int, tables: Groups | None = None) -> "_Place":
        """Where a row lies, in the group of all columns or of some."""
        file, group, before = (int(number) for number in self.groups[place >> ROW_BITS])
        row = place & (2**ROW_BITS - 1)
        return _Place((tables or self.tables).table(file, group), row, file, before + row + 1)

    def _where(self, file: int, row: int) -> str:
        return f"{self.files[file].path}:{row}"

    def example(self, place: int) -> Example:
        """Example of one row.

        Raises:
            ChangedError: the file is not what it was.
            DataError: the row cannot be read.
        """
        found = self._at(int(place))
        cells, file, line = self._cells(found, self.tables), found.file, found.line
        columns = self.columns
        image, path = self._picture(cells.get(columns.image), file, line)
        own = str(cells[columns.id]) if columns.id else path if self.by_path else ""
        return Example(
            own or f"{self.files[file].name}:{line}",
            image,
            *self._words(cells),
            self._label(cells.get(columns.label), self.names[file]),
        )

    def label(self, place: int) -> str | None:
        """Class of one row; reads no other column.

        Raises:
            ChangedError: the file is not what it was.
            DataError: the row cannot be read.
        """
        found = self._at(int(place), self.classes)
        return self._label(self._cells(found, self.classes).get(self.columns.label), self.names[found.file])

    def words(self, place: int) -> tuple[str, ...]:
        """Captions and text of one row; reads no other column.

        Raises:
            ChangedError: the file is not what it was.
            DataError: the row cannot be read.
        """
        found = self._at(int(place), self.prose)
        captions, text = self._words(self._cells(found, self.prose))
        return (*captions, *([text] if text else []))

    def _cells(self, found: "_Place", tables: Groups) -> dict[str, Any]:
        try:
            return {name: found.table.column(name)[found.row].as_py() for name in tables.columns}
        except table_files.BROKEN as error:
            reason = table_files.one_line(error)
            raise DataError(f"{self._where(found.file, found.line)}: cannot be read ({reason})") from error

    def _words(self, cells: Mapping[str, Any]) -> tuple[tuple[str, ...], str | None]:
        """Captions, and the text."""
        text = cells[self.columns.text].strip() if self.columns.text else None
        return tuple(_captions(cells.get(self.columns.caption))), text

    def _picture(self, cell: Any, file: int, line: int) -> tuple[bytes | Path | None, str]:
        """Picture and path in a cell."""
        if not self.columns.image:
            return None, ""
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if isinstance(data, bytes) and data:
            return data, path if isinstance(path, str) else ""
        if isinstance(path, str) and path:
            root = self.source._root(self.files[file])
            return Path(root, path), path
        raise DataError(f"{self._where(file, line)}: {self.columns.why(table_rows.NO_PICTURE)}")

    def _label(self, cell: Any, names: Sequence[str]) -> str | None:
        if isinstance(cell, int) and not isinstance(cell, bool) and names:
            return names[cell]
        if isinstance(cell, float) and cell.is_integer():
            return str(int(cell))
        return None if cell is None else str(cell)


def _captions(cell: Any) -> Iterator[str]:
    for caption in cell if isinstance(cell, list) else [cell]:
        if caption and caption.strip():
            yield " ".join(caption.split())
