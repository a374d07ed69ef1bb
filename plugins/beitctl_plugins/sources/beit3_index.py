"""The index files of BEiT-3's released fine-tuning code."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from beitctl.api import Plugin
from beitctl.errors import DataError
from beitctl_plugins.sources.opened import Opened, existing
from beitctl_plugins.sources.reading.annotations import Builder, Layout, cell, lines, some_names
from beitctl_plugins.sources.reading.rows import UnusableError, short

Task = Literal["imagenet", "nlvr2", "vqav2", "retrieval", "captioning"]
FILES: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    "imagenet": {name: ((f"imagenet.{name}.index.jsonl",),) for name in ("train", "val")},
    "nlvr2": {
        "train": (("nlvr2.train.index.jsonl",),),
        "val": (("nlvr2.dev.index.jsonl",),),
        "dev": (("nlvr2.dev.index.jsonl",),),
        "test": (("nlvr2.test-P.index.jsonl",),),
        "test-P": (("nlvr2.test-P.index.jsonl",),),
    },
    "vqav2": {
        "train": (("vqa.train.jsonl", "vqa.trainable_val.jsonl"),),
        "val": (("vqa.rest_val.jsonl",),),
        "test": (("vqa.test.jsonl",),),
        "test-dev": (("vqa.test-dev.jsonl",),),
    },
    "retrieval": {
        name: ((f"coco_retrieval.{name}.jsonl",), (f"flickr30k.{name}.jsonl",))
        for name in ("train", "val", "test")
    },
    "captioning": {
        "train": (("coco_captioning.train.jsonl",),),
        "val": (("coco_captioning.val.jsonl",), ("nocaps.val.jsonl",)),
        "test": (("coco_captioning.test.jsonl",), ("nocaps.test.jsonl",)),
    },
}
"""By task and split what the released code reads: a choice of files that belong together."""
OFFICIAL = {
    name: task for task, splits in FILES.items() for sets in splits.values() for s in sets for name in s
}
TIMES = {0.3: 1, 0.6: 2, 0.9: 3, 1.0: 4}
"""How many people gave an answer, by its score; 1 means four or more."""
PEOPLE = 10
TREE = "\n".join(sorted(OFFICIAL)) + "\nand the pictures that they name"


class Beit3Index(Plugin):
    """Index files of BEiT-3's released fine-tuning code: one JSON object per line, pictures by path.

    Texts may be strings or ids of tokens without start and end; ids go to ``token_ids`` (questions,
    statements) or ``caption_ids``. An example is named by its ``qid``, ``identifier``, ``image_id`` or path.

    Questions come with scores in place of ten answers: 0.3, 0.6, 0.9 and 1 are read as one, two, three and
    four people who gave that answer, and all others up to ten as blank answers, which equal none. That gives
    the same targets as the scores. Captions of one ``image_id`` become one example. A class is named by the
    folder of its pictures; where most have no folder of their own, by its number.
    """

    path: Path
    """The folder that paths of pictures are relative to."""
    index: str = ""
    """Folder of the index files, relative to ``path``; empty: the same."""
    task: Literal["", "imagenet", "nlvr2", "vqav2", "retrieval", "captioning"] = ""
    """What the rows are for; empty: what the first of them looks like."""
    split: str = Field("train", pattern=r"^[\w-]+$")
    """Which files to read, as the released code does: ``train``, ``val``, ``test``; of vqav2 ``train`` is
    vqa.train and vqa.trainable_val, ``val`` is vqa.rest_val."""
    files: list[str] = Field([])
    """Names of the files to read in place of those of the split, relative to ``index``."""
    answer_file: str = "answer2label.txt"
    """Answers of vqav2 by number, relative to ``index``."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable rows to go on with."""

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """Folders with files of the official names, and such files; less sure than original annotations."""
        if path.is_file():
            known = path.name in OFFICIAL
            return (8, {"path": str(path.parent), "files": [path.name]}) if known else None
        found = {OFFICIAL[name] for name in some_names(path) if name in OFFICIAL}
        for task in FILES:
            if task in found:
                for split, choices in FILES[task].items():
                    if any(all((path / name).is_file() for name in names) for names in choices):
                        return 7, {"path": str(path), "task": task, "split": split}
        return None

    def open(self) -> Opened:
        """Read the files and look for every picture.

        Raises:
            DataError: no such files, files that cannot be read, or too many unusable rows.
        """
        layout = Layout(self.path, "index files of BEiT-3", TREE)
        folder = existing(layout.root / Path(self.index).expanduser()) if self.index else layout.root
        files = self._files(folder, layout)
        builder = Builder(layout.root)
        rows = _Rows(files, builder)
        task = self.task or _guessed(rows, files)
        if task == "imagenet":
            _imagenet(rows)
        elif task == "nlvr2":
            rows.each(_nlvr2)
        elif task == "vqav2":
            answers = folder / self.answer_file
            vocabulary = _vocabulary(answers) if answers.is_file() else {}
            files = [*files, *([answers] if vocabulary else [])]
            rows.each(lambda row, builder: _vqav2(row, builder, vocabulary, answers))
        else:
            _captions(rows, needed=self.task == "retrieval")
        return builder.opened(self, files, self.max_bad_share)

    def _files(self, folder: Path, layout: Layout) -> list[Path]:
        """What to read.

        Raises:
            DataError: it is not there, or it is not clear which.
        """
        if self.files:
            for name in self.files:
                if not (folder / name).is_file():
                    raise DataError(f"{folder / name}: no such file; correct 'files' or 'index'")
            return [folder / name for name in self.files]
        tasks = [self.task] if self.task else list(FILES)
        choices = [names for task in tasks for names in FILES[task].get(self.split, ())]
        if not choices:
            splits = sorted({split for task in tasks for split in FILES[task]})
            raise DataError(
                f"{folder}: no split '{self.split}' of {self.task or 'any task'}; correct it: there are "
                f"{', '.join(splits)}"
            )
        found = [names for names in choices if all((folder / name).is_file() for name in names)]
        if not found:
            wanted = " or ".join(" with ".join(names) for names in choices)
            if folder == layout.root:
                raise layout.wrong(f"no {wanted}")
            raise DataError(f"{folder}: no {wanted}; correct 'index', or name the files in 'files'")
        if len(found) > 1:
            both = " and ".join(" with ".join(names) for names in found)
            raise DataError(f"{folder}: holds {both}; say which with 'task' or 'files'")
        return [folder / name for name in found[0]]


