"""Parquet and Arrow files, read one row group at a time."""

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from beitctl.errors import DataError
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.sources.reading.rows import Files

ENDINGS = (".parquet", ".arrow", ".feather")
MOST_CACHED = 256 * 2**20
"""Bytes of row groups that a process keeps; beside these, the last two of those that are over half of it."""
MOST_PIECE, FEW_ROWS = 64 * 2**20, 64
"""Bytes of the rows that are decoded at a time, and the least number of them."""
BOMB_BYTES, BOMB_FACTOR = 256 * 2**20, 16
"""Larger groups that are so many times larger than their file are refused."""
MOST_OPEN = 16
"""Files that a process keeps open."""
BROKEN = (pa.ArrowException, OSError, ValueError, OverflowError, RecursionError, TypeError, MemoryError)
"""What pyarrow raises for damaged files."""


class TableFile(Protocol):
    """An open file of rows in groups."""

    schema: Any
    counts: list[int]
    """Rows in each group."""

    def batches(self, group: int, columns: Sequence[str], size: int) -> Iterator[Any]:
        """Columns of a group, at most so many rows at a time; a dot leads to a field of a struct."""
        ...

    def nulls(self, group: int, column: str) -> int | None:
        """Empty cells of a column, where that is known without reading it."""
        ...

    def sizes(self, columns: Sequence[str]) -> list[int]:
        """Bytes in memory of the columns of each group, about."""
        ...


class ParquetTable:
    """An open Parquet file."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path, pre_buffer=False)
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def batches(self, group: int, columns: Sequence[str], size: int) -> Iterator[Any]:
        """Columns of a row group in pieces; pieces also keep structs of more than 2 GB readable."""
        if not columns:
            return iter([pa.RecordBatch.from_struct_array(pa.nulls(self.counts[group], pa.struct([])))])
        few = min(size, FEW_ROWS)  # on this thread alone: forked processes have no others
        return _joined(
            self._file.iter_batches(few, row_groups=[group], columns=list(columns), use_threads=False), size
        )

    def nulls(self, group: int, column: str) -> int | None:
        """As the footer says."""
        found = self._file.metadata.row_group(group)
        for place in range(found.num_columns):
            chunk = found.column(place)
            if chunk.path_in_schema == column:
                known = chunk.is_stats_set and chunk.statistics.has_null_count
                return int(chunk.statistics.null_count) if known else None
        return None

    def sizes(self, columns: Sequence[str]) -> list[int]:
        """As the footer says."""
        return [sum(size for name, size in group if name in columns) for group in column_sizes(self._file)]


class ArrowTable:
    """An open Arrow or Feather file, memory-mapped; its record batches are the groups."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            stream = file.read(6) != b"ARROW1"
        self._source = pa.memory_map(str(path))
        self._readers: dict[tuple[int, ...], Any] = {}
        self._stream: list[Any] | None = None
        if stream:
            reader = pa.ipc.open_stream(self._source)
            self.schema, self._stream = reader.schema, list(reader)
            self.counts = [batch.num_rows for batch in self._stream]
        else:
            self.schema = pa.ipc.open_file(self._source).schema
            # a column that is not compressed pictures, for reading one is the way to count its rows
            kinds = [(pa.types.is_binary(f.type) or pa.types.is_struct(f.type)) for f in self.schema]
            reader = self._reader((kinds.index(False) if False in kinds else 0,) if kinds else ())
            self.counts = [reader.get_batch(place).num_rows for place in range(reader.num_record_batches)]

    def _reader(self, fields: tuple[int, ...]) -> Any:
        if fields not in self._readers:
            options = pa.ipc.IpcReadOptions(included_fields=list(fields), use_threads=False)
            self._readers[fields] = pa.ipc.open_file(self._source, options=options)
        return self._readers[fields]

    def batches(self, group: int, columns: Sequence[str], size: int) -> Iterator[Any]:
        """Columns of a record batch in pieces; of a struct always all fields."""
        names = sorted(
            {column if column in self.schema.names else column.split(".")[0] for column in columns}
        )
        if self._stream is None:
            fields = tuple(self.schema.get_field_index(name) for name in names)
            batch = self._reader(fields or (0,)).get_batch(group)
        else:
            batch = self._stream[group]
        chosen = batch.select(names) if names else batch
        chosen.validate(full=True)  # or broken offsets would end the process
        for first in range(0, chosen.num_rows, size):
            yield chosen.slice(first, size)

    def nulls(self, group: int, column: str) -> int | None:
        """Not known: reading it costs nothing, for it is memory-mapped."""
        return None

    def sizes(self, columns: Sequence[str]) -> list[int]:
        """The part of the file that the rows of each group are."""
        return [self._source.size() * count // max(1, sum(self.counts)) for count in self.counts]


def column_sizes(file: Any) -> Iterator[list[tuple[str, int]]]:
    """Names and uncompressed bytes of the columns of each row group of a Parquet file."""
    leaves = [file.schema.column(place) for place in range(len(file.schema))]
    names = [leaf.path.split(".")[0] for leaf in leaves]
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        yield [(name, group.column(place).total_uncompressed_size) for place, name in enumerate(names)]


def _joined(batches: Iterator[Any], rows: int) -> Iterator[Any]:
    """Batches of at most so many rows; of fewer where they would be long, as cells of a few bytes can be."""
    kept: list[Any] = []
    size = count = 0
    for batch in batches:
        if kept and (count + batch.num_rows > rows or size + batch.nbytes > MOST_PIECE):
            yield kept[0] if len(kept) == 1 else pa.concat_batches(kept)
            kept, size, count = [], 0, 0
        kept.append(batch)
        size, count = size + batch.nbytes, count + batch.num_rows
    if kept:
        yield kept[0] if len(kept) == 1 else pa.concat_batches(kept)


def opened(path: Path) -> TableFile:
    """A file by its ending.

    Raises:
        DataError: it cannot be read.
    """
    try:
        found = ParquetTable(path) if path.suffix.lower() == ".parquet" else ArrowTable(path)
        names = found.schema.names
    except BROKEN as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); replace or remove it") from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are named '{twice}'; rename one of them")
    return found


