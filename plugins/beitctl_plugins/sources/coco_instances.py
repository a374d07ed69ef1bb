"""COCO instances: things in pictures with boxes and masks."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from beitctl.api import Object, Plugin
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.sources.reading.annotations import Builder, Layout, cell, read_json, section, some_names
from beitctl_plugins.sources.reading.rows import UnusableError, short

TREE = """
annotations/instances_train2017.json, instances_val2017.json
train2017/000000000009.jpg ...
val2017/000000000139.jpg ...
"""
INSTANCES = re.compile(r"instances_(\w+)\.json")


@dataclass(frozen=True)
class Instances(Opened):
    """Pictures with the things in them."""

    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers, those without a thing included."""
    notes: tuple[str, ...] = ()
    """What was clipped, and how many pictures show nothing."""


class CocoInstances(Plugin):
    """Pictures of COCO with the boxes and masks of the things in them, in the layout of cocodataset.org.

    Pictures without a thing are kept: they teach what is none. Boxes that reach out of their picture are
    clipped; empty ones, and those that lie outside, are left out. An example is named by the file name of the
    picture.
    """

    path: Path
    """The folder with ``annotations`` and the folders of pictures; these may also lie in ``images``."""
    split: str = Field("train2017", pattern=r"^\w+$")
    """Folder of the pictures: ``train2017``, ``val2017``."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable pictures and annotations to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with files of instances; less sure than with captions."""
        names = some_names(path / "annotations")
        found = [match[1] for name in names if (match := INSTANCES.fullmatch(name))]
        if not found:
            return None
        split = next((n for n in found if any((path / p / n).is_dir() for p in ("", "images"))), found[0])
        return 7, {"path": str(path), "split": split}

    def open(self) -> Instances:
        """Read the annotations and look for every picture.

        Raises:
            DataError: not such a folder, annotations that cannot be read, or too many that cannot be used.
        """
        layout = Layout(self.path, "COCO instances", TREE)
        folder = layout.folder(self.split, f"images/{self.split}")
        file = layout.file(f"annotations/instances_{self.split}.json", f"instances_{self.split}.json")
        reading = _Reading(Builder(layout.root), folder)
        content = read_json(file, _small)
        for key, read in (
            ("categories", reading.category),
            ("images", reading.image),
            ("annotations", reading.annotation),
        ):
            for number, row in enumerate(section(file, content, key), 1):
                reading.builder.attempt(f"{file.name}:{key} {number}", lambda row=row, read=read: read(row))  # type: ignore[misc]
        del content
        reading.end(file)
        opened = reading.builder.opened(self, [file], self.max_bad_share)
        classes = tuple(reading.names[number] for number in sorted(reading.names))
        found = {name: getattr(opened, name) for name in Opened.__dataclass_fields__}
        return Instances(**found, classes=classes, notes=reading.notes())