class _Rows:
    """Rows of all files with the place of each; what is no row is a problem."""

    def __init__(self, files: list[Path], builder: Builder) -> None:
        self.files, self.builder = files, builder

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for file in self.files:
            for number, line in lines(file):
                where = f"{file.name}:{number}"
                try:
                    yield where, json.loads(line)
                except (ValueError, RecursionError) as error:
                    self.builder.problems.append(f"{where}: not JSON ({error})")

    def each(self, add: Any) -> None:
        """Add every row, or note why it cannot be used."""
        for where, row in self:
            self.builder.attempt(where, lambda row=row: add(row, self.builder))  # type: ignore[misc]


def _guessed(rows: _Rows, files: list[Path]) -> Task:
    """What the first row looks like.

    Raises:
        DataError: like none.
    """
    first = next((row for _, row in rows if isinstance(row, dict)), {})
    rows.builder.problems.clear()  # they are read again
    if "qid" in first:
        return "vqav2"
    if "image2_path" in first:
        return "nlvr2"
    if "image_id" in first:
        return "captioning"
    if "label" in first:
        return "imagenet"
    raise DataError(
        f"{files[0]}: rows of BEiT-3 have qid, image2_path, image_id or label; the first has "
        f"{', '.join(first)[:200] or 'nothing'}; correct the file, or say what it is with 'task'"
    )


def _segment(row: Any) -> str | list[int] | None:
    """The text of a row, or its ids."""
    found = row.get("text_segment")
    if found is None:
        return None
    if isinstance(found, str) and found.strip():
        return found
    if isinstance(found, list) and found and all(type(n) is int and 0 <= n < 2**31 for n in found):
        return found
    if found in ("", []) or (isinstance(found, str) and not found.strip()):
        raise UnusableError("text_segment is empty")
    raise UnusableError(f"text_segment: expected a text or ids of tokens, found {short(found)}")


def _text(row: Any) -> dict[str, Any]:
    """The text as cells of the builder."""
    found = _segment(row)
    if found is None:
        raise UnusableError("no text_segment")
    return {"text": found} if isinstance(found, str) else {"token_ids": found}


def _picture(row: Any, builder: Builder, key: str = "image_path") -> str:
    return builder.pictures.find(cell(row, key, str).removeprefix("./"))


def _nlvr2(row: Any, builder: Builder) -> None:
    name, label = cell(row, "identifier", str), cell(row, "label", int)
    if label not in (0, 1):
        raise UnusableError(f"label: expected 1 (true) or 0 (false), found {label}")
    left, right = _picture(row, builder), _picture(row, builder, "image2_path")
    builder.add(name, label=str(label == 1), image=left, second=right, **_text(row))


