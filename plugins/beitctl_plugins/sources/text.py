"""Prose from files."""

import gzip
import json
import os
import zlib
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from beitctl.api import Example, Plugin
from beitctl.data.arrays import Arrays, Texts
from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources.opened import check_share
from beitctl_plugins.sources.reading import table_files, text_index
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.names import TEXT_COLUMNS
from beitctl_plugins.sources.reading.rows import Files, megabytes
from beitctl_plugins.sources.reading.shards import shards
from beitctl_plugins.sources.reading.table_files import Groups, InGroups
from beitctl_plugins.sources.reading.text_pieces import Pieces, file_format

ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
UNPACKED_BYTES = 256 * 2**20
"""Most that all packed files together may hold, as they are kept in memory."""


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
        index = corpus.find()
        count, problems = len(index["starts"]), list(Texts(index["problems"], index["problem_ends"]))
        if not count and not problems:
            raise DataError(
                f"{path}: empty corpus ({len(named)} files searched that end in {', '.join(ENDINGS)}); "
                "correct 'path' in the recipe"
            )
        check_share(path, problems, count, self.max_bad_share)
        hashed = FileHash.of(corpus.files, corpus.names)
        runs, sizes = index["runs"].tolist(), index["bytes"].tolist()
        return InGroups(
            range(count),
            corpus.example,
            hashed.key(self.field, self.documents),
            problems,
            runs,
            index["lengths"],
            window=table_files.window(
                sizes, [run if size else 0 for run, size in zip(runs, sizes, strict=True)]
            ),
            state=hashed.state(),
            notes=table_files.notes(path, sizes),
        )


class _Corpus:
    """The files, and where each piece lies in them."""

    def __init__(self, settings: Text, names: Texts, files: Files) -> None:
        self.settings, self.names, self.files = settings, names, files
        self._index: Arrays = {}
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
            if file_format(name) == "parquet":
                text = self._groups.table(file, end).column(0)[start].as_py()
            else:
                text = self.files.read(file, start, end).decode()
                if file_format(name) == "jsonl":
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

    def find(self) -> Arrays:
        """Places of all pieces.

        Raises:
            DataError: a file cannot be read.
        """
        pieces = Pieces(self.settings.field, self.settings.documents)
        self._index = text_index.index(pieces, self.names, self.files)
        self._run_ends = np.cumsum(self._index["runs"])
        return self._index


def _guessed_file(path: Path) -> tuple[int, dict[str, Any]] | None:
    """How a .txt or .jsonl file, packed or not, is read; None if it holds no text."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            data = file.read(2**18)
        if file_format(path.name) == "txt":
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
