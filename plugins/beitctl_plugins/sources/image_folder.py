"""Pictures in a folder."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from beitctl.api import Example, Plugin
from beitctl.errors import DataError
from beitctl_plugins.sources.opened import Opened, existing, fingerprint


class ImageFolder(Plugin):
    """Pictures in a folder and all folders below it.

    An example is named by its path relative to the folder. Links are followed; hidden files are left out.
    """

    path: Path
    """The folder."""
    labels: Literal["none", "folders"] = "none"
    """``folders``: the first folder on the way to a picture is its class, as in ``train/cat/1.jpg``."""
    extensions: list[str] = Field(["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"])
    """Endings of the files to read, in any case."""

    def open(self) -> Opened:
        """List the folder.

        Raises:
            DataError: there is no such folder, or no picture in it.
        """
        root = existing(self.path)
        if not root.is_dir():
            raise DataError(f"{root}: a file, but 'path' must be a folder of pictures")
        found = _Search(root, tuple("." + ending.lower().lstrip(".") for ending in self.extensions))
        names = sorted(found.pictures(root, ()))
        if self.labels == "folders":
            found.problems += [f"{name}: lies in no class folder" for name in names if "/" not in name]
            names = [name for name in names if "/" in name]
        if not names:
            problems = "".join(f"\n  {line}" for line in found.problems[:5])
            raise DataError(
                f"{root}: no picture in it or below ({found.folders} folders searched for files that end in "
                f"{', '.join(found.endings)}); correct 'path' or 'extensions'{problems}"
            )
        hashed = fingerprint(((name, root / name) for name in names), self.labels)
        return Opened(names, self._example, hashed, found.problems)

    def _example(self, name: str) -> Example:
        label = name.partition("/")[0] if self.labels == "folders" else None
        return Example(name, self.path.expanduser() / name, label=label)


@dataclass
class _Search:
    """A walk through folders, and what it met."""

    root: Path
    endings: tuple[str, ...]
    problems: list[str] = field(default_factory=list)
    folders: int = 0

    def pictures(self, folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Relative names of the pictures in a folder, which lies in the folders ``above``."""
        try:
            status = folder.stat()
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self._leave_out(folder, f"folder cannot be read ({error.strerror})")
            return
        here = (status.st_dev, status.st_ino)
        if here in above:
            self._leave_out(folder, "link to a folder that it lies in")
            return
        self.folders += 1
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = folder / entry.name
            if entry.is_dir():
                yield from self.pictures(path, (*above, here))
            elif entry.name.lower().endswith(self.endings) and self._readable(path):
                yield path.relative_to(self.root).as_posix()

    def _readable(self, path: Path) -> bool:
        """Whether a file can be expected to hold a picture; if not, it is noted."""
        try:
            str(path).encode()
            reason = "" if path.stat().st_size else "empty file"
        except UnicodeEncodeError:
            reason = "name is not UTF-8"
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
        if not reason and not os.access(path, os.R_OK):
            reason = "cannot be read (Permission denied)"
        if reason:
            self._leave_out(path, reason)
        return not reason

    def _leave_out(self, path: Path, reason: str) -> None:
        name = os.fsencode(path.relative_to(self.root)).decode(errors="backslashreplace")
        self.problems.append(f"{name}: {reason}")
