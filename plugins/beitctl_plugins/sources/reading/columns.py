"""Examples in columns: a large set in little memory, shared by all processes that read it."""

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beitctl.api import Example, Object
from beitctl.data.arrays import Texts

IDS = np.dtype("<i4")
"""Ids of tokens while they are kept."""


class Column:
    """Texts that are added one by one."""

    def __init__(self) -> None:
        self.block, self.ends, self.some = bytearray(), array("q"), False

    def add(self, text: bytes) -> None:
        """Add a text."""
        self.block += text
        self.ends.append(len(self.block))
        self.some = self.some or bool(text)

    def texts(self) -> Texts:
        """All of them."""
        ends = np.frombuffer(self.ends.tobytes(), np.int64)
        return Texts(np.frombuffer(bytes(self.block), np.uint8), ends)


class InColumns:
    """Examples in columns."""

    def __init__(self, root: Path, columns: dict[str, Texts], starts: dict[str, Any]) -> None:
        self.root, self.columns, self.starts = root, columns, starts

    def example(self, row: int) -> Example:
        """One example."""
        return Example(
            self._single("id", row),
            self._path("image", row),
            self._several("captions", row),
            self._single("text", row) or None,
            self._single("label", row) or None,
            self._path("second", row),
            self._several("answers", row),
            self._path("segmentation", row),
            self._ids("token_ids", row),
            self._several_ids("caption_ids", row),
            self.objects(row),
        )

    def objects(self, row: int) -> tuple[Object, ...]:
        """What is in the picture of one example."""
        found = self._single("objects", row)
        return tuple(Object(o[0], tuple(o[1]), o[2], o[3]) for o in json.loads(found)) if found else ()

    def lengths(self) -> Any:
        """Bytes of the texts or ids, or of the captions in the mean; None where there are none."""
        for name in ("text", "token_ids"):
            if name in self.columns:
                return np.diff(self.columns[name].ends, prepend=0)
        for name in ("captions", "caption_ids"):
            if name in self.columns:
                starts = self.starts[name]
                bounds = np.concatenate([[0], self.columns[name].ends])[starts]
                return np.diff(bounds) // np.maximum(np.diff(starts), 1)
        return None

    def _single(self, name: str, row: int) -> str:
        return self.columns[name][row] if name in self.columns else ""

    def _path(self, name: str, row: int) -> Path | None:
        found = self._single(name, row)
        return self.root / found if found else None

    def _several(self, name: str, row: int) -> tuple[str, ...]:
        if name not in self.columns:
            return ()
        first, last = (int(self.starts[name][row + more]) for more in (0, 1))
        return tuple(self.columns[name][first:last])

    def _ids(self, name: str, row: int) -> Any:
        """Ids as an array; None where there are none."""
        if name not in self.columns:
            return None
        found = self.columns[name]
        first = int(found.ends[row - 1]) if row else 0
        ids = found.block[first : int(found.ends[row])]
        return ids.view(IDS).astype(np.int64) if len(ids) else None

    def _several_ids(self, name: str, row: int) -> tuple[Any, ...]:
        if name not in self.columns:
            return ()
        first, last = (int(self.starts[name][row + more]) for more in (0, 1))
        return tuple(self._ids(name, place) for place in range(first, last))


def ids_packed(ids: Sequence[int]) -> bytes:
    """Ids of tokens as bytes."""
    return np.asarray(ids, IDS).tobytes()


def objects_packed(objects: Sequence[Object]) -> bytes:
    """Objects as JSON: a million of them with their polygons would be too much in memory."""
    rows = [(thing.label, thing.box, thing.mask, thing.crowd) for thing in objects]
    return json.dumps(rows, separators=(",", ":")).encode()
