"""Prose from files."""

import gzip
import io
import json
import os
import time
import zlib
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from beitctl.api import Example, Plugin
from beitctl.data.arrays import Texts, cached
from beitctl.data.order import digest
from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources import table_files
from beitctl_plugins.sources.opened import check_share
from beitctl_plugins.sources.rows import Counting, Files, UnusableError, encoded, hashed, lines, megabytes
from beitctl_plugins.sources.shards import shards
from beitctl_plugins.sources.table_files import Groups, InGroups
from beitctl_plugins.sources.wording import listed

ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
TEXT_COLUMNS = ("text", "content", "body", "document")
"""Names of keys that are looked for, best first."""
PIECE_BYTES = 64 * 2**20
"""Longer pieces are left out."""
UNPACKED_BYTES = 256 * 2**20
"""Most that all packed files together may hold, as they are kept in memory."""
RUN = 1024
"""Pieces of a .txt or .jsonl file that are read near one another; a smaller file is one run."""
INDEX_BYTES = 16 * 2**20
"""The places of pieces in a larger corpus are kept on disk for the next time."""


class Text(Plugin):
    """Prose from a file, or from all files of a folder and below it.

    .txt: one piece a line, or as ``documents`` says; .jsonl: one object a line; .parquet: one piece a row;
    .txt and .jsonl also as .gz if they are small. Blank pieces are dropped. UTF-8 only. Pieces are read when
    they are needed; the files must not change meanwhile.
    """

    path: Path
    """The file, the folder, or a pattern such as ``wiki/*.txt``."""
    field: str = "text"
    """Key of the text in .jsonl, column of it in .parquet."""
    documents: Literal["lines", "paragraphs", "files"] = "lines"
    """What a piece is in .txt: a line, lines up to a blank one, or the whole file."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of rows without text to go on with, and of pieces that are too long."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Files of text, surer with a key named text; and folders of them."""
        if not path.is_dir():
            return _guessed_file(path) if path.name.lower().endswith(ENDINGS[:4]) else None
        try:
            with os.scandir(path) as found:
                names = sorted(entry.name for entry in islice(found, 500) if not entry.name.startswith("."))
        except OSError:
            return None
        fit = [name for name in names if name.lower().endswith(ENDINGS[:4])]
        inside = _guessed_file(path / fit[0]) if fit else None
        if inside is None:
            return None
        surest = 2 if 2 * len(fit) > len(names) else 1
        return min(inside[0], surest), inside[1] | {"path": str(path)}

    def open(self) -> InGroups:
        """Find every piece.

        Raises:
            DataError: no such file, not readable, not UTF-8, empty, or too many rows without text.
        """
        path = self.path.expanduser()
        named = [(shard.name, shard.path) for shard in shards(self.path, ENDINGS)]
        corpus = _Corpus(self, Texts.of(name for name, _ in named), Files(str(file) for _, file in named))
        corpus.unpack()
        index = corpus.index()
        count, problems = len(index["starts"]), list(Texts(index["problems"], index["problem_ends"]))
        if not count and not problems:
            raise DataError(
                f"{path}: empty corpus ({len(named)} files searched that end in {', '.join(ENDINGS)}); "
                "correct 'path' in the recipe"
            )
        check_share(path, problems, count, self.max_bad_share)
        paths = dict(named)
        key = hashed(
            corpus.names, corpus.files.sizes, lambda name: str(paths[name]), self.field, self.documents
        )
        runs, sizes = index["runs"].tolist(), index["bytes"].tolist()
        return InGroups(
            range(count),
            corpus.example,
            key,
            problems,
            runs,
            index["lengths"],
            window=table_files.window(
                sizes, [run if size else 0 for run, size in zip(runs, sizes, strict=True)]
            ),
            state=corpus.files.state(),
            notes=table_files.notes(path, sizes),
        )


class _Piece(NamedTuple):
    """Where one piece lies."""

    number: int
    """Its first line or its row, from 1."""
    start: int
    """Place of its first byte; in Parquet its row in the row group."""
    end: int
    """Place behind its last byte; in Parquet its row group."""
    length: int
    """Bytes, about."""