def _small(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the numbers of its mask as objects: they stay text until the end."""
    if "segmentation" in row:
        row["segmentation"] = json.dumps(row["segmentation"], separators=(",", ":"))
    return row


class _Reading:
    """What is found in a file of instances, part by part."""

    def __init__(self, builder: Builder, folder: str) -> None:
        self.builder, self.folder = builder, folder
        self.names: dict[int, str] = {}
        self.images: dict[int, tuple[str, int, int]] = {}
        """File name, width and height by number."""
        self.objects: dict[int, list[Object]] = {}
        self.seen: set[int] = set()
        self.counts: Counter[str] = Counter()

    def category(self, row: Any) -> None:
        number, name = cell(row, "id", int), cell(row, "name", str)
        if number in self.names or name in self.names.values():
            raise UnusableError(f"another category has its id or name: {number}, {short(name)}")
        self.names[number] = name

    def image(self, row: Any) -> None:
        number, name = cell(row, "id", int), cell(row, "file_name", str)
        if number in self.images:
            raise UnusableError(f"another picture has its id, {number}")
        width, height = cell(row, "width", int), cell(row, "height", int)
        if min(width, height) < 1:
            raise UnusableError(f"a picture of {width} x {height} pixels")
        self.images[number] = (name, width, height)

    def annotation(self, row: Any) -> None:
        number, image = cell(row, "id", int), cell(row, "image_id", int)
        if number in self.seen:
            raise UnusableError(f"another annotation has its id, {number}")
        self.seen.add(number)
        if image not in self.images:
            raise UnusableError(f"no picture with the id {image}")
        category = cell(row, "category_id", int)
        if category not in self.names:
            raise UnusableError(f"no category with the id {category}")
        name, width, height = self.images[image]
        box = self._box(row, name, width, height)
        mask, crowd = row.get("segmentation"), row.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise UnusableError(f"iscrowd: expected 0 or 1, found {short(crowd)}")
        mask = None if mask in ("null", "[]") else mask  # only the box is known
        if mask is not None:
            _check_mask(json.loads(mask), width, height)
        thing = Object(self.names[category], box, mask, bool(crowd))
        self.objects.setdefault(image, []).append(thing)

    def _box(self, row: Any, name: str, width: int, height: int) -> tuple[float, float, float, float]:
        """The box inside its picture."""
        found = row.get("bbox")
        if not isinstance(found, list) or len(found) != 4 or not all(_is_number(n) for n in found):
            raise UnusableError(f"bbox: expected left, top, width and height, found {short(found)}")
        left, top, wide, high = map(float, found)
        if wide <= 0 or high <= 0:
            raise UnusableError(f"the box {found} is empty")
        right, bottom = min(left + wide, width), min(top + high, height)
        left, top = max(left, 0.0), max(top, 0.0)
        if right <= left or bottom <= top:
            raise UnusableError(f"the box {found} lies outside {name} ({width} x {height})")
        clipped = (left, top, right - left, bottom - top)
        out = max(abs(a - b) for a, b in zip(clipped, map(float, found), strict=True))
        self.counts["clipped"] += out > 0.01  # boxes are rounded to 0.01 px
        return clipped if out > 0.01 else (float(found[0]), float(found[1]), wide, high)

    def end(self, file: Path) -> None:
        """Bring pictures and things together."""
        for number, (name, _, _) in sorted(self.images.items(), key=lambda item: (item[1][0], item[0])):
            self.builder.attempt(f"{file.name}:{name}", lambda n=number, name=name: self._add(n, name))  # type: ignore[misc]
        self.builder.problems += self.builder.pictures.unused(self.folder)

    def _add(self, number: int, name: str) -> None:
        picture = self.builder.pictures.find(f"{self.folder}/{name}")
        things = self.objects.pop(number, [])
        self.counts["without"] += not things
        things = [replace(t, mask=None if t.mask is None else json.loads(t.mask)) for t in things]
        self.builder.add(name, image=picture, objects=things)

    def notes(self) -> tuple[str, ...]:
        """What is worth knowing, as lines."""
        found = {
            "without": "pictures show no thing of the classes; they are kept",
            "clipped": "boxes were clipped",
        }
        return tuple(f"{self.counts[key]:,} {text}" for key, text in found.items() if self.counts[key])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _check_mask(mask: Any, width: int, height: int) -> None:
    """Refuse a mask that is none, or of another size than its picture."""
    if isinstance(mask, Mapping):
        if mask.get("size") != [height, width]:
            raise UnusableError(f"its mask is of the size {short(mask.get('size'))}, not [{height}, {width}]")
        counts = mask.get("counts")
        if isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts):
            if sum(counts) != width * height:
                raise UnusableError(f"its mask has {sum(counts)} pixels, not {width * height}")
        elif not isinstance(counts, str):
            raise UnusableError(f"its mask has no run lengths, but {short(counts)}")
        return
    if not isinstance(mask, list) or not all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(_is_number, p)) for p in mask
    ):
        raise UnusableError(f"segmentation: expected polygons or run lengths, found {short(mask)}")
