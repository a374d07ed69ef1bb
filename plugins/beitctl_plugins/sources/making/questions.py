"""Questions about the embedded pictures.

No question can be answered without its picture better than by chance: whatever is asked with the answer yes
is asked as often, in the same words, with the answer no.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from beitctl.data.order import generator
from beitctl_plugins.sources.making.concepts import concept, phrase, shows, style

THERE = ("is there {} in the picture?", "does the picture show {}?", "can you see {} here?")
WHAT = ("what is in the picture?", "what does the picture show?", "what can you see here?")
KIND = ("what kind of picture is this?", "is this a photo, a drawing or art?")
STYLES = {
    "photograph": ("is this a photograph?", "is the picture a photo?"),
    "drawing": ("is this a drawing?", "is the picture drawn?"),
    "work of art": ("does this show a work of art?", "is this from a museum of art?"),
}
STYLE_NAMES = {"photograph": "photo", "drawing": "drawing", "work of art": "art"}

Row = Mapping[str, Any]


class Asked(NamedTuple):
    """A question and its answer."""

    id: str
    image: bytes
    text: str
    answer: str


def questions(rows: Sequence[Row], name: str) -> list[Asked]:
    """Questions about pictures, mixed: what is there, whether something is there, of what kind it is.

    Args:
        rows: pictures of one split.
        name: of the split; the same name gives the same questions.
    """
    draw = generator("embedded", "questions", name)
    found = [*_what(rows, draw), *_there(rows, draw), *_kind(rows, draw)]
    return [found[place] for place in draw.permutation(len(found))]


def _one(variants: Sequence[str], draw: np.random.Generator) -> str:
    return variants[int(draw.integers(len(variants)))]


def _mixed(rows: Sequence[Row], draw: np.random.Generator) -> list[Row]:
    return [rows[place] for place in draw.permutation(len(rows))]


def _what(rows: Sequence[Row], draw: np.random.Generator) -> Iterator[Asked]:
    for row in rows:
        yield Asked(f"{row['id']}-what", row["image"], _one(WHAT, draw), concept(row))


def _there(rows: Sequence[Row], draw: np.random.Generator) -> Iterator[Asked]:
    """Whether something is there: a concept of other pictures of the same kind, or the right one."""
    for kind in sorted({row["kind"] for row in rows}):
        mine = _mixed([row for row in rows if row["kind"] == kind], draw)
        having, lacking = defaultdict(list), defaultdict(list)
        for row in mine:
            having[concept(row)].append(row)
        wanted = Counter({name: len(some) for name, some in having.items()})
        for row in mine:
            names = sorted(name for name in wanted if wanted[name] and shows(name, row) is False)
            if names:
                weights = np.array([wanted[name] for name in names], float)
                chosen = names[draw.choice(len(names), p=weights / weights.sum())]
                wanted[chosen] -= 1
                lacking[chosen].append(row)
        for name in sorted(having):
            for yes, no in zip(having[name], lacking[name], strict=False):
                text = _one(THERE, draw).format(phrase(name))
                yield Asked(f"{yes['id']}-there", yes["image"], text, "yes")
                yield Asked(f"{no['id']}-not-there", no["image"], text, "no")


def _kind(rows: Sequence[Row], draw: np.random.Generator) -> Iterator[Asked]:
    """Of what kind photos and works of art are, and as many drawings."""
    drawings = iter(_mixed([row for row in rows if style(row) == "drawing"], draw))
    others = _mixed([row for row in rows if style(row) in ("photograph", "work of art")], draw)
    for place, (row, drawing) in enumerate(zip(others, drawings, strict=False)):
        mine = str(style(row))
        if place % 2:
            for some in (row, drawing):
                answer = STYLE_NAMES[str(style(some))]
                yield Asked(f"{some['id']}-kind", some["image"], _one(KIND, draw), answer)
            continue
        asked = mine if draw.random() < 0.5 else "drawing"
        text = _one(STYLES[asked], draw)
        for some in (row, drawing):
            answer = "yes" if style(some) == asked else "no"
            yield Asked(f"{some['id']}-style", some["image"], text, answer)
