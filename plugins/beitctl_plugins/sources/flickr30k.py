"""Flickr30k captions."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from beitctl.api import Plugin
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.sources.reading.annotations import Builder, Layout, cell, karpathy, lines
from beitctl_plugins.sources.reading.rows import UnusableError

TOKENS = "results_20130124.token"
SPLITS = "dataset_flickr30k.json"
FOLDERS = ("flickr30k-images", "flickr30k_images", "images")
TREE = f"""
{SPLITS} (Karpathy's splits), or {TOKENS} with split = "all"
flickr30k-images/1000092795.jpg ...
"""


class Flickr30k(Plugin):
    """Pictures of Flickr30k with their five captions, with Karpathy's splits or in the original layout.

    An example is named by the file name of the picture.
    """

    path: Path
    """The folder with ``dataset_flickr30k.json`` or ``results_20130124.token`` and ``flickr30k-images``."""
    split: Literal["train", "val", "test", "all"] = "train"
    """Karpathy's part: 29,000, 1,014 and 1,000 pictures."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable pictures and annotations to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with one of the annotation files."""
        if (path / SPLITS).is_file():
            return 8, {"path": str(path), "split": "train"}
        return (8, {"path": str(path), "split": "all"}) if (path / TOKENS).is_file() else None

    def open(self) -> Opened:
        """Read the annotations and look for every picture.

        Raises:
            DataError: not such a folder, annotations that cannot be read, or too many without a picture.
        """
        layout = Layout(self.path, "Flickr30k", TREE)
        builder = Builder(layout.root)
        folder = layout.folder(*FOLDERS)
        file = layout.file(SPLITS, *([TOKENS] if self.split == "all" else []))
        if file.name == SPLITS:
            wanted = [] if self.split == "all" else [self.split]
            karpathy(file, builder, wanted, lambda row: [f"{folder}/{cell(row, 'filename', str)}"])
        else:
            _tokens(file, builder, folder)
        if self.split == "all":
            builder.problems += builder.pictures.unused(folder)
        return builder.opened(self, [file], self.max_bad_share)


def _tokens(file: Path, builder: Builder, folder: str) -> None:
    """Lines such as ``1000092795.jpg#0``, a tab, and the caption."""
    captions: dict[str, list[str]] = {}

    def line(text: str) -> None:
        name, tab, caption = text.partition("\t")
        if not tab or not caption.strip():
            raise UnusableError("expected name#number, a tab and a caption")
        captions.setdefault(name.rpartition("#")[0] or name, []).append(caption)

    for number, text in lines(file):
        builder.attempt(f"{file.name}:{number}", lambda text=text: line(text))  # type: ignore[misc]
    for name in sorted(captions):
        builder.attempt(
            f"{file.name}:{name}",
            lambda name=name: builder.add(  # type: ignore[misc]
                name, captions[name], image=builder.pictures.find(f"{folder}/{name}")
            ),
        )
