"""Rows of JSONL, JSON, CSV and TSV files: read in order once, and one by one again from where they lie."""

import csv
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beitctl.data.arrays import Texts
from beitctl.errors import ChangedError, DataError
from beitctl.report.naming import printable
from beitctl_plugins.sources.reading.wording import LONGEST

ROW_BYTES = 10 * 2**20
"""Longer rows are left out: they come from a quote that is never closed, or hold no caption."""
JSON_BYTES = 256 * 2**20
"""Larger .json files are refused, as they have to be parsed whole."""
OPEN_FILES = 64
"""Files that a process keeps open for one source."""

ENDINGS = (".jsonl", ".json", ".csv", ".tsv")


class UnusableError(Exception):
    """One row cannot be used; the text says why."""


class Row(NamedTuple):
    """One row, and where it lies."""

    line: int
    start: int
    end: int
    content: Any
    """The columns as a dict, another JSON value, or an UnusableError."""


class _Handle:
    """An open file, closed when nobody reads it any more."""

    number = -1
    close = staticmethod(os.close)
    """Kept, as the module os may be gone when the interpreter ends."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            self.close(self.number)


class Files:
    """Files that must stay as they are, read at any place by any thread and process."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = Texts.of(paths)
        try:
            status = [os.stat(path) for path in self.paths]
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
        self.sizes = np.array([found.st_size for found in status], np.int64)
        self.modified = np.array([found.st_mtime_ns for found in status], np.int64)
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        """Contents of the files that are kept in memory."""
        self._open: dict[int, _Handle] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def read(self, file: int, start: int, end: int) -> bytes:
        """Bytes of a file.

        Raises:
            ChangedError: the file was removed or is not any more what it was.
            DataError: it cannot be read.
        """
        if file in self.blocks:
            return self.blocks[file][start:end].tobytes()
        try:
            handle = self._open.get(file) or self._opened(file)
            self._compare(file, os.fstat(handle.number))
            # One open file may be shared with forked processes: pread has no position that they could move.
            data = os.pread(handle.number, end - start, start)
        except FileNotFoundError as error:
            raise ChangedError(f"{self.paths[file]}: removed since it was opened; put it back") from error
        except OSError as error:
            raise DataError(f"{self.paths[file]}: cannot be read ({error.strerror})") from error
        if len(data) < end - start:
            raise ChangedError(f"{self.paths[file]}: shorter than when it was opened; start again")
        return data

    def unchanged(self, file: int) -> str:
        """Path of a file that is still the same, for what reads it by itself.

        Raises:
            ChangedError: it was removed or is not any more what it was.
        """
        try:
            self._compare(file, os.stat(self.paths[file]))
        except OSError as error:
            raise ChangedError(
                f"{self.paths[file]}: removed since it was opened ({error.strerror}); put it back"
            ) from error
        return self.paths[file]

    def _opened(self, file: int) -> _Handle:
        for old in list(islice(self._open, max(0, len(self._open) - OPEN_FILES + 1))):
            self._open.pop(old, None)
        return self._open.setdefault(file, _Handle(self.paths[file]))

    def _compare(self, file: int, status: os.stat_result) -> None:
        if (status.st_size, status.st_mtime_ns) != (int(self.sizes[file]), int(self.modified[file])):
            raise ChangedError(
                f"{self.paths[file]}: changed since it was opened ({int(self.sizes[file]):,} bytes then, "
                f"{status.st_size:,} now); start again with data that stay as they are"
            )


