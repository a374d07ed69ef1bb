"""The data set that ships with beitctl."""

import functools
import io
from importlib.resources import files
from typing import Any, Literal, Self

import pyarrow.parquet as pq
from pydantic import Field, model_validator

from beitctl.api import Example, Plugin
from beitctl.data.order import digest
from beitctl_plugins.sources.opened import Opened


class Embedded(Plugin):
    """The small data set that ships with beitctl.

    1,489 captioned photos, museum pictures and clip arts in 26 classes, and 1,959 paragraphs of prose, all in
    the public domain or under CC0. Needs no download.
    """

    split: Literal["train", "test", "all"] = "train"
    """Which part; a fifth of the pictures and a twentieth of the paragraphs are ``test``."""
    content: Literal["pictures", "pairs", "text"] = "pictures"
    """``pictures``: pictures and labels; ``pairs``: the captions too; ``text``: the prose."""
    kinds: list[Literal["photo", "museum", "clipart"]] = Field([])
    """Kinds of picture to keep; empty keeps all."""
    limit: int = Field(0, ge=0)
    """Keep at most this many, evenly spread over the set; 0 keeps all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kinds and self.content == "text":
            raise ValueError("kinds chooses pictures; remove it, or set content to 'pictures' or 'pairs'")
        return self

    def open(self) -> Opened:
        """Read the shipped file."""
        name = "embedded-text.parquet" if self.content == "text" else "embedded.parquet"
        data = (files("beitctl_plugins.sources") / "data" / name).read_bytes()
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        if self.content == "text":
            for number, row in enumerate(rows):
                row.update(id=f"text_{number:04d}", split="test" if number % 20 == 19 else "train")
        rows = [row for row in rows if self.split in ("all", row["split"])]
        rows = [row for row in rows if not self.kinds or row["kind"] in self.kinds]
        if 0 < self.limit < len(rows):
            rows = [rows[place * len(rows) // self.limit] for place in range(self.limit)]
        example = functools.partial(_example, pairs=self.content == "pairs")
        return Opened(rows, example, digest(data, self.model_dump_json()).hex())


def _example(row: dict[str, Any], *, pairs: bool) -> Example:
    if "text" in row:
        return Example(row["id"], text=row["text"])
    return Example(row["id"], row["image"], tuple(row["captions"]) if pairs else (), label=row["label"])
