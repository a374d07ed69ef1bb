"""Which rows of a table can be used, judged column by column without making them Python objects."""

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from beitctl.errors import DataError
from beitctl.report.naming import printable
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.metadata import CAPTION_BYTES
from beitctl_plugins.sources.reading.rows import megabytes
from beitctl_plugins.sources.reading.wording import LONGEST, listed

TEXT_BYTES = 16 * 2**20
"""Longer pieces of prose are left out."""
CHOSEN, NO_PICTURE, NO_FILE, NO_CAPTION, LONG_CAPTION, NO_LABEL, NO_NAME, NO_TEXT, LONG_TEXT, NO_ID, OTHER = (
    range(11)
)
"""What a row is: usable, one of the reasons why not, or not asked for."""


@dataclass(frozen=True)
class Columns:
    """Columns that make an example; those that are empty are not there."""

    image: str = ""
    caption: str = ""
    label: str = ""
    text: str = ""
    id: str = ""
    where: dict[str, str] = field(default_factory=dict)
    need_caption: bool = False
    """Whether rows without a caption are unusable."""

    def names(self) -> list[str]:
        """All of them, each once."""
        found = (self.image, self.caption, self.label, self.text, self.id, *self.where)
        return list(dict.fromkeys(name for name in found if name))

    def label_names(self) -> list[str]:
        """The column of the class, if there is one."""
        return [self.label] if self.label else []

    def word_names(self) -> list[str]:
        """The columns of captions and prose."""
        return [name for name in (self.caption, self.text) if name]

    def why(self, reason: int) -> str:
        """A reason in words."""
        return {
            NO_PICTURE: f"no picture in '{self.image}'",
            NO_FILE: f"no file at the path in '{self.image}'",
            NO_CAPTION: f"no text in '{self.caption}'",
            LONG_CAPTION: f"caption in '{self.caption}' is longer than {megabytes(CAPTION_BYTES)}",
            NO_LABEL: f"no class in '{self.label}'",
            NO_NAME: f"the number in '{self.label}' is not that of a class",
            NO_TEXT: f"no text in '{self.text}'",
            LONG_TEXT: f"text in '{self.text}' is longer than {megabytes(TEXT_BYTES)}",
            NO_ID: f"no id in '{self.id}'",
        }[reason]


def is_text(kind: Any) -> bool:
    """Whether cells are texts."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_binary(kind: Any) -> bool:
    """Whether cells are bytes."""
    tests = ("is_binary", "is_large_binary", "is_binary_view", "is_fixed_size_binary")
    return any(getattr(pa.types, test)(kind) for test in tests)


def is_list(kind: Any) -> bool:
    """Whether cells are lists of texts."""
    tests = ("is_list", "is_large_list", "is_fixed_size_list")
    return any(getattr(pa.types, test)(kind) for test in tests) and is_text(kind.value_type)


def is_picture(kind: Any) -> bool:
    """Whether cells are bytes, or structs of bytes and a path as Hugging Face writes them."""
    return is_binary(kind) or bool(
        pa.types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and is_binary(kind.field("bytes").type)
    )


def class_names(schema: Any, column: str) -> list[str]:
    """Names of the classes of a column, as Hugging Face writes them; empty where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def check_types(path: object, schema: Any, columns: Columns) -> None:
    """Refuse columns that are missing or of a wrong type.

    Raises:
        DataError: naming the column.
    """
    number = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating)

    def is_class(kind: Any) -> bool:
        inner = kind.value_type if pa.types.is_dictionary(kind) else kind
        return is_text(kind) or any(test(inner) for test in number)

    wanted: list[tuple[str, Callable[[Any], bool], str]] = [
        (columns.image, lambda kind: is_picture(kind) or is_text(kind), "bytes, {bytes, path}, or paths"),
        (columns.caption, lambda kind: is_text(kind) or is_list(kind), "texts or lists of texts"),
        (columns.label, is_class, "texts or whole numbers"),
        (columns.text, is_text, "texts"),
        (columns.id, lambda kind: is_text(kind) or pa.types.is_integer(kind), "texts or whole numbers"),
        *((name, is_class, "texts or numbers") for name in columns.where),
    ]
    for name, fits, what in wanted:
        if not name:
            continue
        if name not in schema.names:
            raise DataError(
                f"{path}: no column '{name}'; it has {listed(schema.names)}. Name one of them instead"
            )
        kind = schema.field(name).type
        if not fits(kind):
            raise DataError(f"{path}: column '{name}' holds {printable(str(kind), LONGEST)}; expected {what}")