class Table:
    """A file of rows with named columns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        """Names in the first line of a .csv or .tsv file, known when reading has begun."""
        self.files = Files([str(path)])
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","

    def rows(self) -> Iterator[Row]:
        """All rows in order.

        Raises:
            DataError: the file cannot be read.
        """
        readers: dict[str, Callable[[], Iterator[Row]]]
        readers = {".jsonl": self._json_lines, ".json": self._json, ".csv": self._csv, ".tsv": self._csv}
        try:
            yield from readers[self.path.suffix.lower()]()
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); replace it or correct 'path'") from error

    def row(self, start: int, end: int) -> dict[str, Any]:
        """One row that was read before.

        Raises:
            ChangedError: the file changed since.
        """
        data = self.files.read(0, start, end)
        if self.path.suffix.lower() in (".csv", ".tsv"):
            cells = next(csv.reader([data.decode()], delimiter=self._delimiter, strict=True))
            return dict(zip(self.columns, cells, strict=False))
        found: dict[str, Any] = json.loads(data)
        return found

    def _keep(self, rows: Iterable[tuple[int, Any]]) -> Iterator[Row]:
        """Rows by line, as JSON in memory, where their file cannot be read from the middle."""
        block = bytearray()
        for line, content in rows:
            start = len(block)
            block += json.dumps(content).encode()
            yield Row(line, start, len(block), content)
        self.files.blocks[0] = np.frombuffer(bytes(block), np.uint8)

    def _json_lines(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for line, start, end, data in lines(file, ROW_BYTES):
                if data is None:
                    yield Row(line, start, end, UnusableError(f"row is longer than {megabytes(ROW_BYTES)}"))
                elif data.strip():
                    yield Row(line, start, end, _value(data))

    def _json(self) -> Iterator[Row]:
        size = int(self.files.sizes[0])
        if size > JSON_BYTES:
            raise DataError(
                f"{self.path}: {size:,} bytes, but .json is parsed whole and must not be larger than "
                f"{megabytes(JSON_BYTES)}; write one object a line into a .jsonl file"
            )
        rows = json.loads(self.path.read_bytes())
        if not isinstance(rows, list):
            raise DataError(f"{self.path}: expected a list of objects, found {short(rows)}")
        yield from self._keep(enumerate(rows, 1))

    def _csv(self) -> Iterator[Row]:
        csv.field_size_limit(max(csv.field_size_limit(), ROW_BYTES))
        with self.path.open("rb") as file:
            source = _CsvLines(self.path, file)
            reader = csv.reader(source, delimiter=self._delimiter, strict=True)
            while True:
                source.begin()
                content: Any
                try:
                    cells = next(reader)
                    if not cells:
                        continue
                    if not self.columns:
                        self.columns = [cell.strip() for cell in cells]
                        continue
                    content = self._named(cells)
                except StopIteration:
                    return
                except UnusableError as error:
                    content = error
                except csv.Error as error:
                    content = source.fault(error)
                if not self.columns:
                    raise DataError(f"{self.path}:{source.line}: no names of columns ({content})")
                yield Row(source.line, source.start, source.end, content)

    def _named(self, cells: list[str]) -> dict[str, str]:
        if len(cells) > len(self.columns):
            what = "tab" if self._delimiter == "\t" else "comma"
            raise UnusableError(
                f"{len(cells)} cells for {len(self.columns)} columns; put quotes around cells with a {what}"
            )
        return dict(zip(self.columns, cells, strict=False))


class _CsvLines:
    """Lines of a CSV file for csv.reader, and the place of the row that it is in."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._lines = lines(file, ROW_BYTES)
        self.start = self.end = self._read = self.line = 0
        self._ended = False

    def begin(self) -> None:
        """A row begins here."""
        self.start, self.line = self.end, self._read + 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        found = next(self._lines, None)
        if found is None:
            self._ended = True
            raise StopIteration
        self._read, _, self.end, data = found
        if data is None:
            raise UnusableError(f"row is longer than {megabytes(ROW_BYTES)}")
        if self.end - self.start > ROW_BYTES:
            raise DataError(
                f"{self._path}:{self.line}: the row that begins here is longer than "
                f"{megabytes(ROW_BYTES)}, so a quote in it is not closed; close it, and "
                "write quotes inside of cells twice"
            )
        if b"\0" in data:
            raise UnusableError("holds a NUL byte; the file must be UTF-8")
        try:
            return data.decode("utf-8-sig" if self._read == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {self._read} is not UTF-8: {error.reason}") from error

    def fault(self, error: csv.Error) -> UnusableError:
        """What csv.reader found wrong in the row."""
        if self._ended:
            raise DataError(
                f"{self._path}:{self.line}: a quote that opens in this row is never closed; close it, and "
                "write quotes inside of cells twice"
            ) from error
        return UnusableError(f"wrong quoting ({error}); write quotes inside of cells twice")


def lines(file: BinaryIO, limit: int) -> Iterator[tuple[int, int, int, bytes | None]]:
    """Number, start, end and content of every line; content is None where it is longer than the limit."""
    number = start = 0
    while data := file.readline(limit + 1):
        number += 1
        end = start + len(data)
        kept: bytes | None = data
        while len(data) > limit and not data.endswith(b"\n"):
            kept, data = None, file.readline(limit + 1)
            end += len(data)
        yield number, start, end, kept
        start = end


def _value(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        return UnusableError(f"not a JSON object ({error})")


def encoded(text: str) -> bytes:
    """A text as UTF-8.

    Raises:
        UnusableError: it has half a character, a lone surrogate, as JSON allows.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UnusableError(f"not valid Unicode: {short(text)}") from error


def short(value: Any) -> str:
    """A value as in Python, cut to 60 characters."""
    text = repr(value[:60] if isinstance(value, str | bytes | list) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def megabytes(count: int) -> str:
    """A round number of bytes for messages."""
    return f"{count // 2**20} MB"


def picture_status(path: str) -> os.stat_result:
    """Size and time of a picture.

    Raises:
        UnusableError: there is none.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise UnusableError(f"no picture {printable(path, LONGEST)}") from error
    regular = stat.S_ISREG(status.st_mode)
    if not regular or not status.st_size:
        raise UnusableError(f"{'empty' if regular else 'no'} picture {printable(path, LONGEST)}")
    return status