class _Corpus:
    """The files, and where each piece lies in them."""

    def __init__(self, settings: Text, names: Texts, files: Files) -> None:
        self.settings, self.names, self.files = settings, names, files
        self._index: Mapping[str, NDArray[Any]] = {}
        self._run_ends: NDArray[np.int64] = np.zeros(0, np.int64)
        self._groups = Groups(files, [settings.field])

    def example(self, place: int) -> Example:
        """Read one piece.

        Raises:
            ChangedError: its file is not any more what was opened.
            DataError: it cannot be read.
        """
        file = int(self._index["files"][np.searchsorted(self._run_ends, place, side="right")])
        number, start, end = (int(self._index[name][place]) for name in ("numbers", "starts", "ends"))
        name = self.names[file]
        try:
            if _format(name) == "parquet":
                text = self._groups.table(file, end).column(0)[start].as_py()
            else:
                text = self.files.read(file, start, end).decode()
                if _format(name) == "jsonl":
                    text = json.loads(text)[self.settings.field]
            return Example(f"{name}:{number}", text=text.strip())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ChangedError(
                f"{self.files.paths[file]}:{number}: other content than when it was opened; start again"
            ) from error

    def unpack(self) -> None:
        """Put the contents of packed files into memory.

        Raises:
            DataError: one is damaged, or they are too large.
        """
        left = UNPACKED_BYTES
        for file, path in enumerate(self.files.paths):
            if not path.lower().endswith(".gz"):
                continue
            content = bytearray()
            try:
                with gzip.open(path) as packed:
                    while data := packed.read(2**20):
                        content += data
                        if len(content) > left:
                            raise DataError(
                                f"{path}: packed files with more than {megabytes(UNPACKED_BYTES)} of text, "
                                "which would have to be kept in memory; unpack them with gunzip"
                            )
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path}: cannot be read ({error}); replace or remove it") from error
            left -= len(content)
            self.files.blocks[file] = np.frombuffer(bytes(content), np.uint8)

    def index(self) -> Mapping[str, NDArray[Any]]:
        """Places of all pieces, from the cache if the corpus is large.

        Raises:
            DataError: a file cannot be read.
        """
        sizes, modified = self.files.sizes, self.files.modified
        # A file that changes again within the resolution of its time would keep its old index.
        settled = time.time_ns() - int(modified.max()) > 2 * 10**9
        if int(sizes.sum()) > INDEX_BYTES and settled:
            paths = (os.fsencode(os.path.realpath(path)) for path in self.files.paths)
            kept = (sizes.tobytes(), modified.tobytes(), self.settings.field, self.settings.documents)
            self._index = cached("text", digest(2, *paths, *kept).hex(), self._build)
        else:
            self._index = self._build()
        self._run_ends = np.cumsum(self._index["runs"])
        return self._index

    def _build(self) -> dict[str, NDArray[Any]]:
        numbers, starts, ends, lengths = (array("q") for _ in range(4))
        runs, files, sizes, problems = array("q"), array("q"), array("q"), list[str]()
        with Counting("pieces of text") as counting:
            for file in range(len(self.names)):
                run, groups = -1, self._group_sizes(file)
                for part, piece in self._pieces(file, problems):
                    if part != run:
                        run = part
                        runs.append(0)
                        files.append(file)
                        sizes.append(groups[part] if groups else 0)
                    runs[-1] += 1
                    numbers.append(piece.number)
                    starts.append(piece.start)
                    ends.append(piece.end)
                    lengths.append(piece.length)
                    counting.at(len(numbers))
        listed = Texts.of(problems)
        arrays = {"numbers": numbers, "starts": starts, "ends": ends, "lengths": lengths, "runs": runs}
        found = {
            name: np.array(values, np.int64)
            for name, values in (arrays | {"files": files, "bytes": sizes}).items()
        }
        return found | {"problems": listed.block, "problem_ends": listed.ends}

    def _group_sizes(self, file: int) -> list[int]:
        """Bytes of the row groups of a Parquet file."""
        if _format(self.names[file]) != "parquet":
            return []
        return table_files.opened(Path(self.files.paths[file])).sizes([self.settings.field])

    def _pieces(self, file: int, problems: list[str]) -> Iterator[tuple[int, _Piece]]:
        """Pieces of a file that are not blank, each with the number of its run."""
        path, name = self.files.paths[file], self.names[file]
        try:
            if _format(name) == "parquet":
                yield from self._column(path, name, problems)
                return
            block = self.files.blocks.get(file)
            with open(path, "rb") if block is None else io.BytesIO(block.tobytes()) as source:
                jsonl = _format(name) == "jsonl"
                found = self._objects(path, name, source, problems) if jsonl else self._prose(path, source)
                count = 0
                for piece in found:
                    if piece.end - piece.start > PIECE_BYTES:
                        problems.append(f"{name}:{piece.number}: longer than {megabytes(PIECE_BYTES)}")
                        continue
                    yield count // RUN, piece
                    count += 1
        except table_files.BROKEN as error:
            reason = table_files.one_line(error)
            raise DataError(f"{path}: cannot be read ({reason}); replace or remove it") from error

    def _prose(self, path: str, source: BinaryIO) -> Iterator[_Piece]:
        piece: _Piece | None = None
        documents = self.settings.documents
        for number, start, end, text in _decoded(path, source):
            blank = text is not None and not text.strip()
            if not blank:
                number, start = (piece.number, piece.start) if piece else (number, start)
                piece = _Piece(number, start, end, end - start)
            if piece and (documents == "lines" or (blank and documents == "paragraphs")):
                yield piece
                piece = None
        if piece:
            yield piece

    def _objects(self, path: str, name: str, source: BinaryIO, problems: list[str]) -> Iterator[_Piece]:
        for number, start, end, text in _decoded(path, source):
            if text is None:
                yield _Piece(number, start, end, 0)
            elif text.strip():
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError):
                    row = None
                value = row.get(self.settings.field) if isinstance(row, dict) else None
                size = self._measured(value, f"{name}:{number}", problems)
                if size:
                    yield _Piece(number, start, end, size)

    def _column(self, path: str, name: str, problems: list[str]) -> Iterator[tuple[int, _Piece]]:
        field = self.settings.field
        table = table_files.opened(Path(path))
        if field not in table.schema.names:
            raise DataError(f"{path}: no column '{field}'; it has {listed(table.schema.names)}")
        number = 0
        for group in range(len(table.counts)):
            parts = table.batches(group, [field], RUN)
            for row, value in enumerate(value for part in parts for value in part.column(0).to_pylist()):
                number += 1
                size = self._measured(value, f"{name}:{number}", problems)
                if size:
                    yield group, _Piece(number, row, group, size)

    def _measured(self, value: Any, place: str, problems: list[str]) -> int:
        """Bytes of a text; 0 if it is blank or none, which is noted."""
        if not isinstance(value, str):
            problems.append(f"{place}: no text in '{self.settings.field}'")
            return 0
        try:
            size = len(encoded(value))
        except UnusableError as error:
            problems.append(f"{place}: {error}")
            return 0
        if size > PIECE_BYTES:
            problems.append(f"{place}: longer than {megabytes(PIECE_BYTES)}")
            return 0
        return size if value.strip() else 0


