"""Rows of a Parquet file without pictures in it, read again by the row group."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beitctl.errors import DataError
from beitctl_plugins.sources.reading import table_files
from beitctl_plugins.sources.reading.rows import Files, Row
from beitctl_plugins.sources.reading.table_files import Groups

BATCH = 1024
"""Rows that are made Python objects at a time."""


class ParquetRows:
    """Some columns of a Parquet file; a row lies at the number of its group and its own number in that."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.files = path, Files([str(path)])
        self.sizes = table_files.opened(path).sizes(columns)
        """Bytes of each row group."""
        self._groups = Groups(self.files, list(dict.fromkeys(columns)))

    def rows(self) -> Iterator[Row]:
        """All rows in order.

        Raises:
            DataError: the file cannot be read.
        """
        line = 0
        try:
            table = table_files.opened(self.path)
            for group in range(len(table.counts)):
                row = 0
                for batch in table.batches(group, self._groups.columns, BATCH):
                    for content in batch.to_pylist():
                        line += 1
                        yield Row(line, group, row, content)
                        row += 1
        except table_files.BROKEN as error:
            raise DataError(
                f"{self.path}: cannot be read ({table_files.one_line(error)}); replace it or correct 'path'"
            ) from error

    def row(self, start: int, end: int) -> dict[str, Any]:
        """One row that was read before.

        Raises:
            ChangedError: the file changed since.
            DataError: it cannot be read any more.
        """
        table = self._groups.table(0, start)
        return {name: table.column(name)[end].as_py() for name in self._groups.columns}
