"""Where the members of tar files lie, found once and kept in the cache."""

import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from beitctl.data.arrays import Arrays, Texts, cached
from beitctl.data.order import digest
from beitctl.errors import DataError
from beitctl.report.naming import printable
from beitctl_plugins.sources.reading import ahead
from beitctl_plugins.sources.reading.shards import Shard

VERSION = 1
"""Changes when the arrays do, so that older ones in the cache are not read."""
MOST_HEADER_BYTES = 2**20
"""A header that claims more is broken: names and attributes of a file are never that long."""
MOST_DIGITS = 300
"""In a row; names of files have at most 255 characters."""
BLOCK = 512
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")
"""How gzip, bzip2, xz and zstd begin."""


@dataclass(frozen=True)
class Members:
    """The samples of tar files and their members, which have the same name up to the first dot."""

    keys: Texts
    """Name of each sample, without endings."""
    starts: NDArray[np.int64]
    """(samples + 1,): where the members of each sample begin in the arrays below."""
    endings: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    kinds: Texts
    """Every ending that occurs; ``endings`` are places in it."""
    counts: NDArray[np.int64]
    """Samples in each tar."""
    problems: Texts
    unread: int
    """Bytes that could not be made sense of."""
    repeated: bool
    """Whether tars share names of samples."""


def index(tars: Sequence[Shard]) -> Members:
    """Members of all tars, from the cache where they were indexed before.

    Raises:
        DataError: one of them cannot be read at all.
    """

    def build() -> Arrays:
        ahead.each(_one, tars, "indexing tars")
        return _joined([_one(tar) for tar in tars])

    keys = [_key(tar) for tar in tars]
    found = cached("tars", digest(VERSION, *keys, *(os.fsencode(tar.name) for tar in tars)).hex(), build)
    return Members(
        Texts(found["keys"], found["key_ends"]),
        found["starts"],
        found["endings"],
        found["offsets"],
        found["sizes"],
        Texts(found["kinds"], found["kind_ends"]),
        found["counts"],
        Texts(found["problems"], found["problem_ends"]),
        int(found["flags"][0]),
        bool(found["flags"][1]),
    )


def _key(tar: Shard) -> str:
    return digest(
        VERSION, os.fsencode(tar.name), os.fsencode(tar.path.absolute()), tar.size, tar.modified
    ).hex()


def _one(tar: Shard) -> Arrays:
    """Arrays of one tar, in memory: a file that stays open for each would be too many."""
    return {name: np.array(array) for name, array in cached("tar", _key(tar), lambda: _scan(tar)).items()}


class _Headers:
    """A tar as ``tarfile`` reads it, which may ask for headers only."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"header of {size} bytes")
        data = self.file.read(size)
        # tarfile before Python 3.11.10 searches these for hours (CVE-2024-6232)
        if size > BLOCK and max(map(len, re.findall(rb"[0-9]+", data)), default=0) > MOST_DIGITS:
            raise tarfile.ReadError(f"header with a number of more than {MOST_DIGITS} digits")
        return data


@dataclass
class _Found:
    """What was met in one tar so far."""

    tar: Shard
    samples: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Offset and size by ending, by key."""
    problems: list[str] = field(default_factory=list)
    unread: int = 0
    last: str = ""
    """Key of the last good member."""

    def broken(self, offset: int, reason: str) -> None:
        after = f", after sample '{printable(self.last)}'" if self.last else ""
        self.problems.append(f"{self.tar.name}: at byte {offset}{after}: {reason}; the rest is left out")
        self.unread = self.tar.size - min(offset, self.tar.size)

    def member(self, member: tarfile.TarInfo) -> None:
        """Note one member, or why it is left out."""
        name = member.name
        while name.startswith("./"):
            name = name[2:]
        folder, _, base = name.rpartition("/")
        if member.isdir() or (base.startswith(".") and base != ".."):
            return
        stem, dot, ending = base.partition(".")
        reason = _unfit(member, name)
        if not reason and not (stem and dot and ending):
            reason = "no ending, so it belongs to no sample"
        key = f"{folder}/{stem}" if folder else stem
        parts = self.samples.get(key, {})
        if not reason and ending.lower() in parts:
            reason = "occurs twice; the first one is kept"
        if reason:
            self.problems.append(f"{self.tar.name}:{printable(name[:200])}: {reason}")
            return
        self.samples.setdefault(key, parts)[ending.lower()] = (member.offset_data, member.size)
        self.last = key


def _unfit(member: tarfile.TarInfo, name: str) -> str:
    """Why a member cannot be used; empty if it can."""
    if name.startswith("/") or ".." in name.split("/"):
        return "its path leads out of the archive"
    if member.issym() or member.islnk():
        return "a link, which is not followed"
    if member.issparse():
        return "a sparse file, which cannot be read in one piece"
    if not member.isreg():
        return "no regular file"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    return ""


