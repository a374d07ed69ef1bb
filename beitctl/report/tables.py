"""How numbers are shown to a reader: as text, as tables, and what their names mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beitctl.report.progress import number

MAX_ROWS = 200

MEANINGS = {
    "aacc": "Share of pixels with the right class. Higher is better.",
    "accuracy": "Share of right answers, from 0 to 1. Higher is better.",
    "accuracy_top5": "Share of examples whose class is among the five likeliest. Higher is better.",
    "baseline_accuracy": "Accuracy of always giving the most frequent answer: what has to be beaten.",
    "baseline_cider_d": "cider_d of always saying the most frequent training caption: what has to be beaten.",
    "box_map": "Mean average precision of boxes over overlaps from 0.5 to 0.95 (COCO). Higher is better.",
    "box_map50": "The same where an overlap of half counts as found.",
    "chance_r1": "r1 of picking at random. Retrieval that learned lies above it.",
    "chance_r5": "r5 of picking at random. Retrieval that learned lies above it.",
    "cider_d (python tokenizer)": "How far captions use the words of people, rare ones more; 0 to 10.",
    "codebook_perplexity": "How many codes are in use, where rare ones count less. Higher is better.",
    "codebook_spread": "How far the encoder's vectors point apart, 0 (one way) to 1. Near 0 they collapsed.",
    "codebook_used": "Share or number of the visual codes that occur at all. Unused codes are wasted.",
    "data_wait": "Share of the time in which training waited for data. Lower is better.",
    "grad_norm": "Length of the gradient before clipping. Sudden peaks announce trouble.",
    "i2t_r1": "Share of pictures whose own caption is found first. Higher is better.",
    "i2t_r10": "Share of pictures whose own caption is among the first ten found. Higher is better.",
    "i2t_r5": "Share of pictures whose own caption is among the first five found. Higher is better.",
    "intervals_95": "Where the number would lie in 95 of 100 other draws of as many examples (bootstrap).",
    "label_entropy": "The most that codes could tell about the class, in nats.",
    "left_out": "Examples that could not be used, and are in no other number.",
    "loss": "How wrong the predictions are; 0 is perfect. Lower is better.",
    "loss_first": "Loss at the start of the training.",
    "loss_last": "Loss at the end of the training; lower than loss_first where the model learned.",
    "lr": "Learning rate: the size of a step of the weights. It rises and falls by plan.",
    "macc": "Share of right pixels, averaged over the classes. Higher is better.",
    "majority": "Accuracy of always naming the most frequent class.",
    "majority_miou": "miou of naming the most frequent class everywhere: what has to be beaten.",
    "mask_map": "As box_map, of the outlines. Higher is better.",
    "max_difference": "Largest difference between outputs before export and after reloading. 0 is exact.",
    "mean_recall": "Mean of the six recalls (r1, r5, r10, both ways). Higher is better.",
    "memory_gib": "Most memory that tensors took on the first GPU so far, in GiB.",
    "mfu": "Useful work as a share of the nominal bf16 peak of the GPU, 0 to 1. Higher is better.",
    "mfu_of_measured": "The same of what products alone reach (doctor --measure). Higher is better.",
    "miou": "Overlap of found and true areas, averaged over the classes, 0 to 1. Higher is better.",
    "mutual_information": "What the code of one patch tells about the class, in nats; partly chance.",
    "mutual_information_above_chance": "The same less chance: compare tokenizers by it. Higher is better.",
    "mutual_information_chance": "The same with shuffled labels: what counting alone gives.",
    "nearest_chance": "nearest_same_label of a picture drawn at random: what has to be beaten.",
    "nearest_same_label": "Share of pictures whose most similar one, by codes alone, has the same class.",
    "perplexity": "Number of equally likely choices that would be as hard. Lower is better in prediction.",
    "pretrained": "With the pretrained weights.",
    "question_only": "Accuracy of the best answer that the question alone gives: what has to be beaten.",
    "random_init": "With random weights: what pretraining has to beat.",
    "recall@1": "Mean of i2t_r1 and t2i_r1. Higher is better.",
    "samples_per_s": "Examples trained a second. Higher is faster.",
    "scratch_accuracy": "Accuracy of the same training from random weights: what pretraining has to beat.",
    "t2i_r1": "Share of captions whose own picture is found first. Higher is better.",
    "t2i_r10": "Share of captions whose own picture is among the first ten found. Higher is better.",
    "t2i_r5": "Share of captions whose own picture is among the first five found. Higher is better.",
    "teacher_cosine": "Likeness of rebuilt and true teacher features; 1 is the same. Higher is better.",
    "teacher_groups": "Kinds of patch that the teacher tells apart among a thousand. Few are bad.",
    "tflops_per_gpu": "Useful operations of a GPU, in 1e12 a second. Higher is faster.",
    "top_share": "Share of all patches that the most used code takes. Lower is better.",
    "trivial_box_map50": "box_map50 of one average box a picture: what has to be beaten.",
    "used_share": "Share of the codes that occur at all. Higher is better.",
    "vqa_score": "The official score: an answer that three of ten people gave is right. Higher is better.",
}


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and whether it stands in a column of numbers."""

    text: str
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A table to be shown."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    row_heads: bool = False
    """Whether the first cell of a row is its name."""
    more: int = 0
    """Rows left out."""

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers, judged by its first row."""
        first = self.rows[0] if self.rows else ()
        return column < len(first) and first[column].number


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one: files may hold anything."""
    return dict(value) if isinstance(value, Mapping) else {}


