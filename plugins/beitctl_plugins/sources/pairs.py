"""Pictures with captions, from a table."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from beitctl.api import Example, Plugin
from beitctl.errors import DataError
from beitctl_plugins.sources.opened import Opened, check_share, existing, fingerprint


class UnusableError(Exception):
    """One row cannot be used; the text says why."""


class Pairs(Plugin):
    """Pictures with captions, from a .jsonl, .json, .csv or .parquet file.

    A row holds a picture (a path, or in Parquet the bytes) and a caption or a list of them. Rows with the
    same path become one example with all their captions. Rows that cannot be used are left out and listed.
    """

    path: Path
    """The file."""
    image: str = "image"
    """Column of the pictures."""
    caption: str = "caption"
    """Column of the captions."""
    label: str = ""
    """Column of the class; empty: there is none."""
    root: str = ""
    """Folder that the paths of pictures start from; empty: the folder of the file."""
    where: dict[str, str] = Field({})
    """Keep only rows whose columns hold these values, such as ``{ split = "train" }``."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable rows to go on with."""

    def open(self) -> Opened:
        """Read the file and look for every picture.

        Raises:
            DataError: no such file, not readable, nothing usable in it, or too many unusable rows.
        """
        path = existing(self.path)
        root = Path(self.root).expanduser() if self.root else path.parent
        examples: dict[str, Example] = {}
        problems: list[str] = []
        good = 0
        for place, row in _rows(path):
            if isinstance(row, dict) and any(str(row.get(key)) != value for key, value in self.where.items()):
                continue
            try:
                found = self._example(row, place, root)
            except UnusableError as error:
                problems.append(f"{path.name}:{place}: {error}")
                continue
            good += 1
            before = examples.get(found.id)
            captions = (*before.captions, *found.captions) if before else found.captions
            examples[found.id] = Example(found.id, found.image, captions, label=found.label)
        if not good and not problems:
            wanted = ", ".join(f"{key} = {value!r}" for key, value in self.where.items())
            raise DataError(f"{path}: no row{' with ' if wanted else ''}{wanted}; correct 'path' or 'where'")
        check_share(path, problems, good, self.max_bad_share)
        settings = self.model_dump_json(exclude={"path", "root", "max_bad_share"})
        hashed = fingerprint([(path.name, path), *_files(examples)], settings)
        return Opened(list(examples.values()), _as_it_is, hashed, problems)

    def _example(self, row: Any, place: int, root: Path) -> Example:
        """Example of one row.

        Raises:
            UnusableError: it cannot be used.
        """
        if isinstance(row, UnusableError):
            raise row
        if not isinstance(row, dict):
            raise UnusableError(f"expected an object with columns, found {_short(row)}")
        for column in (self.image, self.caption, *([self.label] if self.label else [])):
            if row.get(column) is None:
                has = ", ".join(str(key) for key in row if key is not None)
                raise UnusableError(f"no '{column}'; the row has {has}")
        captions = _captions(row[self.caption])
        label = str(row[self.label]) if self.label else None
        picture = row[self.image]
        if isinstance(picture, dict):  # as Hugging Face datasets write it
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, bytes) and picture:
            return Example(f"row_{place:08d}", picture, captions, label=label)
        if not isinstance(picture, str):
            raise UnusableError(f"picture is neither a path nor bytes: {_short(picture)}")
        try:
            there = (root / picture).is_file()
        except (OSError, ValueError):
            there = False
        if not there:
            raise UnusableError(f"no picture {root / picture}")
        return Example(picture, root / picture, captions, label=label)


def _as_it_is(example: Example) -> Example:
    return example


def _files(examples: dict[str, Example]) -> Iterator[tuple[str, Path]]:
    for id, example in examples.items():
        if isinstance(example.image, Path):
            yield id, example.image


def _captions(value: Any) -> tuple[str, ...]:
    """Captions in a cell.

    Raises:
        UnusableError: it holds no text, or not only text.
    """
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(caption, str) and caption.strip() for caption in found):
        raise UnusableError(f"caption is not text: {_short(value)}")
    return tuple(" ".join(caption.split()) for caption in found)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Place and content of every row; a line that is no JSON is an UnusableError in place of its content."""
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise DataError(f"{path}: expected a file that ends in {', '.join(readers)}")
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); replace it or correct 'path'") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                yield number, UnusableError(f"not a JSON object ({error})")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    rows = json.loads(path.read_bytes())
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {_short(rows)}")
    yield from enumerate(rows, 1)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    for row in reader:
        yield reader.line_num, row


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
