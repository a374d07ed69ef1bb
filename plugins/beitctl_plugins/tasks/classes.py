"""What tasks with classes share: files of names, and what held-out answers look like in the report."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beitctl.api import Example, Examples, Log, Tools
from beitctl.data.images import centre_crop
from beitctl.data.labels import labels
from beitctl.errors import DataError
from beitctl.report import figures

SHOWN = 8
"""Answers of each kind in the gallery."""
NAMED = 10
"""Names in a message."""


def names_in(file: str, setting: str) -> tuple[str, ...]:
    """Names of classes that a text file in UTF-8 lists, one a line, in its order.

    Raises:
        DataError: it cannot be read, a line is empty, or a name comes twice.
    """
    path = Path(file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{setting}: {path} cannot be read as text in UTF-8: {error}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        if not name:
            raise DataError(f"{setting}: {path}, line {number} is empty; every line is the name of a class")
        if name in found:
            raise DataError(
                f"{setting}: {path}, line {number} repeats '{name}' of line {found[name]}; names must differ"
            )
        found[name] = number
    return tuple(found)


def check_labels(examples: Examples, names: Sequence[str], setting: str) -> None:
    """Compare the labels of examples with the names that there are.

    Raises:
        DataError: some are none of them.
    """
    known = set(names)
    strange: dict[str, int] = {}
    for label in labels(examples):
        if label and label not in known:
            strange[label] = strange.get(label, 0) + 1
    if strange:
        raise DataError(
            f"{setting} does not have {len(strange):,} of the labels that occur, those of "
            f"{sum(strange.values()):,} examples: {listed(sorted(strange))}; it has {listed(names)}"
        )


def listed(names: Sequence[str], most: int = NAMED) -> str:
    """The first names of a list, and how many there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names):,} in all)"


def draw_confusions(
    truth: NDArray[np.int64], said: NDArray[np.int64], names: Sequence[str], log: Log
) -> None:
    """A confusion matrix, and a table of the classes with the hardest first.

    Args:
        truth: (n,) true classes.
        said: (n,) predicted classes.
        names: of the classes; those that neither occur nor are predicted are left out.
        log: where to draw.
    """
    there = np.unique(np.concatenate([truth, said]))
    counts = np.zeros((len(there), len(there)), np.int64)
    np.add.at(counts, (np.searchsorted(there, truth), np.searchsorted(there, said)), 1)
    shown = [names[number] for number in there]
    log.figure(
        "confusion",
        figures.matrix(counts, shown, "True class (rows) and predicted class (columns)"),
        "Confusion matrix",
        "How many held-out examples of each true class were given each class; a perfect model fills the "
        "diagonal only.",
    )
    rows = [_row(number, counts, shown) for number in range(len(shown)) if counts[number].any()]
    log.table(
        "classes",
        "Classes, the hardest first",
        ("class", "examples", "accuracy", "most confused with"),
        sorted(rows, key=lambda row: (row[2], row[0])),
    )


def _row(number: int, counts: NDArray[np.int64], names: Sequence[str]) -> tuple[str, int, float, str]:
    """Name, number of examples, share of right answers, and the most frequent wrong answer of a class."""
    row = counts[number]
    wrong = row.copy()
    wrong[number] = 0
    most = int(wrong.argmax())
    confused = f"{names[most]} ({wrong[most]:,})" if wrong[most] else ""
    return names[number], int(row.sum()), float(row[number] / row.sum()), confused


def draw_answers(
    truth: NDArray[np.int64], probabilities: NDArray[np.float32], examples: Sequence[Example], tools: Tools,
    log: Log,
) -> None:  # fmt: skip
    """The surest right answers and the surest mistakes.

    Args:
        truth: (n,) true classes.
        probabilities: (n, V) that were given to the classes.
        examples: the n examples, which have pictures.
        tools: hold the names of the classes and what opens pictures.
        log: where to draw.
    """
    said, sure = probabilities.argmax(1), probabilities.max(1)
    order = np.argsort(-sure, kind="stable")
    rows = []
    for title, chosen in (
        ("surest right answers", order[said[order] == truth[order]]),
        ("surest mistakes", order[said[order] != truth[order]]),
    ):
        tiles = [
            _tile(examples[int(i)], tools.labels[said[i]], tools.labels[truth[i]], float(sure[i]), tools)
            for i in chosen[:SHOWN]
        ]
        rows += [figures.Row(tiles, title)] if tiles else []
    log.figure(
        "answers",
        figures.gallery(rows, tile_px=96),
        "Answers",
        "Class given and its probability; true class below.",
    )


def _tile(example: Example, said: str, true: str, sure: float, tools: Tools) -> figures.Tile:
    if example.image is None:
        raise DataError(f"{example.id}: no picture")
    picture = tools.pictures.open(example.image, example.id)
    image = tools.pictures.crop(picture, centre_crop(*picture.size), 96).transpose(1, 2, 0)
    caption = f"{said} {sure:.0%}" + ("" if said == true else f" (true: {true})")
    return figures.Tile(image, caption, "right" if said == true else "wrong")