def _format(name: str) -> str:
    return os.path.splitext(name.lower().removesuffix(".gz"))[1].removeprefix(".")


def _decoded(path: str, source: BinaryIO) -> Iterator[tuple[int, int, int, str | None]]:
    """Number, start, end and content of every line; None is one that is too long."""
    for number, start, end, data in lines(source, PIECE_BYTES):
        mark = len(BOM_UTF8) if number == 1 and data and data.startswith(BOM_UTF8) else 0
        try:
            yield number, start + mark, end, None if data is None else data[mark:].decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}:{number}: not UTF-8 ({error.reason}); convert it, for example with iconv"
            ) from error


def _guessed_file(path: Path) -> tuple[int, dict[str, Any]] | None:
    """How a .txt or .jsonl file, packed or not, is read; None if it holds no text."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            data = file.read(2**18)
        if _format(path.name) == "txt":
            data[: data.rfind(b"\n") + 1].decode()
            return 2, {"path": str(path)}
        row = json.loads(data.partition(b"\n")[0])
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        # nobody else reads these; opening tells what is wrong with them
        return (1, {"path": str(path)}) if path.name.lower().endswith((".txt", ".gz")) else None
    texts = (
        {key: value for key, value in row.items() if isinstance(value, str)} if isinstance(row, dict) else {}
    )
    field = next((name for name in TEXT_COLUMNS if name in texts), "")
    if not field:
        return None
    return 2, {"path": str(path)} | ({"field": field} if field != "text" else {})
