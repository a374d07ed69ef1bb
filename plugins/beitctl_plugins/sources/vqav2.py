"""VQA v2: questions about pictures."""

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from beitctl.api import Plugin
from beitctl.errors import DataError
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.sources.reading.annotations import Builder, Layout, cell, read_json, section, some_names
from beitctl_plugins.sources.reading.rows import UnusableError

TREE = """
v2_OpenEnded_mscoco_train2014_questions.json, ...val2014..., ...test2015..., ...test-dev2015...
v2_mscoco_train2014_annotations.json, ...val2014...
train2014/COCO_train2014_000000000009.jpg ...
val2014/COCO_val2014_000000000042.jpg ...
test2015/COCO_test2015_000000000001.jpg ...
"""
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANSWERS = "v2_mscoco_{}_annotations.json"
FOLDERS = ("", "vqa/", "annotations/", "questions/")
SETS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}


class VQAv2(Plugin):
    """Questions of VQA v2 about pictures of COCO, each with ten answers, in the layout of visualqa.org.

    ``label`` is the answer that most people gave, as the data set says it. An example is named by the
    question's id.
    """

    path: Path
    """The folder with the .json files, which may also lie in ``vqa``, and the folders of pictures, which may
    also lie in ``images``."""
    split: Literal["train", "val", "test", "test-dev"] = "train"
    """Which part; ``test`` and ``test-dev`` have no answers."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable questions to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with files of questions."""
        names = {name for folder in FOLDERS for name in some_names(path / folder)}
        found = [split for split, part in SETS.items() if QUESTIONS.format(part) in names]
        return (8, {"path": str(path), "split": found[0]}) if found else None

    def open(self) -> Opened:
        """Read questions and answers, and look for every picture.

        Raises:
            DataError: not such a folder, files that cannot be read, or too many questions without a picture.
        """
        layout, part = Layout(self.path, "VQA v2", TREE), SETS[self.split]
        pictures = part.replace("-dev", "")
        folder = layout.folder(pictures, f"images/{pictures}")
        files = [layout.file(*(place + QUESTIONS.format(part) for place in FOLDERS))]
        questions = section(files[0], read_json(files[0]), "questions")
        answers: dict[int, tuple[str, list[str]]] | None = None
        if not self.split.startswith("test"):
            files.append(layout.file(*(place + ANSWERS.format(part) for place in FOLDERS)))
            answers = _answers(files[1])
        builder = Builder(layout.root)

        def add(row: Any) -> None:
            number, question = cell(row, "question_id", int), cell(row, "question", str)
            if not question.strip():
                raise UnusableError(f"question {number} is blank")
            said = ("", []) if answers is None else answers.pop(number, None)
            if said is None:
                raise UnusableError(f"no answers to question {number} in {files[1].name}")
            name = f"{folder}/COCO_{pictures}_{cell(row, 'image_id', int):012d}.jpg"
            cells = {"text": question.strip(), "image": builder.pictures.find(name), "label": said[0]}
            builder.add(str(number), answers=said[1], **cells)

        for number, row in enumerate(questions, 1):
            builder.attempt(f"{files[0].name}:questions {number}", lambda row=row: add(row))  # type: ignore[misc]
        builder.problems += [f"{files[1].name}: question {number} is not asked" for number in answers or ()]
        builder.problems += builder.pictures.unused(folder) if self.split != "test-dev" else ()
        return builder.opened(self, files, self.max_bad_share)


def _answers(file: Path) -> dict[int, tuple[str, list[str]]]:
    """The most frequent answer and all answers by question.

    The file is large, so objects are made small while it is read.
    """

    def small(row: dict[str, Any]) -> Any:
        if "answer_id" in row and isinstance(row.get("answer"), str):
            return sys.intern(row["answer"])
        if "question_id" in row:
            most = row.get("multiple_choice_answer")
            return row["question_id"], row.get("answers"), sys.intern(most) if isinstance(most, str) else ""
        return row

    found = {}
    for number, row in enumerate(section(file, read_json(file, small), "annotations"), 1):
        good = isinstance(row, tuple) and isinstance(row[0], int) and isinstance(row[1], list)
        if not good or not all(isinstance(answer, str) for answer in row[1]):
            raise DataError(f"{file}:annotations {number}: no question_id with answers; download it again")
        found[row[0]] = (row[2], row[1])
    return found
