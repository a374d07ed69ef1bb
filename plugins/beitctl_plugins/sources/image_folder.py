"""Pictures in a folder."""

import dataclasses
import functools
import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from beitctl.api import Example, Plugin
from beitctl.data.arrays import Texts
from beitctl.errors import DataError
from beitctl.report.bars import Bar
from beitctl.report.naming import printable
from beitctl_plugins.sources.opened import Opened, existing
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.metadata import Metadata, found_in
from beitctl_plugins.sources.reading.names import PICTURES

HIDDEN = "(hidden)"
SHOWN = 1000
"""So many files are counted before the number is shown."""
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev"}
"""Names of folders that are parts of a data set, and no classes."""


@dataclass(frozen=True)
class Folder(Opened):
    """An opened folder."""

    ignored: Mapping[str, int] = field(default_factory=dict)
    """Number of files that were not looked at, by ending in small letters; ``""`` is no ending."""


class ImageFolder(Plugin):
    """Pictures in a folder and all folders below it.

    An example is named by its path relative to the folder. Links are followed; hidden files are left out.
    A file ``metadata.csv`` or ``metadata.jsonl`` in the folder, with a column ``file_name``, gives captions
    and labels; several rows of one picture give it several captions.
    """

    path: Path
    """The folder."""
    labels: Literal["none", "folders"] = "none"
    """``folders``: the first folder on the way to a picture is its class, as in ``train/cat/1.jpg``."""
    extensions: list[str] = Field(list(PICTURES))
    """Endings of the files to read, in any case."""
    metadata: str = ""
    """Table of captions and labels, relative to the folder; empty: ``metadata.csv`` or ``metadata.jsonl``."""
    caption: str = "caption"
    """Column of it with captions; ``text`` is read in place of ``caption`` where only that is there."""
    label: str = "label"
    """Column of it with classes, which count more than folders; a table need not have it."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with pictures; surer of those with class folders or a table of captions."""
        if not path.is_dir():
            return None
        names = _sample(path)
        if not names:
            return None
        if any(os.path.isfile(path / f"metadata.{kind}") for kind in ("csv", "jsonl")):
            return 5, {"path": str(path)}
        classes = {name.split("/")[0] for name in names if "/" in name}
        if len(classes) >= 2 and all("/" in name for name in names) and not classes <= SPLITS:
            return 3, {"path": str(path), "labels": "folders"}
        return 2, {"path": str(path)}

    def open(self) -> Folder:
        """List the folder.

        Raises:
            DataError: there is no such folder, no picture in it, or no usable table of captions.
        """
        root = existing(self.path)
        if not root.is_dir():
            raise DataError(f"{root}: a file, but 'path' must be a folder of pictures")
        endings = tuple("." + ending.lower().lstrip(".") for ending in self.extensions)
        search = _Search(str(root), endings, Bar(f"files in {root}"))
        table = found_in(root, self.metadata, search.problems)
        with search.counting:
            found = search.pictures(below=self.labels == "folders")
        if not len(found.names):
            problems = "".join(f"\n  {line}" for line in search.problems[:5])
            raise DataError(
                f"{root}: no picture in it or below ({search.folders} folders searched for files that end in "
                f"{', '.join(search.endings)}); correct 'path' or 'extensions'{problems}"
            )
        if table is not None and table.parent == root:
            search.ignored[table.suffix] -= 1
        return self._opened(found, search, table)

    def _opened(self, found: "_Pictures", search: "_Search", table: Path | None) -> Folder:
        ignored = {ending: count for ending, count in sorted(search.ignored.items()) if count > 0}
        names = found.names
        key = found.hashed.key(self.labels)
        if table is None:
            return Folder(
                names, self._example, key, search.problems, state=found.hashed.state(), ignored=ignored
            )
        said = Metadata(table, self.caption, self.label)
        rows, lengths = said.rows_of(names, search.problems)
        return Folder(
            rows,
            functools.partial(self._described, said),
            said.fingerprint(key),
            search.problems,
            lengths=lengths,
            state=said.state(found.hashed.state()),
            ignored=ignored,
        )

    def _example(self, name: str) -> Example:
        label = name.partition("/")[0] if self.labels == "folders" else None
        return Example(name, self.path.expanduser() / name, label=label)

    def _described(self, found: Metadata, row: tuple[str, list[dict[str, Any]]]) -> Example:
        example = self._example(row[0])
        captions, label = found.said(row[1])
        return dataclasses.replace(example, captions=captions, label=label or example.label)


@dataclass(frozen=True)
class _Pictures:
    """What a search found, sorted by name."""

    names: Texts
    """Relative to the root."""
    hashed: FileHash


