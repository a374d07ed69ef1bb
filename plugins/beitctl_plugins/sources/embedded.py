"""The data set that ships with beitctl."""

import base64
import functools
import io
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, Literal, Self

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from beitctl.api import Example, Plugin
from beitctl.data.order import digest
from beitctl_plugins.sources.making.questions import Asked, questions
from beitctl_plugins.sources.making.scenes import CLASSES, COUNTS, Scenes
from beitctl_plugins.sources.making.statements import Stated, statements
from beitctl_plugins.sources.opened import Opened

MADE = "1"
"""Changes whenever other questions, statements or scenes are made."""
TWINS = ("clip_0190", "photo_035")
"""Pictures for training that stand in the test part too: nothing is made of them."""
BOOKS = ("state-of-the-union", "moby-dick")
FROM_MOBY_DICK = """
oNmoRESAaCcBYU6SkAkg6XAUd1GMUSSIMY2jCAEF7yNMhz4QDgcwoOxdEyB62MprguSiMGOAzsSKiGU0QmdRdG1GJGWsC0I5IbNgYDQY
kQtShkCaEChTC0+QTSFfaSEjbP/tXTwRMEkjptKH/EMFMQsOPjieLMAw5eMUC6iE+YAY2PJhQFI8ViAriKtUvPCANFABU0AgVwVMi1ZS
CzJQghQ4zARYTolEKBlSocaBMVwyFoWWNIthAiXhfUEAoEAoagSibQCJAVA9oEloQR2y6uEBiEEk31AlrFABPgtYc1IZuEGsAlKYmLY+
3pBlX8O1ChjwaTI=
"""
"""One bit per paragraph of the prose: each occurs in one of the two books, letter for letter."""


class Embedded(Plugin):
    """The small data set that ships with beitctl.

    1,489 captioned photos, museum pictures and clip arts in 26 classes, and 1,959 paragraphs of prose from
    two books, all in the public domain or under CC0. Needs no download. Questions, statements and scenes are
    made from the pictures, the same on every machine; those for training and test from different pictures.
    """

    split: Literal["train", "test", "all"] = "train"
    """Which part; a fifth of the pictures and a twentieth of the paragraphs are ``test``."""
    content: Literal["pictures", "pairs", "text", "questions", "statements", "objects"] = "pictures"
    """``pictures``: pictures and labels; ``pairs``: the captions too; ``text``: the prose, with its book as
    the label; ``questions``: some three about each picture, with one answer each; ``statements``: statements
    about two pictures, half of them true; ``objects``: 600 scenes for training and 150 for test, clip art
    pasted on photos, with masks, boxes and segmentation."""
    kinds: list[Literal["photo", "museum", "clipart"]] = Field([])
    """Kinds of picture to keep; empty keeps all."""
    limit: int = Field(0, ge=0)
    """Keep at most this many, evenly spread over the set; 0 keeps all."""
    scene_px: int = Field(128, ge=32, le=1024)
    """Side of the scenes of ``objects`` in pixels."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kinds and self.content not in ("pictures", "pairs"):
            raise ValueError("kinds chooses pictures; remove it, or set content to 'pictures' or 'pairs'")
        if self.scene_px != 128 and self.content != "objects":
            raise ValueError("scene_px is the size of scenes; remove it, or set content to 'objects'")
        return self

    def open(self) -> Opened:
        """Read the shipped file."""
        data = _shipped(self.content == "text")
        if self.content in ("pictures", "pairs", "text"):
            rows = self._kept(_prose(data) if self.content == "text" else _pictures(data))
            example = functools.partial(_example, pairs=self.content == "pairs")
            return Opened(rows, example, digest(data, self.model_dump_json(exclude={"scene_px"})).hex())
        key = digest(data, self.model_dump_json(), MADE).hex()
        rows = [row for row in _pictures(data) if row["id"] not in TWINS]
        by_split = {name: [row for row in rows if row["split"] == name] for name in COUNTS}
        by_split = {name: rows for name, rows in by_split.items() if self.split in ("all", name)}
        if self.content == "objects":
            return self._scenes(by_split, key)
        make: Callable[[Any, str], Sequence[Any]] = questions if self.content == "questions" else statements
        made = [one for name, rows in by_split.items() for one in make(rows, name)]
        return Opened(self._spread(made), _made, key)

    def _kept(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [row for row in rows if self.split in ("all", row["split"])]
        return self._spread([row for row in rows if not self.kinds or row["kind"] in self.kinds])

    def _spread(self, rows: list[Any]) -> list[Any]:
        if 0 < self.limit < len(rows):
            return [rows[place * len(rows) // self.limit] for place in range(self.limit)]
        return rows

    def _scenes(self, by_split: dict[str, list[dict[str, Any]]], key: str) -> Opened:
        makers = [Scenes.of(rows, name, self.scene_px) for name, rows in by_split.items()]
        rows = [(maker, number) for maker in makers for number in range(COUNTS[maker.name])]
        return Opened(self._spread(rows), _scene, key, labelled=_no_label, worded=_no_words, segments=CLASSES)


def _shipped(text: bool) -> bytes:
    name = "embedded-text.parquet" if text else "embedded.parquet"
    return (files("beitctl_plugins.sources") / "data" / name).read_bytes()


def _pictures(data: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(io.BytesIO(data)).to_pylist()
    return found


def _prose(data: bytes) -> list[dict[str, Any]]:
    rows = _pictures(data)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(FROM_MOBY_DICK), np.uint8))
    for number, row in enumerate(rows):
        split = "test" if number % 20 == 19 else "train"
        row.update(id=f"text_{number:04d}", split=split, label=BOOKS[bits[number]])
    return rows


def _example(row: dict[str, Any], *, pairs: bool) -> Example:
    if "text" in row:
        return Example(row["id"], text=row["text"], label=row["label"])
    return Example(row["id"], row["image"], tuple(row["captions"]) if pairs else (), label=row["label"])


def _made(row: Asked | Stated) -> Example:
    if isinstance(row, Asked):
        return Example(row.id, row.image, text=row.text, answers=(row.answer,))
    return Example(row.id, row.left, text=row.text, label=row.label, second=row.right)


def _scene(row: tuple[Scenes, int]) -> Example:
    maker, number = row
    return maker.example(number)


def _no_label(row: tuple[Scenes, int]) -> None:
    """Scenes have no class."""


def _no_words(row: tuple[Scenes, int]) -> tuple[str, ...]:
    return ()