@dataclass(frozen=True)
class InGroups(Opened):
    """Opened rows that are read by the group."""

    notes: Sequence[str] = ()
    """What could be better about the files."""


def window(sizes: Sequence[int], rows: Sequence[int]) -> int:
    """Most rows to mix at a time so that their groups stay in memory; 0: any number.

    A window may begin and end inside of a group. Where only two groups fit, it is therefore no longer than
    the shortest of the large ones.

    Args:
        sizes: bytes of each group.
        rows: usable rows in each.
    """
    used = [(size, count) for size, count in zip(sizes, rows, strict=True) if count]
    total = sum(size for size, _ in used)
    if not total:
        return 0
    most = MOST_CACHED // 2 * sum(count for _, count in used) // total
    return max(1, min([most, *(count for size, count in used if large(size))]))


def large(size: int) -> bool:
    """Whether a group is so large that only two of its size are kept at a time."""
    return size > MOST_CACHED // 4


def notes(path: object, sizes: Sequence[int]) -> list[str]:
    """Advice if groups are too large."""
    most, count = max(sizes, default=0), sum(map(large, sizes))
    if not count:
        return []
    groups = "1 row group is" if count == 1 else f"{count:,} row groups are"
    return [
        f"{path}: {groups} larger than {MOST_CACHED >> 22} MB, the largest {most >> 20} MB; they are read "
        "whole, so training needs much memory and mixes less. `beitctl data pack` writes small ones"
    ]


def one_line(error: BaseException) -> str:
    """The beginning of an error on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Groups:
    """Row groups of several files, the last used ones in memory; for threads and forked processes."""

    _all: ClassVar["weakref.WeakSet[Groups]"] = weakref.WeakSet()

    def __init__(self, files: Files, columns: Sequence[str]) -> None:
        self.files, self.columns = files, list(columns)
        self._cache: OrderedDict[tuple[int, int], Any] = OrderedDict()
        """Tables, or a text that says why there is none."""
        self._renew()
        Groups._all.add(self)

    def _renew(self) -> None:
        self._lock = threading.Lock()  # in a forked process the old one may be held for ever
        self._open: OrderedDict[int, TableFile] = OrderedDict()

    @classmethod
    def renew_all(cls) -> None:
        """Called in a process that was just forked."""
        for groups in list(cls._all):
            groups._renew()

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "columns": self.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def table(self, file: int, group: int) -> Any:
        """Needed columns of one group.

        Raises:
            ChangedError: the file is not what it was.
            DataError: the group is damaged.
        """
        path = Path(self.files.unchanged(file))
        found = self._cache.get((file, group))
        if found is None:
            with self._lock:
                found = self._cache.get((file, group))
                if found is None:
                    found = self._read(path, file, group)
                    self._keep((file, group), found)
        elif self._lock.acquire(
            blocking=False
        ):  # else another thread reads, and the order is not worth waiting
            with contextlib.suppress(KeyError):
                self._cache.move_to_end((file, group))
            self._lock.release()
        if isinstance(found, str):
            raise DataError(found)
        return found

    def _read(self, path: Path, file: int, group: int) -> Any:
        try:
            source = self._open.get(file) or self._open.setdefault(file, opened(path))
            self._open.move_to_end(file)
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
            huge = self._huge()
            if len(huge) > 1 and source.sizes(self.columns)[group] > MOST_CACHED // 2:
                del self._cache[huge[0]]  # before this one takes the memory
            pieces, size = [], 0
            for piece in source.batches(group, self.columns, 1024):
                pieces.append(piece)
                size += piece.nbytes
                if size > max(BOMB_BYTES, BOMB_FACTOR * int(self.files.sizes[file])):
                    return (
                        f"{path}: row group {group} has more than {size >> 20} MB, far more than the file; "
                        "write it anew with smaller groups"
                    )
            return pa.Table.from_batches(pieces)
        except BROKEN as error:
            return f"{path}: row group {group} cannot be read ({one_line(error)})"
        except DataError as error:
            return str(error)

    def _keep(self, key: tuple[int, int], found: Any) -> None:
        self._cache[key] = found
        huge = self._huge()
        for old in huge[:-2]:
            del self._cache[old]
        small = {key: _bytes(table) for key, table in self._cache.items() if key not in huge}
        used = sum(small.values())
        for old in list(small)[:-1]:
            if used <= MOST_CACHED:
                break
            del self._cache[old]
            used -= small[old]

    def _huge(self) -> list[tuple[int, int]]:
        """Groups in memory of which only two are kept, the last used one last."""
        return [key for key, table in self._cache.items() if _bytes(table) > MOST_CACHED // 2]


def _bytes(table: Any) -> int:
    return 0 if isinstance(table, str) else int(table.nbytes)


os.register_at_fork(after_in_child=Groups.renew_all)
