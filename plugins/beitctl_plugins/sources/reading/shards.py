"""Sets of large files: which ones a setting means, and whether they are still what was opened."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from beitctl.errors import DataError

MOST_FILES = 1_000_000
"""More files than this are not meant by any pattern."""


@dataclass(frozen=True)
class Shard:
    """A file, and how it was when the source was opened."""

    name: str
    """Path relative to the folder or to the fixed part of the pattern."""
    path: Path
    size: int
    modified: int
    """Nanoseconds."""

    @classmethod
    def of(cls, name: str, path: Path) -> "Shard":
        """A file as it is now.

        Raises:
            DataError: it cannot be looked at.
        """
        try:
            found = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); replace or remove it") from error
        return cls(name, path, found.st_size, found.st_mtime_ns)


def shards(path: Path, endings: tuple[str, ...]) -> list[Shard]:
    """Files that a path means: a file, those of a folder and below it, a glob, or braces as in {00..41}.

    Those of a folder or glob come sorted by name, those of braces as they are written. Hidden ones are left
    out.

    Raises:
        DataError: there is none, or one of those in braces is missing.
    """
    path = path.expanduser()
    try:
        found = list(_meant(path, endings))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); correct 'path' in the recipe") from error
    if not found:
        raise DataError(f"{path}: no file that ends in {', '.join(endings)}; correct 'path' in the recipe")
    return [Shard.of(name, file) for name, file in found]


def _meant(path: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    if path.is_dir():
        for file in sorted(_below(path, endings), key=lambda file: file.relative_to(path).as_posix()):
            yield file.relative_to(path).as_posix(), file
    elif path.exists():
        if not path.name.lower().endswith(endings):
            raise DataError(f"{path}: expected a file that ends in {', '.join(endings)}")
        yield path.name, path
    else:
        yield from _matching(path, endings)


def _matching(path: Path, endings: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    start = _fixed_part(path)
    patterns = braces(str(path))
    if len(patterns) == 1 and not glob.has_magic(str(path)):
        raise DataError(f"{path}: no such file or folder; correct 'path' in the recipe")
    for pattern in patterns:
        magic = glob.has_magic(pattern)
        for file in sorted(start.glob(os.path.relpath(pattern, start))) if magic else [Path(pattern)]:
            if not file.exists():
                raise DataError(f"{file}: no such file, but {path} names it; correct 'path' in the recipe")
            if file.name.lower().endswith(endings) and not file.name.startswith("."):
                yield file.relative_to(start).as_posix(), file


def _below(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    """Files in a folder and below it; links are followed, but never around in a circle."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in files:
            if name.lower().endswith(endings) and not name.startswith("."):
                yield Path(place, name)


def _fixed_part(path: Path) -> Path:
    """The folders at the beginning of a pattern that are no pattern."""
    parts: list[str] = []
    for part in path.parts[:-1]:
        if glob.has_magic(part) or "{" in part:
            break
        parts.append(part)
    return Path(*parts)


def braces(pattern: str) -> Sequence[str]:
    """Every text that a pattern with {a,b} or {00..41} stands for, in the order of the shell.

    Raises:
        DataError: it stands for too many.
    """
    found = re.search(r"\{([^{}]*,[^{}]*|(\d+)\.\.(\d+))\}", pattern)
    if not found:
        return [pattern]
    if found[2] is None:
        middle: Sequence[str] = found[1].split(",")
    else:
        first, last = int(found[2]), int(found[3])
        step = 1 if first <= last else -1
        if abs(last - first) >= MOST_FILES:
            raise DataError(f"{pattern}: stands for more than {MOST_FILES:,} files; correct 'path'")
        width = max(len(found[2]), len(found[3])) if "0" in (found[2][0], found[3][0]) else 0
        middle = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    ends = braces(pattern[found.end() :])
    if len(middle) * len(ends) > MOST_FILES:
        raise DataError(f"{pattern}: stands for more than {MOST_FILES:,} files; correct 'path'")
    return [pattern[: found.start()] + part + end for part in middle for end in ends]
