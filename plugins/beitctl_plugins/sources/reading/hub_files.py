"""Parquet files behind addresses that fsspec opens, such as those of the Hugging Face Hub."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from beitctl.data.arrays import Arrays, Texts, cached
from beitctl.data.order import digest
from beitctl.errors import ChangedError, DataError
from beitctl.report.bars import Bar
from beitctl_plugins.sources.reading.rows import Files
from beitctl_plugins.sources.reading.table_files import BROKEN, Groups, column_sizes, one_line

FOOTERS = 16
"""Footers of Parquet files that are read at the same time."""
BATCH = 1024


class Urls(Files):
    """Parquet files behind addresses that fsspec opens."""

    def __init__(self, urls: Sequence[str]) -> None:
        self.paths = Texts.of(urls)
        self.sizes = np.zeros(len(urls), np.int64)
        self._schema: Any = None
        self._columns: dict[str, NDArray[np.int64]] = {}
        """Bytes in memory of each column of each group."""

    def unchanged(self, file: int) -> str:
        """The address: what lies there is compared when it is opened."""
        return self.paths[file]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def index(self) -> NDArray[np.int64]:
        """File, number in it and rows of each row group; from the cache if the files can never change."""
        fixed = all(re.match(r"hf://[^@]+@[0-9a-f]{40}/", url) for url in self.paths)
        found: Arrays = cached("hub", digest(2, *self.paths).hex(), self._read) if fixed else self._read()
        self.sizes = found["sizes"]
        names = Texts(found["columns"], found["column_ends"])
        self._columns = dict(zip(names, found["bytes"], strict=True))
        return found["groups"]

    def group_sizes(self, columns: Sequence[str]) -> list[int]:
        """Bytes in memory of some columns of each group, about."""
        sizes = [self._columns[name] for name in columns if name in self._columns]
        return np.sum(sizes, axis=0).tolist() if sizes else []

    def schema(self) -> Any:
        """Columns of the first file."""
        if self._schema is None:
            with self.file(0) as file:
                self._schema = pq.read_schema(file)
        return self._schema

    @contextlib.contextmanager
    def file(self, number: int) -> Iterator[Any]:
        """A file, open.

        Raises:
            ChangedError: it is gone, or has another size.
            DataError: it cannot be read.
        """
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]  # noqa: PLC0415

        url, size = self.paths[number], int(self.sizes[number])
        try:
            system, path = url_to_fs(url)
            with system.open(path, "rb") as file:
                if size and file.size != size:
                    raise ChangedError(
                        f"{url}: changed since it was opened ({size:,} bytes then, {file.size:,} now)"
                    )
                yield file
        except FileNotFoundError as error:
            raise ChangedError(f"{url}: removed since it was opened; put it back, or start again") from error

    def _read(self) -> Arrays:
        found: list[tuple[int, list[tuple[int, dict[str, int]]]]] = []
        with Bar("Parquet files") as counting, ThreadPoolExecutor(FOOTERS) as pool:
            for footer in pool.map(self._footer, range(len(self.paths))):
                found.append(footer)
                counting.at(len(found))
        every = [
            (file, group, *row) for file, (_, rows) in enumerate(found) for group, row in enumerate(rows)
        ]
        names = list(dict.fromkeys(name for *_, columns in every for name in columns))
        packed = Texts.of(names)
        return {
            "sizes": np.array([size for size, _ in found], np.int64),
            "groups": np.array([row[:3] for row in every], np.int64).reshape(-1, 3),
            "columns": packed.block,
            "column_ends": packed.ends,
            "bytes": np.array([[row[3].get(name, 0) for row in every] for name in names], np.int64),
        }

    def _footer(self, number: int) -> tuple[int, list[tuple[int, dict[str, int]]]]:
        """Size of a file, and of each group the rows and the bytes of its columns."""
        with self.file(number) as file:
            try:
                footer = pq.ParquetFile(file)
                counts = [footer.metadata.row_group(g).num_rows for g in range(footer.num_row_groups)]
                sizes = [Counter[str]() for _ in counts]
                for total, group in zip(sizes, column_sizes(footer), strict=True):
                    for name, size in group:
                        total[name] += size
            except BROKEN as error:
                raise DataError(f"{self.paths[number]}: cannot be read ({one_line(error)})") from error
            return int(file.size), [(count, dict(total)) for count, total in zip(counts, sizes, strict=True)]


class _UrlGroups(Groups):
    """Row groups behind addresses, the last used ones in memory."""

    def _read(self, path: Path, file: int, group: int) -> Any:
        if not isinstance(self.files, Urls):
            raise TypeError("only for addresses")
        url = self.files.paths[file]
        try:
            with self.files.file(file) as source:
                parts = pq.ParquetFile(source).iter_batches(
                    BATCH, row_groups=[group], columns=self.columns, use_threads=False
                )
                return pa.Table.from_batches(list(parts))
        except DataError:
            raise
        except Exception as error:  # network libraries raise anything
            raise DataError(f"{url}: row group {group} cannot be read ({one_line(error)})") from error


class Streamed:
    """Rows of Parquet files behind addresses."""

    def __init__(self, files: Urls, groups: NDArray[np.int64], columns: Sequence[str]) -> None:
        self.groups, self.ends = groups, np.cumsum(groups[:, 2])
        self.tables = _UrlGroups(files, columns)

    def cells(self, place: int) -> dict[str, Any]:
        """One row."""
        number = int(np.searchsorted(self.ends, place, side="right"))
        file, group, count = (int(value) for value in self.groups[number])
        table = self.tables.table(file, group)
        row = place - int(self.ends[number]) + count
        try:
            return {name: table.column(name)[row].as_py() for name in self.tables.columns}
        except BROKEN as error:
            where = f"{self.tables.files.paths[file]}: row {row} of group {group}"
            raise DataError(f"{where} cannot be read ({one_line(error)})") from error
