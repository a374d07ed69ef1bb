"""The source ``solid``."""

import hashlib
import io
from collections.abc import Sequence

from PIL import Image
from pydantic import Field

from beitctl.api import Example, Plugin


class Solid(Plugin):
    """Pictures of one colour each, labelled with its name."""

    colours: list[str] = Field(default=["red", "green", "blue"], min_length=1)
    """Names of colours that Pillow knows."""
    copies: int = Field(default=1, ge=1)
    """Pictures per colour."""
    side_px: int = Field(default=32, ge=1)
    """Side of a picture in pixels."""

    def open(self) -> "Pictures":
        """Settings alone say what is in it, so they make the fingerprint."""
        fingerprint = hashlib.blake2b(self.model_dump_json().encode(), digest_size=8).hexdigest()
        return Pictures(self.colours * self.copies, self.side_px, fingerprint)


class Pictures:
    """Draws a picture when it is asked for."""

    def __init__(self, colours: Sequence[str], side_px: int, fingerprint: str) -> None:
        self.colours, self.side_px, self.fingerprint = colours, side_px, fingerprint

    def __len__(self) -> int:
        return len(self.colours)

    def __getitem__(self, index: int) -> Example:
        colour, encoded = self.colours[index], io.BytesIO()
        Image.new("RGB", (self.side_px, self.side_px), colour).save(encoded, "png")
        return Example(f"{colour}-{index}", image=encoded.getvalue(), label=colour)
