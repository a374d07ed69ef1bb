"""COCO captions."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from beitctl.api import Plugin
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.sources.reading.annotations import (
    Builder,
    Layout,
    cell,
    karpathy,
    read_json,
    section,
    some_names,
)
from beitctl_plugins.sources.reading.rows import UnusableError

TREE = """
annotations/captions_train2017.json, captions_val2017.json
train2017/000000000009.jpg ...
val2017/000000000139.jpg ...
or, with karpathy:
dataset_coco.json
train2014/COCO_train2014_000000000009.jpg ...
val2014/COCO_val2014_000000000042.jpg ...
"""
CAPTIONS = re.compile(r"captions_((?:train|val)20\d\d)\.json")


class Coco(Plugin):
    """Pictures of COCO with their five captions, in the layout of cocodataset.org.

    An example is named by the file name of the picture.
    """

    path: Path
    """The folder with ``annotations`` and the folders of pictures; these may also lie in ``images``."""
    split: str = Field("train2017", pattern=r"^\w+$")
    """Folder of the pictures: ``train2017``, ``val2017``, ``train2014``, ``val2014``. ``test...`` and
    ``unlabeled2017`` have no captions."""
    karpathy: Literal["", "train", "val", "test"] = ""
    """Read this part of Karpathy's splits (dataset_coco.json) instead; ``train`` holds ``restval`` too, as is
    usual: 113,287 pictures."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable pictures and annotations to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with the annotation files."""
        found = [match[1] for name in some_names(path / "annotations") if (match := CAPTIONS.fullmatch(name))]
        if found:
            split = next((name for name in found if (path / name).is_dir()), found[0])
            return 8, {"path": str(path), "split": split}
        if (path / "dataset_coco.json").is_file():
            return 8, {"path": str(path), "karpathy": "train"}
        return None

    def open(self) -> Opened:
        """Read the annotations and look for every picture.

        Raises:
            DataError: not such a folder, annotations that cannot be read, or too many without a picture.
        """
        layout = Layout(self.path, "COCO", TREE)
        builder = Builder(layout.root)
        if self.karpathy:
            file = layout.file(
                "dataset_coco.json", "annotations/dataset_coco.json", "karpathy/dataset_coco.json"
            )
            wanted = ("train", "restval") if self.karpathy == "train" else (self.karpathy,)
            karpathy(file, builder, wanted, _places)
            return builder.opened(self, [file], self.max_bad_share)
        folder = layout.folder(self.split, f"images/{self.split}")
        if self.split.startswith(("test", "unlabeled")):
            for name in builder.pictures.names(folder):
                builder.attempt(
                    f"{folder}/{name}",
                    lambda name=name: builder.add(name, image=builder.pictures.find(f"{folder}/{name}")),  # type: ignore[misc]
                )
            return builder.opened(self, [], self.max_bad_share)
        file = layout.file(f"annotations/captions_{self.split}.json", f"captions_{self.split}.json")
        _captions(file, builder, folder)
        builder.problems += builder.pictures.unused(folder)
        return builder.opened(self, [file], self.max_bad_share)


def _captions(file: Path, builder: Builder, folder: str) -> None:
    content = read_json(file)
    names: dict[int, str] = {}
    captions: dict[int, list[str]] = {}

    def image(row: Any) -> None:
        names[cell(row, "id", int)] = cell(row, "file_name", str)

    def annotation(row: Any) -> None:
        number, caption = cell(row, "image_id", int), cell(row, "caption", str)
        if number not in names:
            raise UnusableError(f"no picture with the id {number}")
        captions.setdefault(number, []).append(caption)

    for key, read in (("images", image), ("annotations", annotation)):
        for number, row in enumerate(section(file, content, key), 1):
            builder.attempt(f"{file.name}:{key} {number}", lambda row=row, read=read: read(row))  # type: ignore[misc]

    def add(number: int, name: str) -> None:
        picture = builder.pictures.find(f"{folder}/{name}")
        if number not in captions:
            raise UnusableError("no caption")
        builder.add(name, captions[number], image=picture)

    for number, name in sorted(names.items(), key=lambda item: (item[1], item[0])):
        builder.attempt(f"{file.name}:{name}", lambda number=number, name=name: add(number, name))  # type: ignore[misc]


def _places(row: Any) -> list[str]:
    """Where a picture of Karpathy's splits may lie: pictures of 2017 are those of 2014 under other names."""
    folder, name = cell(row, "filepath", str), cell(row, "filename", str)
    number = row.get("cocoid")
    new = f"{number:012d}.jpg" if isinstance(number, int) else name
    return [
        *(f"{above}{folder}/{name}" for above in ("", "images/")),
        *(f"{above}{part}2017/{new}" for above in ("", "images/") for part in ("train", "val")),
    ]
