"""easy-VQA: questions about simple shapes."""

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from beitctl.api import Example, Plugin
from beitctl.errors import DataError
from beitctl_plugins.sources.opened import Opened, check_share
from beitctl_plugins.sources.reading.annotations import Layout
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.rows import Files

QUESTIONS, PICTURES = "easyvqa_{}_questions.parquet", "easyvqa_{}_images.parquet"
TREE = """
easyvqa_train_questions.parquet, easyvqa_test_questions.parquet    question, answer, image_id
easyvqa_train_images.parquet, easyvqa_test_images.parquet          image_id, image (bytes)
"""


class EasyVQA(Plugin):
    """Questions of easy-VQA about pictures of one shape, with one of 13 answers, as Parquet files.

    An example is named ``q`` and the number of its row.
    """

    path: Path
    """The folder with the four files."""
    split: Literal["train", "test"] = "train"
    """Which part: 38,575 and 9,673 questions about 4,000 and 1,000 pictures."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable rows to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with both files of a split."""
        for split in ("train", "test"):
            if all((path / name.format(split)).is_file() for name in (QUESTIONS, PICTURES)):
                return 9, {"path": str(path), "split": split}
        return None

    def open(self) -> Opened:
        """Read questions and pictures.

        Raises:
            DataError: not such a folder, files that cannot be read, or too many unusable rows.
        """
        layout = Layout(self.path, "easy-VQA", TREE)
        files = [layout.file(name.format(self.split)) for name in (QUESTIONS, PICTURES)]
        problems: list[str] = []
        pictures = _pictures(files[1], problems)
        rows: list[tuple[int, str, str, bytes]] = []
        asked = set()
        for number, row in enumerate(_table(files[0], ("question", "answer", "image_id"))):
            reason = _wrong(row)
            if not reason and row["image_id"] not in pictures:
                reason = f"no picture {row['image_id']}"
            if reason:
                problems.append(f"{files[0].name}: q{number}: {reason}")
            else:
                asked.add(row["image_id"])
                rows.append((number, row["question"], row["answer"], pictures[row["image_id"]]))
        problems += [
            f"{files[1].name}: picture {id}: no question about it" for id in pictures if id not in asked
        ]
        check_share(layout.root, problems, len(rows), self.max_bad_share)
        hashed = FileHash.of(Files(map(str, files)), [file.name for file in files])
        settings = self.model_dump_json(exclude={"path", "max_bad_share"})
        return Opened(
            rows,
            _example,
            hashed.key(settings),
            problems,
            lengths=[len(row[1].encode()) for row in rows],
            state=hashed.state(),
        )


def _table(file: Path, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a Parquet file.

    Raises:
        DataError: it cannot be read, or lacks a column.
    """
    try:
        found = pq.read_schema(file)
        missing = [name for name in columns if name not in found.names]
        if missing:
            raise DataError(
                f"{file}: no column {', '.join(missing)}, only {', '.join(found.names)[:200]}; it must have "
                f"{', '.join(columns)}"
            )
        rows: list[dict[str, Any]] = pq.read_table(file, columns=list(columns)).to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{file}: cannot be read ({error}); copy it again") from error
    return rows


def _pictures(file: Path, problems: list[str]) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for number, row in enumerate(_table(file, ("image_id", "image"))):
        id, data = row["image_id"], row["image"]
        if not isinstance(id, int) or not isinstance(data, bytes) or not data:
            problems.append(f"{file.name}: row {number}: no number or no bytes of a picture")
        elif id in found:
            problems.append(f"{file.name}: row {number}: another one has its image_id, {id}")
        else:
            found[id] = data
    return found


def _wrong(row: dict[str, Any]) -> str:
    """Why a question cannot be used; empty if it can."""
    for name in ("question", "answer"):
        if not isinstance(row[name], str) or not row[name].strip():
            return f"{name} is no text or blank"
    return ""


def _example(row: tuple[int, str, str, bytes]) -> Example:
    number, text, answer, image = row
    return Example(f"q{number}", image, text=text, answers=(answer,))
