"""Pictures that a text file lists."""

import functools
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from beitctl.api import Example, Plugin
from beitctl.data.arrays import Texts
from beitctl.data.order import digest
from beitctl.errors import DataError
from beitctl.report.bars import Bar
from beitctl_plugins.sources.opened import Opened, check_share, existing
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.rows import UnusableError, lines, picture_status, short

LINE_BYTES = 2**16
"""No path is longer; such a file is no list."""


class PathList(Plugin):
    """Pictures that a text file lists, one path a line.

    Blank lines and lines that begin with # are skipped. An example is named by its path as it is listed; the
    order is that of the file. Lines whose picture is missing, and all but the first of equal lines, are left
    out and listed.
    """

    path: Path
    """The text file, in UTF-8."""
    root: str = ""
    """Folder that relative paths start from; empty: the folder of the file."""
    labels: Literal["none", "column", "folders"] = "none"
    """``column``: the class is behind the path and a tab; ``folders``: it is the folder of the picture."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable lines to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Text files whose first lines name pictures that are there."""
        if path.suffix.lower() != ".txt" or not path.is_file():
            return None
        try:
            listed = [line or b"" for _, line in islice(_listed(path), 5)]
            for line in listed:
                picture_status(os.path.join(path.parent, line.decode().partition("\t")[0]))
        except (DataError, UnusableError, UnicodeDecodeError):
            return None
        if not listed:
            return None
        column = all(line.partition(b"\t")[2].strip() for line in listed)
        return 4, {"path": str(path)} | ({"labels": "column"} if column else {})

    def open(self) -> Opened:
        """Read the list and look for every picture.

        Raises:
            DataError: no such file, not readable, or too few of its pictures are there.
        """
        path = existing(self.path)
        if not path.is_file():
            raise DataError(f"{path}: a folder, but 'path' must be a text file with one path a line")
        root = str(Path(self.root).expanduser() if self.root else path.parent)
        found: dict[str, str] = {}
        hashed, problems = FileHash(root), list[str]()
        with Bar(path.name) as counting:
            for number, line in _listed(path):
                try:
                    name, label = self._parts(line, root)
                    if name in found:
                        raise UnusableError(f"listed before: {short(name)}")
                    status = picture_status(os.path.join(root, name))
                    hashed.add(name, status.st_size, status.st_mtime_ns)
                    found[name] = label
                except UnusableError as error:
                    problems.append(f"{path.name}:{number}: {error}")
                counting.at(number)
        if not found and not problems:
            raise DataError(f"{path}: no path in it; correct 'path' in the recipe")
        check_share(path, problems, len(found), self.max_bad_share)
        names, labels = Texts.of(found), Texts.of(found.values())
        key = digest(
            hashed.key(self.labels), labels.block.tobytes(), labels.ends.astype("<i8").tobytes()
        ).hex()
        example = functools.partial(_example, root, names, labels if self.labels != "none" else None)
        return Opened(range(len(names)), example, key, problems, state=hashed.state())

    def _parts(self, line: bytes | None, root: str) -> tuple[str, str]:
        """Path and class on a line.

        Raises:
            UnusableError: there is none.
        """
        if line is None:
            raise UnusableError("too long for a path")
        try:
            name, _, label = line.decode().partition("\t")
        except UnicodeDecodeError as error:
            raise UnusableError(f"not UTF-8: {short(line)}") from error
        if self.labels == "none":
            return name, ""
        if self.labels == "folders":
            return name, os.path.basename(os.path.dirname(os.path.join(root, name)))
        if not label.strip():
            raise UnusableError(f"no class behind the path and a tab: {short(name)}")
        return name, label.strip()


def _example(root: str, names: Texts, labels: Texts | None, index: int) -> Example:
    name = names[index]
    return Example(name, Path(root, name), label=labels[index] if labels is not None else None)


def _listed(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number and content of the lines that are no comment; None is a line that is too long.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, _, _, data in lines(file, LINE_BYTES):
                line = data and data.removeprefix(BOM_UTF8 if number == 1 else b"").rstrip(b"\r\n")
                if line is None or (line.strip() and not line.startswith(b"#")):
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); replace it or correct 'path'") from error
