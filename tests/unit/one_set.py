"""The small set of pictures and prose that ``layouts.py`` writes in every layout."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Row:
    """One example of the set."""

    id: str
    """Class folder and file name."""
    data: bytes
    captions: tuple[str, ...]
    label: str

    @property
    def name(self) -> str:
        """The file name alone."""
        return self.id.rpartition("/")[2]


FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpg": ("JPEG", "RGB", {"quality": 95}),
    "jpeg": ("JPEG", "L", {"progressive": True}),
    "png": ("PNG", "RGB", {}),
    "webp": ("WEBP", "RGB", {"lossless": True}),
    "bmp": ("BMP", "RGB", {}),
    "gif": ("GIF", "P", {}),
    "tif": ("TIFF", "RGB", {"compression": "tiff_deflate"}),
    "tiff": ("TIFF", "L", {}),
}
"""Ending to Pillow's name of the format, mode and options."""
STEMS = ("001", "002", "grün 3", "004", "005", "六", "007", "008", "nine", "10", "11", "12")
LABELS = ("dog", "red fox", "Kätzchen")
CAPTIONS = (
    ("a dog",),
    ('a "fox", red, at night', "un renard"),
    ("eine Katze;  sie\n schläft", "a cat\twith a tab", "猫が眠っている"),
    ("#4 of many", "it's here"),
)
PROSE = ("The first piece.", "Ein zweiter; er hat Umlaute: äöü.", '"Quoted", with a comma', "四つ目の文。")


def picture(number: int, ending: str) -> bytes:
    """An encoded picture of its own size and colours, smooth so that JPEG changes little."""
    kind, mode, options = FORMATS[ending]
    rows, columns = np.mgrid[0 : 20 + number, 0:24]
    pixels = np.stack([rows * 5, columns * 4, np.full_like(rows, 13 * number)], -1).astype(np.uint8)
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.quantize(256) if mode == "P" else image.convert(mode)).save(stream, kind, **options)
    return stream.getvalue()


def rows(changed: bool = False) -> list[Row]:
    """The set; changed, one picture of it is another."""
    endings = list(FORMATS)
    made = []
    for number, stem in enumerate(STEMS):
        ending, label = endings[number % len(endings)], LABELS[number % len(LABELS)]
        data = picture(number + 12 * (changed and number == 4), ending)
        made.append(Row(f"{label}/{stem}.{ending}", data, CAPTIONS[number % len(CAPTIONS)], label))
    return made