def _vqav2(row: Any, builder: Builder, vocabulary: Mapping[int, str], file: Path) -> None:
    name = str(cell(row, "qid", int))
    labels, scores = row.get("labels") or [], row.get("scores") or []
    if not isinstance(labels, list) or not isinstance(scores, list) or len(labels) != len(scores):
        raise UnusableError(f"labels and scores differ in number: {short(row)}")
    if labels and not vocabulary:
        raise DataError(f"{file}: no such file, but the rows have labels; correct 'answer_file'")
    answers: list[str] = []
    for label, score in zip(labels, scores, strict=True):
        if type(label) is not int or label not in vocabulary:
            raise UnusableError(f"label {short(label)} is none of the {len(vocabulary):,} in {file.name}")
        number = score if isinstance(score, int | float) else -1.0
        times = next((count for value, count in TIMES.items() if abs(value - number) < 1e-6), 0)
        if not times:
            raise UnusableError(f"score: expected 0.3, 0.6, 0.9 or 1, found {short(score)}")
        answers += [vocabulary[label]] * times
    if answers:
        answers += [""] * (PEOPLE - len(answers))
    builder.add(name, answers=answers, image=_picture(row, builder), **_text(row))


def _vocabulary(file: Path) -> dict[int, str]:
    """Answers by their numbers.

    Raises:
        DataError: it is no list of answers with the numbers 0, 1, ...
    """
    found: dict[int, str] = {}
    for number, line in lines(file):
        try:
            row = json.loads(line)
            answer, label = row["answer"], row["label"]
        except (ValueError, TypeError, KeyError, RecursionError):
            answer = label = None
        if not isinstance(answer, str) or type(label) is not int or label in found:
            raise DataError(
                f'{file}:{number}: expected {{"answer": ..., "label": ...}} with a number of its own, found '
                f"{line[:60]!r}; correct it"
            )
        found[label] = answer
    if sorted(found) != list(range(len(found))):
        raise DataError(f"{file}: {len(found)} answers, but their labels are not 0 to {len(found) - 1}")
    return found


def _captions(rows: _Rows, *, needed: bool) -> None:
    """Rows of one picture become one example, in the order in which pictures first come."""
    builder = rows.builder
    groups: dict[int, tuple[str, list[str], list[list[int]]]] = {}
    seen: set[int] = set()

    def add(row: Any) -> None:
        number, segment = cell(row, "image_id", int), _segment(row)
        if segment is None and needed:
            raise UnusableError("no text_segment")
        place = _picture(row, builder)
        picture, texts, ids = groups.setdefault(number, (place, [], []))
        if picture != place:
            raise UnusableError(f"image_id {number} is another picture, {short(picture)}")
        if segment is None and number in seen:
            raise UnusableError(f"another one has its image_id, {number}")
        if (ids and isinstance(segment, str)) or (texts and isinstance(segment, list)):
            raise UnusableError(f"image_id {number} has texts and ids of tokens")
        seen.add(number)
        if isinstance(segment, str):
            texts.append(segment)
        elif segment is not None:
            ids.append(segment)

    for where, row in rows:
        builder.attempt(where, lambda row=row: add(row))  # type: ignore[misc]
    for number, (picture, texts, ids) in groups.items():
        builder.attempt(
            f"image_id {number}",
            lambda n=number, p=picture, t=texts, i=ids: builder.add(str(n), t, image=p, caption_ids=i),  # type: ignore[misc]
        )


def _imagenet(rows: _Rows) -> None:
    """A class is the folder in which most of its pictures lie."""
    pairs: Counter[tuple[int, str]] = Counter()
    for _, row in rows:
        if isinstance(row, dict) and type(row.get("label")) is int and isinstance(row.get("image_path"), str):
            pairs[row["label"], _folder(row["image_path"])] += 1
    rows.builder.problems.clear()  # they are read again
    names: dict[int, str] = {}
    taken: set[str] = set()
    for (label, folder), _ in pairs.most_common():
        if label not in names and folder not in taken:
            names[label] = folder
            taken.add(folder)
    by_folder = 2 * len(names) > len({label for label, _ in pairs})

    def add(row: Any, builder: Builder) -> None:
        label, place = cell(row, "label", int), cell(row, "image_path", str)
        if label < 0:
            raise UnusableError(f"label {label} is below 0")
        if by_folder and names.get(label) != _folder(place):
            known = f"the class {names[label]}" if label in names else "no class"
            raise UnusableError(f"label {label} is {known}, but it lies in {_folder(place)}")
        name = names[label] if by_folder else f"{label:05d}"
        builder.add(place, image=_picture(row, builder), label=name)

    rows.each(add)


def _folder(place: str) -> str:
    return place.rpartition("/")[0].rpartition("/")[2]
