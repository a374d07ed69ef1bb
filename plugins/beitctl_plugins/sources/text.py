"""Prose from files."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from beitctl.api import Example, Plugin
from beitctl.errors import DataError
from beitctl_plugins.sources.opened import Opened, check_share, existing, fingerprint

ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


class Text(Plugin):
    """Prose from a file, or from all files of a folder and below it.

    .txt: one piece a line; .jsonl: one object a line; .parquet: one piece a row; .txt and .jsonl also as .gz.
    Blank pieces are dropped. UTF-8 only. The corpus is held in memory.
    """

    path: Path
    """The file or folder."""
    field: str = "text"
    """Key of the text in .jsonl, column of it in .parquet."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of rows without text to go on with (.jsonl and .parquet)."""

    def open(self) -> Opened:
        """Read it all.

        Raises:
            DataError: no such file, not readable, not UTF-8, empty, or too many rows without text.
        """
        path = existing(self.path)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.name.endswith(ENDINGS) and p.is_file())
            named = [(file.relative_to(path).as_posix(), file) for file in files]
        else:
            named = [(path.name, path)]
        problems: list[str] = []
        rows = [
            (f"{name}:{number}", text)
            for name, file in named
            for number, text in self._pieces(file, problems)
        ]
        if not rows and not problems:
            raise DataError(
                f"{path}: empty corpus ({len(named)} files searched that end in {', '.join(ENDINGS)}); "
                "correct 'path' in the recipe"
            )
        check_share(path, problems, len(rows), self.max_bad_share)
        return Opened(rows, _example, fingerprint(named, self.field), problems)

    def _pieces(self, file: Path, problems: list[str]) -> Iterator[tuple[int, str]]:
        """Line or row, and text, of every piece of a file that is not blank."""
        if not file.name.endswith(ENDINGS):
            raise DataError(f"{file}: expected a file that ends in {', '.join(ENDINGS)}")
        try:
            if file.suffix == ".parquet":
                found = self._column(file)
            elif file.name.removesuffix(".gz").endswith(".jsonl"):
                found = self._objects(file)
            else:
                found = _lines(file)
            for number, value in found:
                if isinstance(value, str):
                    if value.strip():
                        yield number, value.strip()
                else:
                    problems.append(f"{file.name}:{number}: no text in '{self.field}'")
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise DataError(f"{file}: cannot be read ({error}); replace or remove it") from error

    def _objects(self, file: Path) -> Iterator[tuple[int, object]]:
        for number, line in _lines(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                row = None
            yield number, row.get(self.field) if isinstance(row, dict) else None

    def _column(self, file: Path) -> Iterator[tuple[int, object]]:
        with pq.ParquetFile(file) as found:
            columns = found.schema_arrow.names
            if self.field not in columns:
                raise DataError(f"{file}: no column '{self.field}'; it has {', '.join(columns)}")
            number = 0
            for batch in found.iter_batches(columns=[self.field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, value


def _example(row: tuple[str, str]) -> Example:
    return Example(row[0], text=row[1])


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and content of every line."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}:{number}: not UTF-8 ({error.reason}); convert it, for example with iconv"
                ) from error
            yield number, text