@dataclass
class _Search:
    """A walk through folders, and what it met."""

    root: str
    endings: tuple[str, ...]
    counting: Bar
    seen: int = 0
    problems: list[str] = field(default_factory=list)
    folders: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    linked: set[tuple[int, int]] = field(default_factory=set)
    """Folders that a link led to: each is entered once, or links across would multiply."""

    def pictures(self, *, below: bool) -> _Pictures:
        """The pictures below the root, with ``below`` none of those directly in it.

        A folder is sorted as if its name ended with a slash, and what it holds comes in its place: that is
        the order of the full names, and only those of the folders on the way are in memory as objects.
        """
        block, ends = bytearray(), array("q")
        hashed = FileHash(self.root)
        lone = list[str]()
        waiting = [self._entries(_Step("", False, ()))]
        while waiting:
            entry = next(waiting[-1], None)
            if entry is None:
                waiting.pop()
            elif isinstance(entry, _Step):
                waiting.append(self._entries(entry))
            elif below and "/" not in entry[0]:
                lone.append(f"{printable(entry[0])}: lies in no class folder")
            else:
                name, size, modified = entry
                block += name.encode("utf-8", "surrogateescape")
                ends.append(len(block))
                hashed.add(name, size, modified)
        self.problems += lone
        names = Texts(np.frombuffer(block, np.uint8), np.frombuffer(ends, np.int64))
        return _Pictures(names, hashed)

    def _entries(self, step: "_Step") -> "Iterator[_Step | tuple[str, int, int]]":
        """Names, sizes and times of the pictures in a folder, and its folders, sorted."""
        here = self._entered(*step)
        if here is None:
            return
        start = f"{step.name}/" if step.name else ""
        names, sizes, times = list[str](), array("q"), array("q")
        links, problems = set[str](), list[str]()
        try:
            for entry in self._listed(step.name):
                folder = _is_folder(entry)
                found = (0, 0) if folder else _picture(entry, start + entry.name)
                if isinstance(found, str):
                    problems.append(f"{printable(start + entry.name)}: {found}")
                    continue
                names.append(f"{entry.name}/" if folder else entry.name)
                sizes.append(found[0])
                times.append(found[1])
                if folder and entry.is_symlink():
                    links.add(names[-1])
        except OSError as error:
            self._leave_out(step.name or ".", f"folder cannot be read ({error.strerror})")
            return
        self.problems += sorted(problems)
        self.folders += 1
        for place in sorted(range(len(names)), key=names.__getitem__):
            name = names[place]
            if name.endswith("/"):
                yield _Step(start + name[:-1], name in links, (*step.above, here))
            else:
                yield start + name, sizes[place], times[place]

    def _listed(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """Folders and files with the right endings; others are counted."""
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in entries:
                self.seen += 1
                if self.seen % SHOWN == 0:
                    self.counting.at(self.seen)
                if entry.name.startswith("."):
                    self.ignored[HIDDEN] += 1
                elif entry.name.lower().endswith(self.endings) or _is_folder(entry):
                    yield entry
                else:
                    self.ignored[_ending(entry.name)] += 1
        self.counting.at(self.seen)

    def _entered(self, folder: str, link: bool, above: tuple[tuple[int, int], ...]) -> tuple[int, int] | None:
        """Which folder it is on disk; None if it cannot be entered, or was already."""
        try:
            status = os.stat(os.path.join(self.root, folder))
        except OSError as error:
            self._leave_out(folder or ".", f"folder cannot be read ({error.strerror})")
            return None
        here = (status.st_dev, status.st_ino)
        if here in above:
            self._leave_out(folder, "link to a folder that it lies in")
            return None
        if link and here in self.linked:
            self._leave_out(folder, "link to a folder that another link leads to")
            return None
        if link:
            self.linked.add(here)
        return here

    def _leave_out(self, name: str, reason: str) -> None:
        self.problems.append(f"{printable(name)}: {reason}")


class _Step(NamedTuple):
    """A folder to go into."""

    name: str
    link: bool
    """Whether a link leads there."""
    above: tuple[tuple[int, int], ...]
    """The folders that it lies in."""


def _picture(entry: os.DirEntry[str], name: str) -> tuple[int, int] | str:
    """Size and time of a file that can be expected to hold a picture, or why it cannot."""
    try:
        status = entry.stat()
        if not stat.S_ISREG(status.st_mode):
            return "neither a file nor a folder"
        if not os.access(entry.path, os.R_OK):
            return "cannot be read (Permission denied)"
        if not name.isascii():
            name.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return (status.st_size, status.st_mtime_ns) if status.st_size else "empty file"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _ending(name: str) -> str:
    """Ending of a name if it looks like one: numbers and sentences behind a dot do not."""
    ending = os.path.splitext(name)[1].lower()
    return ending if ending[1:].isalnum() and not ending[1:].isdigit() and len(ending) <= 10 else ""


def _sample(root: Path, folders: int = 40, entries: int = 200) -> list[str]:
    """Relative names of some pictures, from the upper folders."""
    waiting, names = [""], []
    endings = tuple(f".{ending}" for ending in PICTURES)
    for _ in range(folders):
        if not waiting:
            break
        folder = waiting.pop(0)
        try:
            with os.scandir(os.path.join(root, folder)) as found:
                some = sorted(islice(found, entries), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in some:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if _is_folder(entry) and name.count("/") < 4:
                waiting.append(name)
            elif entry.name.lower().endswith(endings):
                names.append(name)
    return names
