"""``beitctl data index``: the index files of BEiT-3's released code, from annotations as they are published.

The sources of the data sets read the annotations; here their examples become rows. Files appear whole or not
at all, ``index.json``, which says what is in them, last.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beitctl import registry
from beitctl.api import Example, Examples, TextTokenizer
from beitctl.data.order import generator
from beitctl.errors import DataError, UserError
from beitctl.replacing import replace_file
from beitctl.report.bars import Bar
from beitctl.report.naming import printable

NOTE = "index.json"
ANSWERS = "answer2label.txt"
LEAST = 9
"""An answer that is right for fewer questions is in no vocabulary."""
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Score of an answer that so many people gave; more are like the last."""
PROBLEMS = 1000
"""Lines on what was left out that are kept per file."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What decides the rows besides the annotations."""

    splits: tuple[str, ...] = ()
    """Parts to write; empty: all that the data set has."""
    tokenizer: TextTokenizer | None = None
    """Texts become its ids; None: they stay texts."""
    rest_val: int = 1000
    """Pictures of val2014 whose questions are kept from training (vqav2)."""
    seed: int = 0
    """Chooses those pictures: the released code chose them by chance."""
    max_bad_share: float = 0.01
    """Largest share of pictures and annotations that cannot be used."""
    quiet: bool = False
    """Draw no bar."""


