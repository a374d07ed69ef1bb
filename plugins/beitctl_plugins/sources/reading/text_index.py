"""Where all pieces of a corpus lie: found file by file, large files once and by several processes."""

import functools
import multiprocessing
import os
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beitctl.data.arrays import SMALL_BYTES, Arrays, New, Texts, cached, filled
from beitctl.data.order import digest
from beitctl.report.bars import Bar
from beitctl_plugins.sources.reading import ahead
from beitctl_plugins.sources.reading.rows import Files
from beitctl_plugins.sources.reading.text_pieces import Pieces

VERSION = 3
"""Changes when the arrays do, so that older ones in the cache are not read."""
INDEX_BYTES = 16 * 2**20
"""The places in a larger corpus are kept on disk for the next time; those in a larger file by themselves."""
SETTLED = 2 * 10**9
"""Nanoseconds after which a file that changes again has another time."""
NAMES = ("numbers", "starts", "ends", "lengths", "runs", "bytes", "files")
"""Of every piece its number, place and length; of every run its pieces, its bytes in Parquet and its file."""
KINDS = dict.fromkeys((*NAMES, "problem_ends"), np.int64) | {"problems": np.uint8}
"""Types of all arrays of an index."""
SHOWN = 1000
"""So many pieces are found before the number is shown."""


def index(pieces: Pieces, names: Texts, files: Files) -> Arrays:
    """Places of all pieces of all files, from the cache if the corpus is large.

    Raises:
        DataError: a file cannot be read.
    """
    found = _Index(pieces, names, files)
    if int(files.sizes.sum()) > INDEX_BYTES and _settled(int(files.modified.max())):
        return filled("text", found.key(range(len(names))), found.fill)
    arrays: Arrays = {}

    def new(name: str, shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
        return arrays.setdefault(name, np.zeros(shape, kind))

    found.fill(new)
    return arrays


def _settled(modified: int) -> bool:
    """Whether a file that changes now would have another time."""
    return time.time_ns() - modified > SETTLED


class _Places:
    """Places that are found one by one."""

    def __init__(self) -> None:
        self.columns = {name: array("q") for name in NAMES}
        self.problems: list[str] = []

    def add(self, number: int, index: "_Index", bar: Bar) -> None:
        """Find the pieces of a file."""
        path, name = index.files.paths[number], index.names[number]
        block, columns = index.files.blocks.get(number), self.columns
        run, groups = -1, index.pieces.group_sizes(path)
        for part, piece in index.pieces.of(path, name, block, self.problems):
            if part != run:
                run = part
                columns["runs"].append(0)
                columns["bytes"].append(groups[part] if groups else 0)
                columns["files"].append(number)
            columns["runs"][-1] += 1
            for column, value in zip(NAMES, piece, strict=False):
                columns[column].append(value)
            if len(columns["starts"]) % SHOWN == 0:
                bar.at(len(columns["starts"]))

    def arrays(self) -> Arrays:
        """What was found, without a copy."""
        listed = Texts.of(self.problems)
        found: Arrays = {name: np.frombuffer(column, np.int64) for name, column in self.columns.items()}
        return found | {"problems": listed.block, "problem_ends": listed.ends}


class _Index:
    """The places in files, on their way into one index."""

    def __init__(self, pieces: Pieces, names: Texts, files: Files) -> None:
        self.pieces, self.names, self.files = pieces, names, files

    def key(self, numbers: range) -> str:
        """Hash of all that the places in some files depend on."""
        part = slice(numbers.start, numbers.stop)
        paths = (os.fsencode(os.path.realpath(path)) for path in self.files.paths[part])
        names = (os.fsencode(name) for name in self.names[part])
        status = (self.files.sizes[part].tobytes(), self.files.modified[part].tobytes())
        return digest(VERSION, *names, *paths, *status, self.pieces.field, self.pieces.documents).hex()

    def one(self, number: int) -> Arrays:
        """Places in a large file, from the cache; its number in ``files`` is 0."""

        def build() -> Arrays:
            places, worker = _Places(), multiprocessing.parent_process() is not None
            with Bar("pieces of text", quiet=worker) as bar:
                places.add(number, self, bar)
            return places.arrays() | {"files": np.zeros(len(places.columns["files"]), np.int64)}

        return cached("texts", self.key(range(number, number + 1)), build)

    def alone(self, number: int) -> "_Index":
        """The index of one file, small enough to be sent to another process."""
        return _Index(self.pieces, Texts.of([self.names[number]]), Files([self.files.paths[number]]))

    def large(self) -> list[int]:
        """Files whose places are kept by themselves."""
        found: list[int] = np.flatnonzero(self.files.sizes > INDEX_BYTES).tolist()
        times = self.files.modified
        return [n for n in found if n not in self.files.blocks and _settled(int(times[n]))]

    def fill(self, new: New) -> None:
        """Put the places of all files together."""
        large = self.large()
        if len(large) > 1:
            ahead.each(_find, [self.alone(number) for number in large], "indexing text")
        parts = list(self._parts(large))
        sizes = [{name: len(found) for name, found in part().items()} for part in parts]
        whole = {name: new(name, (sum(s[name] for s in sizes),), kind) for name, kind in KINDS.items()}
        before = dict.fromkeys(whole, 0)
        for part, size in zip(parts, sizes, strict=True):
            for name, found in part().items():
                place = whole[name][before[name] : before[name] + size[name]]
                place[...] = found
                if name == "problem_ends":
                    place += before["problems"]
            before = {name: count + size[name] for name, count in before.items()}

    def _parts(self, large: list[int]) -> Iterator[Callable[[], Arrays]]:
        """What gives the places of each large file, and of those between two large ones together."""
        begun = 0
        for number in [*large, len(self.names)]:
            if number > begun:
                yield functools.partial(dict, self._small(range(begun, number)))
            if number < len(self.names):
                yield self._again(number)
            begun = number + 1

    def _small(self, numbers: range) -> Arrays:
        places = _Places()
        with Bar("pieces of text") as bar:
            for number in numbers:
                places.add(number, self, bar)
        return places.arrays()

    def _again(self, number: int) -> Callable[[], Arrays]:
        """What reads the places of a large file from the cache, or has them where that cannot be written.

        Nothing stays open, for files may be many.
        """
        found = self.one(number)
        if all(array.nbytes <= SMALL_BYTES or isinstance(array, np.memmap) for array in found.values()):
            return functools.partial(self._numbered, number)
        return functools.partial(dict, found | {"files": found["files"] + number})

    def _numbered(self, number: int) -> Arrays:
        found = self.one(number)
        return found | {"files": found["files"] + number}


def _find(index: _Index) -> None:
    """Put the places of the only file of an index into the cache."""
    index.one(0)