def whole(value: Any) -> int | None:
    """The value if it is a whole number that a float can hold."""
    good = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return value if good else None


def real(value: Any) -> float | None:
    """The value as a float, also of the texts for what is not finite; None if it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def cell(value: Any) -> Cell:
    """A value as a reader wants it: four significant digits, thousands apart, lists joined."""
    if value is None:
        return Cell("–")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int):
        return Cell(f"{value:,}", number=True)
    if isinstance(value, float):
        return Cell(number(value), number=True)
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{key} {cell(item).text}" for key, item in value.items()))
    if isinstance(value, list | tuple):
        return Cell(", ".join(cell(item).text for item in value[:20]) + (", …" if len(value) > 20 else ""))
    return Cell(str(value), number=value in ("nan", "inf", "-inf"))


def table(title: str, columns: Sequence[Any], rows: Sequence[Any]) -> Table:
    """Table of given rows; what is no row is left out, as are rows beyond the first 200."""
    good = [row for row in rows if isinstance(row, list | tuple)]
    cells = tuple(tuple(map(cell, row)) for row in good[:MAX_ROWS])
    return Table(title, tuple(map(str, columns)), cells, more=len(good) - len(cells))


def tables(metrics: Mapping[str, Any], title: str = "") -> list[Table]:
    """Nested numbers as tables: one of the numbers, one of each set of groups that have names in common."""
    single = {name: value for name, value in metrics.items() if not isinstance(value, Mapping)}
    groups = {name: value for name, value in metrics.items() if isinstance(value, Mapping) and value}
    found = []
    if single:
        rows = tuple((Cell(name), cell(value)) for name, value in single.items())
        found.append(Table(title, (), rows, row_heads=True))
    flat = {n: g for n, g in groups.items() if not any(isinstance(value, Mapping) for value in g.values())}
    for names in _alike(flat):
        if len(names) > 1:
            found.append(_side_by_side(title, {name: flat[name] for name in names}))
    alone = {names[0] for names in _alike(flat) if len(names) == 1}
    for name, group in groups.items():
        if name in alone or name not in flat:
            found += tables(group, f"{title} › {name}" if title else name)
    return found


def meanings(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names in nested numbers that have a known meaning, in order of first occurrence, with it."""
    found: dict[str, str] = {}
    for name, value in metrics.items():
        last = name.rpartition("/")[2]
        if isinstance(value, Mapping):
            found |= dict(meanings(value))
        if last in MEANINGS:
            found[last] = MEANINGS[last]
    return list(found.items())


def _alike(groups: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    sets: list[list[str]] = []
    for name, group in groups.items():
        for names in sets:
            if set(groups[names[0]]) & set(group):
                names.append(name)
                break
        else:
            sets.append([name])
    return sets


def _side_by_side(title: str, groups: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(column for group in groups.values() for column in group))
    rows = tuple(
        (Cell(name), *(cell(group.get(column, None)) if column in group else Cell("") for column in columns))
        for name, group in groups.items()
    )
    return Table(title, ("", *columns), rows, row_heads=True)
