"""What the sources of named data sets share: annotations, pictures that they name, packed examples."""

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from beitctl.api import Object, Plugin
from beitctl.errors import DataError
from beitctl.report.naming import printable
from beitctl_plugins.sources.opened import Opened, check_share, existing
from beitctl_plugins.sources.reading.columns import Column, InColumns, ids_packed, objects_packed
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.metadata import captions_in
from beitctl_plugins.sources.reading.names import PICTURES
from beitctl_plugins.sources.reading.rows import UnusableError, encoded, short

ENDINGS = tuple(f".{ending}" for ending in PICTURES)
TEXT_BYTES = 2**20
"""Longer questions, statements and answers are left out."""
SHOWN = 20
"""Names that a message shows of a folder."""


class Layout:
    """A folder that should be laid out as a data set is published."""

    def __init__(self, path: Path, name: str, tree: str) -> None:
        self.root, self.name, self.tree = existing(path), name, tree
        if not self.root.is_dir():
            raise self.wrong("it is a file")

    def wrong(self, reason: str) -> DataError:
        """An error that shows what is expected and what is there."""
        found = "nothing"
        if self.root.is_dir():
            names = some_names(self.root)
            entries = [f"{name}{'/' * (self.root / name).is_dir()}" for name in names]
            more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
            found = ", ".join(entries[:SHOWN]) + more or "nothing"
        tree = "".join(f"\n  {line}" for line in self.tree.strip().splitlines())
        return DataError(
            f"{self.root}: not the folder of {self.name}: {reason}; correct 'path'. "
            f"Expected{tree}\nfound {found}"
        )

    def file(self, *names: str) -> Path:
        """The first of these files that is there.

        Raises:
            DataError: none is.
        """
        for name in names:
            if (self.root / name).is_file():
                return self.root / name
        raise self.wrong(f"no {' or '.join(names)}")

    def folder(self, *names: str) -> str:
        """The first of these folders that is there, as a name below the root.

        Raises:
            DataError: none is.
        """
        for name in names:
            if (self.root / name).is_dir():
                return name
        raise self.wrong(f"no {'/ or '.join(names)}/")