@dataclass(frozen=True)
class Judge:
    """Judges rows of one file."""

    columns: Columns
    names: list[str]
    """Names of the classes."""
    root: str
    has_bytes: bool = False
    """Whether every cell of the pictures is known to have bytes."""
    named: FileHash = field(default_factory=FileHash)
    """Takes up the pictures that lie beside the table."""

    def rows(self, batch: Any) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
        """What each row is, and how long its text."""
        reasons = np.full(batch.num_rows, CHOSEN, np.int8)
        lengths = np.zeros(batch.num_rows, np.int64)
        for name, value in self.columns.where.items():
            reasons[~_equal(batch.column(name), value, class_names(batch.schema, name))] = OTHER
        for step in (self._id, self._label, self._caption, self._text, self._picture):
            for reason, bad in step(batch, lengths):
                reasons[bad & (reasons == CHOSEN)] = reason
        return reasons, lengths

    def _id(self, batch: Any, _: Any) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        if self.columns.id:
            cells = batch.column(self.columns.id)
            yield NO_ID, _blank(cells) if is_text(cells.type) else _null(cells)

    def _label(self, batch: Any, _: Any) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        if self.columns.label:
            cells = batch.column(self.columns.label)
            yield NO_LABEL, _blank(cells) if is_text(cells.type) else _null(cells)
            if self.names and pa.types.is_integer(cells.type):
                numbers = _numpy(pc.fill_null(cells.cast(pa.int64(), safe=False), -1))
                yield NO_LABEL, numbers == -1  # as Hugging Face marks rows without
                yield NO_NAME, (numbers < 0) | (numbers >= len(self.names))

    def _caption(self, batch: Any, lengths: Any) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        if self.columns.caption:
            cells = batch.column(self.columns.caption)
            bad, mean, longest = _captions(cells)
            lengths[:] = mean
            yield LONG_CAPTION, longest > CAPTION_BYTES
            if self.columns.need_caption:
                yield NO_CAPTION, bad

    def _text(self, batch: Any, lengths: Any) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        if self.columns.text:
            cells = batch.column(self.columns.text)
            yield NO_TEXT, _blank(cells)
            lengths[:] = _sizes(as_text(cells))
            yield LONG_TEXT, lengths > TEXT_BYTES

    def _picture(self, batch: Any, _: Any) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        if not self.columns.image or self.has_bytes:
            return
        cells = batch.column(self.columns.image)
        paths = paths_of(cells)
        there = np.zeros(len(cells), bool)
        if is_binary(cells.type):
            there = _sizes(cells) > 0
        elif pa.types.is_struct(cells.type) and cells.type.get_field_index("bytes") >= 0:
            there = _sizes(pc.struct_field(cells, "bytes")) > 0
        if paths is None:
            yield NO_PICTURE, ~there
            return
        named = ~_blank(paths)
        yield NO_PICTURE, ~there & ~named
        missing = ~there & named
        for place in np.flatnonzero(missing):
            missing[place] = not self._found(paths[int(place)].as_py())
        yield NO_FILE, missing

    def _found(self, cell: str) -> bool:
        """Note a picture beside the table; says whether it is there."""
        path = os.path.join(self.root, cell)
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return False
        if not stat.S_ISREG(status.st_mode):
            return False
        name = os.path.relpath(path, self.root) if self.root and os.path.isabs(cell) else cell
        self.named.add(name, status.st_size, status.st_mtime_ns, path)
        return True


def paths_of(cells: Any) -> Any:
    """Paths in a column of pictures, or None where it has only bytes."""
    if pa.types.is_struct(cells.type):
        if cells.type.get_field_index("path") < 0 or not is_text(cells.type.field("path").type):
            return None
        return as_text(pc.struct_field(cells, "path"))
    return as_text(cells) if is_text(cells.type) else None


def as_text(cells: Any) -> Any:
    """Texts of any encoding as the plainest."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    return cells.cast(pa.large_string())


def hashes(cells: Any) -> NDArray[np.int64]:
    """A number for each cell, equal for equal ones in this process; 0 where there is nothing."""
    return np.fromiter((hash(cell) if cell else 0 for cell in cells.to_pylist()), np.int64, len(cells))


def _numpy(cells: Any) -> NDArray[Any]:
    found: NDArray[Any] = cells.to_numpy(zero_copy_only=False)
    return found


def _null(cells: Any) -> NDArray[np.bool_]:
    return _numpy(pc.is_null(cells)).astype(bool)


def _sizes(cells: Any) -> NDArray[np.int64]:
    """Bytes in each cell."""
    if pa.types.is_binary_view(cells.type):
        cells = cells.cast(pa.large_binary())
    return _numpy(pc.fill_null(pc.binary_length(cells), 0)).astype(np.int64)


def _blank(cells: Any) -> NDArray[np.bool_]:
    """Where there is no text but space."""
    texts = as_text(cells)
    try:
        return np.equal(_sizes(pc.utf8_trim_whitespace(texts)), 0).astype(bool)
    except pa.ArrowInvalid:  # some are not UTF-8
        return np.array(
            [not _decoded(cell).strip() for cell in texts.cast(pa.large_binary()).to_pylist()], bool
        )


def _decoded(cell: bytes | None) -> str:
    try:
        return (cell or b"").decode()
    except UnicodeDecodeError:
        return ""


def _captions(cells: Any) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Where all captions are missing or blank, mean length of the captions, and length of the longest."""
    if is_text(cells.type):
        sizes = _sizes(as_text(cells))
        return _blank(cells), sizes, sizes
    flat, parents = pc.list_flatten(cells), _numpy(pc.list_parent_indices(cells))
    there = ~_blank(flat)
    counts = np.bincount(parents[there], minlength=len(cells))
    sizes = _sizes(as_text(flat))
    sums = np.bincount(parents[there], sizes[there], len(cells))
    longest = np.zeros(len(cells), np.int64)
    np.maximum.at(longest, parents, sizes)
    return counts == 0, (sums // np.maximum(counts, 1)).astype(np.int64), longest


def _equal(cells: Any, value: str, names: Sequence[str]) -> NDArray[np.bool_]:
    """Where a cell says the value, as text or as the name of a class."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    kind = cells.type
    if is_text(kind):
        found = pc.equal(cells.cast(pa.large_string()), pa.scalar(value, pa.large_string()))
    elif pa.types.is_boolean(kind):
        found = pc.equal(cells.cast(pa.string()), value.lower())
    elif pa.types.is_floating(kind):
        try:
            found = pc.equal(cells, float(value))
        except ValueError:
            return np.zeros(len(cells), bool)
    else:
        number = str(names.index(value)) if value in names else value
        found = pc.equal(cells.cast(pa.string()), number)
    return _numpy(pc.fill_null(found, False)).astype(bool)
