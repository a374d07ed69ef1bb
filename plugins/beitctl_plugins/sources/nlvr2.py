"""NLVR2: statements about two pictures."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from beitctl.api import Plugin
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.sources.reading.annotations import Builder, Layout, cell, lines
from beitctl_plugins.sources.reading.rows import UnusableError, short

TREE = """
train.json, dev.json, test1.json (also in data/, nlvr/nlvr2/data/ or nlvr2/data/)
images/train/0/train-10171-0-img0.png, train-10171-0-img1.png ...
dev/dev-850-0-img0.png ... (also in images/dev/, or flat in images/)
test1/test1-0-0-img0.png ...
"""
FOLDERS = ("", "data/", "nlvr/nlvr2/data/", "nlvr2/data/")
SPLITS = ("train", "dev", "test1")


class NLVR2(Plugin):
    """Statements of NLVR2 about two pictures, and whether they are true.

    ``image`` is the left picture, ``second`` the right one, ``text`` the statement, ``label`` True or False.
    An example is named by its identifier.
    """

    path: Path
    """The folder with the .json files and the pictures."""
    split: Literal["train", "dev", "test1"] = "train"
    """Which part."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable statements to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with a file of statements."""
        for split in SPLITS:
            for folder in FOLDERS:
                file = path / folder / f"{split}.json"
                if file.is_file() and _is_statement(file):
                    return 8, {"path": str(path), "split": split}
        return None

    def open(self) -> Opened:
        """Read the statements and look for every picture.

        Raises:
            DataError: not such a folder, a file that cannot be read, or too many statements without pictures.
        """
        layout = Layout(self.path, "NLVR2", TREE)
        file = layout.file(*(f"{folder}{self.split}.json" for folder in FOLDERS))
        builder = Builder(layout.root)
        for number, line in lines(file):
            builder.attempt(f"{file.name}:{number}", lambda line=line: self._add(line, builder))  # type: ignore[misc]
        return builder.opened(self, [file], self.max_bad_share)

    def _add(self, line: str, builder: Builder) -> None:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UnusableError(f"not JSON ({error})") from error
        name, sentence = cell(row, "identifier", str), cell(row, "sentence", str)
        if not sentence.strip():
            raise UnusableError("the sentence is blank")
        label = str(row.get("label"))
        if label not in ("True", "False"):
            raise UnusableError(f"label: expected True or False, found {short(row.get('label'))}")
        left, right = (self._picture(f"{name.rpartition('-')[0]}-img{n}.png", row, builder) for n in (0, 1))
        builder.add(name, text=sentence.strip(), label=label, image=left, second=right)

    def _picture(self, name: str, row: dict[str, Any], builder: Builder) -> str:
        inner = f"{row['directory']}/" if "directory" in row else ""
        split = self.split
        places = (
            f"images/{split}/{inner}",
            f"{split}/{inner}",
            f"images/{split}/",
            f"{split}/",
            "images/",
            "",
        )
        return builder.pictures.find(*(place + name for place in places))


def _is_statement(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            row = json.loads(opened.readline(2**16))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(row, dict) and {"identifier", "sentence"} <= row.keys()
