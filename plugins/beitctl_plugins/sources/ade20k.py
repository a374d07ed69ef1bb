"""ADE20K: pictures with the class of every pixel."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from beitctl.api import Plugin
from beitctl.errors import DataError
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.sources.reading.annotations import Builder, Layout, lines
from beitctl_plugins.sources.reading.rows import UnusableError

INNER = "ADEChallengeData2016"
SCENES = "sceneCategories.txt"
TREE = """
images/training/ADE_train_00000001.jpg ...
images/validation/ADE_val_00000001.jpg ...
annotations/training/ADE_train_00000001.png ...
annotations/validation/ADE_val_00000001.png ...
sceneCategories.txt (optional)
"""


class ADE20K(Plugin):
    """Pictures of ADE20K with the classes of their pixels, 150 and 0 for none, as in ADEChallengeData2016.

    ``segmentation`` is the picture of the classes, ``label`` the scene. An example is named by the file name
    of the picture.
    """

    path: Path
    """The folder ``ADEChallengeData2016``, or the one it lies in."""
    split: Literal["training", "validation"] = "training"
    """Which part: 20,210 and 2,000 pictures."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable pictures to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with pictures and annotations of the same parts."""
        for root in (path, path / INNER):
            for split in ("training", "validation"):
                if (root / "images" / split).is_dir() and (root / "annotations" / split).is_dir():
                    return 8, {"path": str(path), "split": split}
        return None

    def open(self) -> Opened:
        """Look for pictures and annotations.

        Raises:
            DataError: not such a folder, or too many pictures without annotation.
        """
        inner = self.path.expanduser() / INNER
        layout = Layout(inner if inner.is_dir() else self.path, "ADE20K", TREE)
        pictures, classes = layout.folder(f"images/{self.split}"), layout.folder(f"annotations/{self.split}")
        files = [layout.root / SCENES] if (layout.root / SCENES).is_file() else []
        scenes = dict(_scene(file, *line) for file in files for line in lines(file))
        builder = Builder(layout.root)
        found = builder.pictures

        def add(name: str) -> None:
            stem = name.rpartition(".")[0]
            picture, segmentation = found.find(f"{pictures}/{name}"), found.find(f"{classes}/{stem}.png")
            if files and stem not in scenes:
                raise UnusableError(f"no scene in {SCENES}")
            builder.add(name, image=picture, segmentation=segmentation, label=scenes.get(stem, ""))

        for name in found.names(pictures):
            builder.attempt(f"{pictures}/{name}", lambda name=name: add(name))  # type: ignore[misc]
        builder.problems += found.unused(classes)
        return builder.opened(self, files, self.max_bad_share)


def _scene(file: Path, number: int, line: str) -> tuple[str, str]:
    name, _, scene = line.strip().partition(" ")
    if not scene.strip():
        raise DataError(f"{file}:{number}: expected a name and a scene, found {line[:60]!r}; correct it")
    return name, scene.strip()
