"""Scenes: clip art pasted on photos, whose alpha channel says exactly which pixels each thing has."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beitctl.api import Example, Object
from beitctl.data.order import generator

CLASSES = ("animal", "food", "people", "recreation", "tool", "vehicle")
"""The most frequent classes of the clip art that has a shape of its own."""
BACKGROUNDS = ("building", "energy", "nebula", "planet")
"""Classes of the photos to paste on: the others show animals, people and tools that nobody has marked."""
COUNTS = {"train": 600, "test": 150}
SHARES = (0.05, 0.9)
"""Share of opaque pixels of clip art that is used: less is hardly visible, more is a picture with a frame."""
SIDES = (0.3, 0.6)
"""Longer side of a thing, as a share of the side of the scene."""
MOST = 3
"""Things in a scene, at most."""
VISIBLE = 16
"""Things of which fewer pixels can be seen are no objects."""

Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Scenes:
    """Makes scenes of the pictures of one split; the same number gives the same scene."""

    name: str
    photos: Sequence[bytes]
    cutouts: Sequence[tuple[str, bytes]]
    """Class and picture."""
    px: int

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], name: str, px: int) -> "Scenes":
        """Choose what to paste, and on what.

        Args:
            rows: pictures of one split.
            name: of the split.
            px: side of the scenes.
        """
        clips = [row for row in rows if row["kind"] == "clipart" and row["label"] in CLASSES]
        return cls(
            name,
            [row["image"] for row in rows if row["kind"] == "photo" and row["label"] in BACKGROUNDS],
            [(row["label"], row["image"]) for row in clips if _has_shape(row["image"])],
            px,
        )

    def example(self, number: int) -> Example:
        """One scene with its segmentation (0: none of the classes) and its objects."""
        draw = generator("embedded", "scenes", self.name, number)
        scene = self._background(self.photos[int(draw.integers(len(self.photos)))], draw)
        things: list[tuple[str, Bits]] = []
        for _ in range(draw.integers(1, MOST + 1)):
            label, data = self.cutouts[int(draw.integers(len(self.cutouts)))]
            shape = self._paste(scene, data, draw)
            things = [(other, mask & ~shape) for other, mask in things]
            things.append((label, shape))
        things = [(label, mask) for label, mask in things if mask.sum() >= VISIBLE]
        classes = np.zeros((self.px, self.px), np.uint8)
        for label, mask in things:
            classes[mask] = CLASSES.index(label) + 1
        return Example(
            f"scene_{self.name}_{number:04d}",
            _png(scene),
            segmentation=_png(Image.fromarray(classes)),
            objects=tuple(Object(label, box_of(mask), run_lengths(mask)) for label, mask in things),
        )

    def _background(self, data: bytes, draw: np.random.Generator) -> Image.Image:
        """A square part of a photo."""
        photo = Image.open(io.BytesIO(data)).convert("RGB")
        side = round(min(photo.size) * draw.uniform(0.6, 1))
        left, top = (int(draw.integers(length - side + 1)) for length in photo.size)
        box = (left, top, left + side, top + side)
        return photo.resize((self.px, self.px), Image.Resampling.BILINEAR, box=box)

    def _paste(self, scene: Image.Image, data: bytes, draw: np.random.Generator) -> Bits:
        """Put clip art anywhere into a scene; returns which pixels it covers."""
        cutout = Image.open(io.BytesIO(data)).convert("RGBA")
        scale = self.px * draw.uniform(*SIDES) / max(cutout.size)
        width, height = (max(1, round(length * scale)) for length in cutout.size)
        cutout = cutout.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (int(draw.integers(self.px - length + 1)) for length in (width, height))
        scene.paste(cutout, (left, top), cutout)
        covered = np.zeros((self.px, self.px), bool)
        covered[top : top + height, left : left + width] = np.asarray(cutout)[..., 3] >= 128
        return covered


def run_lengths(mask: Bits) -> dict[str, list[int]]:
    """A mask as COCO writes it: lengths of the runs of 0 and 1 in turn, down each column, 0 first."""
    flat = mask.T.ravel()
    ends = np.concatenate([np.flatnonzero(flat[1:] != flat[:-1]) + 1, [flat.size]])
    counts = np.diff(ends, prepend=0).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def box_of(mask: Bits) -> tuple[float, float, float, float]:
    """Left, top, width and height of what is in a mask that is not empty."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    left, top = int(columns[0]), int(rows[0])
    return float(left), float(top), float(columns[-1] + 1 - left), float(rows[-1] + 1 - top)


def _has_shape(data: bytes) -> bool:
    """Whether clip art is neither a full rectangle nor next to nothing."""
    picture = Image.open(io.BytesIO(data))
    if picture.mode != "RGBA":
        return False
    opaque = float((np.asarray(picture.getchannel("A")) >= 128).mean())
    return SHARES[0] <= opaque <= SHARES[1]


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