@dataclass
class _Index:
    """Files on their way."""

    root: Path
    settings: Settings
    files: dict[str, list[bytes]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    more: Row = field(default_factory=dict)
    """What else the note says."""

    def open(self, kind: str, table: Mapping[str, Any], name: str) -> Examples:
        """A part of a data set; what its source leaves out is noted under the name of a file."""
        source = registry.get("beitctl.sources", kind)
        limit = self.settings.max_bad_share
        examples: Examples = source.model_validate(
            {"path": str(self.root), "max_bad_share": limit, **table}
        ).open()
        self.left_out.setdefault(name, []).extend(getattr(examples, "problems", ()))
        return examples

    def add(self, name: str, examples: Examples, rows: Callable[[Example], Iterable[Row]]) -> None:
        """Write the rows of every example to a file; those whose text has no token are left out."""
        lines = self.files.setdefault(name, [])
        with Bar(name, len(examples), quiet=self.settings.quiet) as bar:
            for index in range(len(examples)):
                example = examples[index]
                for row in rows(example):
                    if row.get("text_segment") == []:
                        self.left_out[name].append(f"{example.id}: a text without a token")
                    else:
                        lines.append(_line(row))
                bar.advance()

    def place(self, image: Any) -> str:
        """Path of a picture below the root."""
        return Path(image).relative_to(self.root).as_posix()

    def segment(self, text: str) -> str | list[int]:
        """A text, or its ids."""
        tokenizer = self.settings.tokenizer
        return text if tokenizer is None else list(map(int, tokenizer.encode(text)))


def write(task: str, path: Path, out: Path, settings: Settings = Settings()) -> dict[str, Any]:
    """Write the index files of a data set; returns what ``index.json`` says.

    Args:
        task: one of ``TASKS``.
        path: folder of the data set; paths of pictures become relative to it.
        out: folder for the files.
        settings: what decides the rows.

    Raises:
        UserError: no such task or split, nothing at the path, or a file where the folder should be.
        DataError: annotations that are missing or cannot be read, or too much that cannot be used.
    """
    if task not in TASKS:
        raise UserError(f"{task}: no such task; there are {', '.join(TASKS)}")
    root = path.expanduser()
    if not root.is_dir():
        raise UserError(f"{path}: no such folder; give the one with the annotations and pictures")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file, but it must be a folder for the index files")
    known, make = TASKS[task]
    for split in settings.splits:
        if split not in known:
            raise UserError(f"--split {split}: {task} has {', '.join(known)}")
    index = _Index(root, settings)
    make(index, task, settings.splits or known)
    empty = [name for name, lines in index.files.items() if not lines]
    if empty:
        raise DataError(f"{path}: no row for {', '.join(empty)}; nothing was written")
    for name, lines in index.files.items():
        replace_file(out / name, b"".join(lines))
    note = _note(index, task)
    replace_file(out / NOTE, (json.dumps(note, indent=1, ensure_ascii=False) + "\n").encode())
    return note


def _note(index: _Index, task: str) -> dict[str, Any]:
    tokenizer = index.settings.tokenizer
    return {
        "task": task,
        "rows": {name: len(lines) for name, lines in index.files.items()},
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "left_out": {
            name: {"count": len(lines), "first": [printable(line) for line in lines[:PROBLEMS]]}
            for name, lines in index.left_out.items()
            if lines
        },
        **index.more,
    }


def _line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _imagenet(index: _Index, _: str, splits: Sequence[str]) -> None:
    """Classes are numbered as their folders are sorted, over all parts."""
    parts = {
        f"imagenet.{s}.index.jsonl": index.open("imagenet", {"split": s}, f"imagenet.{s}.index.jsonl")
        for s in splits
    }
    names = sorted({str(part[i].label) for part in parts.values() for i in range(len(part))})
    numbers = {name: number for number, name in enumerate(names)}
    for name, examples in parts.items():
        index.add(
            name,
            examples,
            lambda e: [{"image_path": index.place(e.image), "label": numbers[str(e.label)]}],
        )
    index.more["classes"] = len(names)


def _nlvr2(index: _Index, _: str, splits: Sequence[str]) -> None:
    def rows(example: Example) -> list[Row]:
        return [
            {
                "image_path": index.place(example.image),
                "image2_path": index.place(example.second),
                "text_segment": index.segment(str(example.text)),
                "label": int(example.label == "True"),
                "identifier": example.id,
            }
        ]

    for split in splits:
        name = f"nlvr2.{'test-P' if split == 'test1' else split}.index.jsonl"
        index.add(name, index.open("nlvr2", {"split": split}, name), rows)


def _captions(index: _Index, task: str, splits: Sequence[str]) -> None:
    """Captions: of retrieval with pictures numbered within the split, of captioning with COCO's numbers.

    Captioning has captions for training alone.
    """
    kind = "flickr30k" if task == "flickr30k" else "coco"
    for split in splits:
        name = f"{task.replace('-', '_')}.{split}.jsonl"
        table = {"split": split} if kind == "flickr30k" else {"karpathy": split}
        examples = index.open(kind, table, name)
        if task == "coco-captioning":
            index.add(name, examples, lambda e, said=split == "train": _captioning(index, e, said))  # type: ignore[misc]
        else:
            index.add(name, examples, _Numbered(index).rows)


class _Numbered:
    """Rows of captions, whose pictures get the numbers 0, 1, ..."""

    def __init__(self, index: _Index) -> None:
        self.index, self.next = index, 0

    def rows(self, example: Example) -> Iterator[Row]:
        number, self.next = self.next, self.next + 1
        for caption in example.captions:
            yield _caption(self.index, example.image, self.index.segment(caption), number)


def _captioning(index: _Index, example: Example, said: bool) -> list[Row]:
    place = index.place(example.image)
    found = re.search(r"(\d+)$", Path(place).stem)
    if found is None:
        raise DataError(f"{place}: its name does not end with the number that COCO gave it")
    segments = [index.segment(caption) for caption in example.captions] if said else [None]
    return [_caption(index, example.image, segment, int(found[1])) for segment in segments]


def _caption(index: _Index, image: Any, segment: str | list[int] | None, number: int) -> Row:
    return {"image_path": index.place(image), "text_segment": segment, "image_id": number}


def _vqav2(index: _Index, _: str, splits: Sequence[str]) -> None:
    names = {split: f"vqa.{split}.jsonl" for split in ("train", "val", "test", "test-dev")}
    parts = {s: index.open("vqav2", {"split": s}, names[s]) for s in names if s in splits}
    for split in ("test", "test-dev"):
        if split in parts:
            index.add(names[split], parts[split], lambda e: [_question(index, e)])
    if not {"train", "val"} & parts.keys():
        return
    if not {"train", "val"} <= parts.keys():
        raise UserError("--split: answers are counted over train and val together; name both, or neither")
    answers = _vocabulary((parts["train"], parts["val"]))
    index.files[ANSWERS] = [_line({"answer": answer, "label": n}) for n, answer in enumerate(answers)]
    numbers = {answer: number for number, answer in enumerate(answers)}
    for split in ("train", "val"):
        index.add(names[split], parts[split], lambda e: _answered(index, e, numbers))
    dropped = {names[s]: len(parts[s]) - len(index.files[names[s]]) for s in ("train", "val")}
    index.more |= {"answers": len(answers), "without_known_answer": dropped, **_held_out(index)}


def _question(index: _Index, example: Example) -> Row:
    return {
        "image_path": index.place(example.image),
        "text_segment": index.segment(str(example.text)),
        "qid": int(example.id),
    }


def _answered(index: _Index, example: Example, numbers: Mapping[str, int]) -> list[Row]:
    """A question with the answers of the vocabulary, which are looked up as people wrote them."""
    times = Counter(numbers[answer] for answer in example.answers if answer in numbers)
    if not times:
        return []
    scores = [SCORES[min(count, len(SCORES) - 1)] for count in times.values()]
    row = _question(index, example)
    return [{"image_path": row["image_path"], "text_segment": row["text_segment"], "labels": list(times),
             "scores": scores, "qid": row["qid"]}]  # fmt: skip


def _held_out(index: _Index) -> Row:
    """Part the questions of val: those about pictures that are held out, and those to train on."""
    count, rows = index.settings.rest_val, index.files["vqa.val.jsonl"]
    pictures = [json.loads(row)["image_path"] for row in rows]
    names = list(dict.fromkeys(pictures))
    if count >= len(names):
        raise UserError(
            f"--rest-val {count}: val has questions about {len(names):,} pictures, and some must be left for "
            "training; give a smaller number"
        )
    order = generator(index.settings.seed, "rest_val").permutation(len(names))
    held = {names[place] for place in order[:count]}
    for name, wanted in (("vqa.trainable_val.jsonl", False), ("vqa.rest_val.jsonl", True)):
        index.files[name] = [
            row for row, picture in zip(rows, pictures, strict=True) if (picture in held) is wanted
        ]
    return {"rest_val_pictures": count, "seed": index.settings.seed}


@dataclass(frozen=True)
class _MostGiven:
    """Questions whose one answer is what the data set says that most people gave."""

    parts: Sequence[Examples]
    fingerprint: str = ""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Example:
        for part in self.parts:
            if index < len(part):
                found = part[index]
                return Example(found.id, answers=(found.label,) if found.label else ())
            index -= len(part)
        raise IndexError(index)


def _vocabulary(parts: Sequence[Examples]) -> Sequence[str]:
    """The answers by the rule of the released code, which the task of questions knows."""
    task = registry.get("beitctl.tasks", "vqa").model_validate({"min_answer_count": LEAST})
    found: Sequence[str] = task.vocabulary(_MostGiven(parts))
    if not found:
        raise DataError(f"no answer is the most given one of {LEAST} questions; the data set is not whole")
    return found


def _nocaps(index: _Index, _: str, splits: Sequence[str]) -> None:
    for split in splits:
        name = f"nocaps.{split}.jsonl"
        places = [
            f"{folder}nocaps_{split}_{kind}.json"
            for folder in ("", "annotations/")
            for kind in ("image_info", "4500_captions")
        ]
        file = next((index.root / place for place in places if (index.root / place).is_file()), None)
        if file is None:
            raise DataError(f"{index.root}: no {' or '.join(places)}; download it, or leave out {split}")
        problems = index.left_out.setdefault(name, [])
        found = dict(_nocaps_pictures(index.root, file, split, problems))
        if len(problems) > index.settings.max_bad_share * (len(found) + len(problems)):
            first = "".join(f"\n  {printable(line)}" for line in problems[:5])
            raise DataError(f"{file}: {len(problems):,} of its pictures cannot be used, too many:{first}")
        index.files[name] = [
            _line({"image_path": place, "text_segment": None, "image_id": number})
            for number, place in found.items()
        ]


def _nocaps_pictures(root: Path, file: Path, split: str, problems: list[str]) -> Iterator[tuple[int, str]]:
    """Numbers and places of the pictures that a list names."""
    try:
        rows = json.loads(file.read_bytes())["images"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{file}: no list of images in it ({error!r}); download it again") from error
    seen = set()
    for number, row in enumerate(rows if isinstance(rows, list) else [], 1):
        id, name = (row.get("id"), row.get("file_name")) if isinstance(row, dict) else (None, None)
        if type(id) is not int or not isinstance(name, str) or name.startswith("/") or ".." in name:
            problems.append(f"{file.name}:images {number}: no id and file_name")
        elif id in seen:
            problems.append(f"{file.name}:images {number}: another one has its id, {id}")
        else:
            seen.add(id)
            places = [f"{folder}{name}" for folder in (f"{split}/", f"images/{split}/", "images/", "")]
            place = next((p for p in places if (root / p).is_file()), None)
            if place is None:
                problems.append(f"{file.name}:images {number}: no picture {name!r}")
            else:
                yield id, place


TASKS: dict[str, tuple[tuple[str, ...], Callable[[_Index, str, Sequence[str]], None]]] = {
    "imagenet": (("train", "val"), _imagenet),
    "nlvr2": (("train", "dev", "test1"), _nlvr2),
    "vqav2": (("train", "val", "test", "test-dev"), _vqav2),
    "coco-captioning": (("train", "val", "test"), _captions),
    "coco-retrieval": (("train", "val", "test"), _captions),
    "flickr30k": (("train", "val", "test"), _captions),
    "nocaps": (("val", "test"), _nocaps),
}
"""By name the parts of a data set, and what makes its rows."""