def read_json(path: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Content of a JSON file; the hook may make its objects smaller while they are read.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(path.read_bytes(), object_hook=hook)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error


def section(path: Path, content: Any, key: str) -> list[Any]:
    """A list in a JSON file.

    Raises:
        DataError: there is none.
    """
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        keys = ", ".join(content) if isinstance(content, dict) else short(content)
        raise DataError(f"{path}: no list '{key}' in it, only {keys[:200]}; download it again")
    return found


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank.

    Raises:
        DataError: it cannot be read as UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error


def cell(row: Any, key: str, kind: type) -> Any:
    """A value in a row.

    Raises:
        UnusableError: it is missing or of another type.
    """
    found = row.get(key) if isinstance(row, dict) else None
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise UnusableError(f"no {kind.__name__} '{key}' in {short(row)}")
    return found


class Pictures:
    """Files below a folder, found in listings of its folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.used: dict[str, tuple[int, int]] = {}
        """Sizes and times of the files that examples need."""
        self._folders: dict[str, dict[str, tuple[int, int]]] = {}
        self._empty: set[str] = set()

    def names(self, folder: str) -> dict[str, tuple[int, int]]:
        """Sizes and times of the pictures in a folder by name, sorted; nothing where there is no folder."""
        if folder not in self._folders:
            found = {}
            try:
                with os.scandir(self.root / folder) as entries:
                    for entry in entries:
                        if entry.name.lower().endswith(ENDINGS) and entry.name[0] != "." and entry.is_file():
                            status = entry.stat()
                            found[entry.name] = (status.st_size, status.st_mtime_ns)
            except (FileNotFoundError, NotADirectoryError, ValueError):
                found = {}
            except OSError as error:
                raise DataError(
                    f"{self.root / folder}: cannot be read ({error.strerror}); correct its permissions"
                ) from error
            self._folders[folder] = dict(sorted(found.items()))
        return self._folders[folder]

    def folders(self, folder: str) -> list[str]:
        """Folders in a folder, sorted."""
        return [
            name for name in some_names(self.root / folder, 10**6) if (self.root / folder / name).is_dir()
        ]

    def find(self, *places: str) -> str:
        """The first of these pictures that is there.

        Raises:
            UnusableError: none is, or it is empty.
        """
        for place in places:
            folder, _, name = place.rpartition("/")
            if place.startswith("/") or ".." in place.split("/"):
                raise UnusableError(f"its path leads out of the data set: {short(place)}")
            status = self.names(folder).get(name)
            if status and not status[0]:
                self._empty.add(place)
                raise UnusableError(f"empty picture {printable(place)}")
            if status:
                self.used[place] = status
                return place
        raise UnusableError(f"no picture {short(places[0])}")

    def unused(self, *folders: str) -> Iterator[str]:
        """A line for every picture that no annotation named."""
        for folder in folders:
            for name in self.names(folder):
                if f"{folder}/{name}" not in self.used and f"{folder}/{name}" not in self._empty:
                    yield f"{printable(f'{folder}/{name}')}: nothing in the annotations names it"


class Builder:
    """Collects examples in little memory; paths of pictures are relative to the folder of the data set."""

    SINGLE = ("id", "image", "text", "label", "second", "segmentation", "objects", "token_ids")
    SEVERAL = ("captions", "answers", "caption_ids")

    def __init__(self, root: Path) -> None:
        self.pictures = Pictures(root)
        self.problems: list[str] = []
        self._columns = {name: Column() for name in (*self.SINGLE, *self.SEVERAL)}
        self._starts = {name: array("q", [0]) for name in self.SEVERAL}
        self._ids: set[str] = set()

    def __len__(self) -> int:
        return len(self._columns["id"].ends)

    def add(
        self,
        id: str,
        captions: Any = (),
        answers: Sequence[str] = (),
        objects: Sequence[Object] = (),
        token_ids: Sequence[int] = (),
        caption_ids: Sequence[Sequence[int]] = (),
        **cells: str,
    ) -> None:
        """Add an example.

        Args:
            id: its name.
            captions: texts.
            answers: texts.
            objects: what is in its picture; masks are plain JSON.
            token_ids: in place of ``text``.
            caption_ids: in place of ``captions``.
            cells: ``image``, ``text``, ``label``, ``second``, ``segmentation``.

        Raises:
            UnusableError: its texts cannot be used, or another one has its id.
        """
        kept = captions_in(list(captions)) if captions else ()
        single = {name: encoded(text) for name, text in {"id": id, **cells}.items()}
        several = {"captions": [encoded(c) for c in kept], "answers": [encoded(a) for a in answers]}
        for text in (*single.values(), *several["answers"]):
            if len(text) > TEXT_BYTES:
                raise UnusableError(f"a text of {len(text):,} bytes is too long")
        if id in self._ids:
            raise UnusableError(f"another one has its id, {short(id)}")
        self._ids.add(id)
        if objects:
            single["objects"] = objects_packed(objects)
        if len(token_ids):
            single["token_ids"] = ids_packed(token_ids)
        several["caption_ids"] = [ids_packed(ids) for ids in caption_ids]
        for name in self.SINGLE:
            self._columns[name].add(single.get(name, b""))
        for name, texts in several.items():
            for text in texts:
                self._columns[name].add(text)
            self._starts[name].append(len(self._columns[name].ends))

    def attempt(self, where: str, add: Callable[[], None]) -> None:
        """Add an example, or note why it cannot be used."""
        try:
            add()
        except UnusableError as error:
            self.problems.append(f"{printable(where)}: {error}")

    def opened(self, source: Plugin, annotations: Iterable[Path], limit: float) -> Opened:
        """All of it as examples.

        Raises:
            DataError: too little is usable.
        """
        root = self.pictures.root
        check_share(root, self.problems, len(self), limit)
        hashed = FileHash(str(root))
        for name, status in sorted(self.pictures.used.items()):
            hashed.add(name, *status)
        for path in annotations:
            there = path.stat()
            hashed.add(f"annotations:{path.name}", there.st_size, there.st_mtime_ns, str(path))
        settings = source.model_dump_json(exclude={"path", "names", "max_bad_share"})
        columns = {name: column.texts() for name, column in self._columns.items() if column.some}
        starts = {name: np.array(some, np.int64) for name, some in self._starts.items()}
        kept = InColumns(root, columns, starts)
        return Opened(
            range(len(self)),
            kept.example,
            hashed.key(settings),
            self.problems,
            lengths=kept.lengths(),
            state=hashed.state(),
            things=kept.objects if "objects" in columns else None,
        )


def karpathy(file: Path, builder: Builder, splits: Sequence[str], places: Callable[[Any], list[str]]) -> None:
    """Add pictures and captions of Karpathy's splits; no splits mean all.

    Args:
        file: his dataset_*.json.
        builder: takes the examples.
        splits: names in the file.
        places: where a picture may lie, by its row.

    Raises:
        DataError: it is not such a file.
    """

    def add(row: Any) -> None:
        sentences = [cell(sentence, "raw", str) for sentence in cell(row, "sentences", list)]
        if not sentences:
            raise UnusableError("no sentence")
        builder.add(cell(row, "filename", str), sentences, image=builder.pictures.find(*places(row)))

    for number, row in enumerate(section(file, read_json(file), "images"), 1):
        if not splits or not isinstance(row, dict) or row.get("split") in splits:
            builder.attempt(f"{file.name}:images {number}", lambda row=row: add(row))  # type: ignore[misc]


def some_names(folder: Path, most: int = 1000) -> list[str]:
    """Some names in a folder, sorted, to guess from."""
    try:
        with os.scandir(folder) as found:
            return sorted(entry.name for entry in islice(found, most))
    except OSError:
        return []