def _scan(tar: Shard) -> Arrays:
    """Arrays of one tar, read header by header.

    Raises:
        DataError: it cannot be opened.
    """
    found = _Found(tar)
    try:
        with tar.path.open("rb") as file:
            _read_headers(file, found)
    except OSError as error:
        raise DataError(f"{tar.path}: cannot be read ({error.strerror}); replace or remove it") from error
    return _arrays(found)


BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError, LookupError)
"""What ``tarfile`` raises for headers that make no sense."""


def _opened(file: IO[bytes]) -> tarfile.TarFile:
    if file.read(4).startswith(COMPRESSED):
        raise tarfile.ReadError("compressed, but samples are read from any place in it; decompress it")
    file.seek(0)
    return tarfile.TarFile(fileobj=_Headers(file), encoding="utf-8")  # type: ignore[arg-type]


def first_names(path: Path, most: int) -> list[str]:
    """Names of the first members of a tar, as far as it can be read."""
    try:
        with path.open("rb") as file:
            return [member.name for member in itertools.islice(_opened(file), most)]
    except (OSError, *BROKEN):
        return []


def _read_headers(file: IO[bytes], found: _Found) -> None:
    place = 0
    try:
        opened = _opened(file)
        while (member := opened.next()) is not None:
            if member.size < 0 or opened.offset <= place:
                found.broken(place, "broken header")
                return
            if member.offset_data + member.size > found.tar.size:
                found.broken(member.offset, "cut off")
                return
            found.member(member)
            place = opened.offset
            opened.members.clear()  # type: ignore[attr-defined]  # or all of them stay in memory
    except BROKEN as error:
        found.broken(place, str(error))
        return
    _check_end(file, found, opened.offset)


def _check_end(file: IO[bytes], found: _Found, place: int) -> None:
    """Tell the end of a tar from a broken header, which ``tarfile`` does not."""
    file.seek(place)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        found.broken(place, "ends without the mark of the end, so it may be cut off")
    elif block.count(0) < BLOCK:
        found.broken(place, "broken header")
    else:
        place += BLOCK
        while block := file.read(2**20):
            if block.count(0) < len(block):
                found.broken(place, "more data behind the mark of the end, as of tars joined by cat")
                return
            place += len(block)


def _arrays(found: _Found) -> Arrays:
    kinds = sorted({ending for parts in found.samples.values() for ending in parts})
    number = {ending: place for place, ending in enumerate(kinds)}
    rows = [(number[ending], *where) for parts in found.samples.values() for ending, where in parts.items()]
    table = np.array(rows, np.int64).reshape(-1, 3)
    counts = [len(parts) for parts in found.samples.values()]
    hashes = b"".join(blake2b(key.encode(), digest_size=8).digest() for key in found.samples)
    return {
        **_texts("keys", "key_ends", found.samples),
        **_texts("kinds", "kind_ends", kinds),
        **_texts("problems", "problem_ends", found.problems),
        "hashes": np.frombuffer(hashes, np.uint64),
        "members": np.array(counts, np.int64),
        "endings": table[:, 0].astype(np.int32),
        "offsets": np.ascontiguousarray(table[:, 1]),
        "sizes": np.ascontiguousarray(table[:, 2]),
        "flags": np.array([found.unread], np.int64),
    }


def _texts(block: str, ends: str, texts: Any) -> Arrays:
    packed = Texts.of(texts)
    return {block: packed.block, ends: packed.ends}


def _joined(tars: list[Arrays]) -> Arrays:
    """Arrays of several tars as one."""

    def joined(name: str, change: Callable[[Arrays], NDArray[Any]] | None = None) -> NDArray[Any]:
        return np.concatenate([change(tar) if change else tar[name] for tar in tars])

    def texts(block: str, ends: str) -> Arrays:
        shifts = np.cumsum([0, *(len(tar[block]) for tar in tars)])
        moved = [tar[ends] + shift for tar, shift in zip(tars, shifts, strict=False)]
        return {block: joined(block), ends: np.concatenate(moved)}

    kinds = sorted({kind for tar in tars for kind in _kinds(tar)})
    number = {kind: place for place, kind in enumerate(kinds)}

    def renumbered(tar: Arrays) -> NDArray[Any]:
        new = np.array([number[kind] for kind in _kinds(tar)], np.int32)
        return new[tar["endings"]] if len(new) else tar["endings"]

    hashes = np.sort(joined("hashes"))
    return {
        **texts("keys", "key_ends"),
        **texts("problems", "problem_ends"),
        **_texts("kinds", "kind_ends", kinds),
        "starts": np.concatenate([[0], np.cumsum(joined("members"))]).astype(np.int64),
        "endings": joined("endings", renumbered),
        "offsets": joined("offsets"),
        "sizes": joined("sizes"),
        "counts": np.array([len(tar["key_ends"]) for tar in tars], np.int64),
        "flags": np.array([joined("flags").sum(), (hashes[1:] == hashes[:-1]).any()], np.int64),
    }


def _kinds(tar: Arrays) -> Iterator[str]:
    return iter(Texts(tar["kinds"], tar["kind_ends"]))
