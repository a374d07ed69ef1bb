"""Parquet and Arrow files, read one row group at a time."""

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from beitctl.errors import DataError
from beitctl_plugins.sources.rows import Files

ENDINGS = (".parquet", ".arrow", ".feather")
MOST_CACHED = 256 * 2**20
"""Bytes of row groups that a process keeps; the last one is kept whatever its size."""
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
        return iter(  # on this thread alone: forked processes have no others
            self._file.iter_batches(size, row_groups=[group], columns=list(columns), use_threads=False)
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


def window(size: int, rows: int) -> int:
    """Most rows to mix at a time so that their groups stay in memory, for files of some size in all."""
    return max(1, MOST_CACHED // 2 * rows // max(1, size))


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
            return pa.Table.from_batches(list(source.batches(group, self.columns, 1024)))
        except BROKEN as error:
            return f"{path}: row group {group} cannot be read ({one_line(error)})"
        except DataError as error:
            return str(error)

    def _keep(self, key: tuple[int, int], found: Any) -> None:
        self._cache[key] = found
        used = sum(table.nbytes for table in self._cache.values() if not isinstance(table, str))
        while used > MOST_CACHED and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            used -= 0 if isinstance(old, str) else old.nbytes


os.register_at_fork(after_in_child=Groups.renew_all)
