"""Pieces of text in a file, and where each of them lies."""

import io
import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beitctl.errors import DataError
from beitctl_plugins.sources.reading import table_files
from beitctl_plugins.sources.reading.rows import UnusableError, encoded, lines, megabytes
from beitctl_plugins.sources.reading.wording import listed

PIECE_BYTES = 64 * 2**20
"""Longer pieces are left out."""
RUN = 1024
"""Pieces of a .txt or .jsonl file that are read near one another; a smaller file is one run."""


class Piece(NamedTuple):
    """Where one piece lies."""

    number: int
    """Its first line or its row, from 1."""
    start: int
    """Place of its first byte; in Parquet its row in the row group."""
    end: int
    """Place behind its last byte; in Parquet its row group."""
    length: int
    """Bytes, about."""


@dataclass(frozen=True)
class Pieces:
    """Finds the pieces of files."""

    field: str
    """Key or column of the text."""
    documents: str
    """What a piece is in .txt: ``lines``, ``paragraphs`` or ``files``."""

    def group_sizes(self, path: str) -> list[int]:
        """Bytes of the row groups of a Parquet file; none of another one."""
        return table_files.opened(Path(path)).sizes([self.field]) if file_format(path) == "parquet" else []

    def of(
        self, path: str, name: str, block: NDArray[np.uint8] | None, problems: list[str]
    ) -> Iterator[tuple[int, Piece]]:
        """Pieces of a file that are not blank, each with the number of its run.

        Args:
            path: of the file.
            name: of the file in messages.
            block: its content, if it was packed.
            problems: takes up what is left out.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            if file_format(name) == "parquet":
                yield from self._column(path, name, problems)
                return
            with open(path, "rb") if block is None else io.BytesIO(block.tobytes()) as source:
                jsonl = file_format(name) == "jsonl"
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

    def _prose(self, path: str, source: BinaryIO) -> Iterator[Piece]:
        piece: Piece | None = None
        documents = self.documents
        for number, start, end, text in _decoded(path, source):
            blank = text is not None and not text.strip()
            if not blank:
                number, start = (piece.number, piece.start) if piece else (number, start)
                piece = Piece(number, start, end, end - start)
            if piece and (documents == "lines" or (blank and documents == "paragraphs")):
                yield piece
                piece = None
        if piece:
            yield piece

    def _objects(self, path: str, name: str, source: BinaryIO, problems: list[str]) -> Iterator[Piece]:
        for number, start, end, text in _decoded(path, source):
            if text is None:
                yield Piece(number, start, end, 0)
            elif text.strip():
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError):
                    row = None
                value = row.get(self.field) if isinstance(row, dict) else None
                size = self._measured(value, f"{name}:{number}", problems)
                if size:
                    yield Piece(number, start, end, size)

    def _column(self, path: str, name: str, problems: list[str]) -> Iterator[tuple[int, Piece]]:
        field = self.field
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
                    yield group, Piece(number, row, group, size)

    def _measured(self, value: Any, place: str, problems: list[str]) -> int:
        """Bytes of a text; 0 if it is blank or none, which is noted."""
        if not isinstance(value, str):
            problems.append(f"{place}: no text in '{self.field}'")
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


def file_format(name: str) -> str:
    """``txt``, ``jsonl`` or ``parquet``, packed or not."""
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
