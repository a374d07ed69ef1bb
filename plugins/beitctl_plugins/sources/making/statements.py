"""Statements about two embedded pictures, as in NLVR2.

Every statement comes twice, about other pictures, and is true once: its words alone do not tell.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

from beitctl.data.order import generator
from beitctl_plugins.sources.making.concepts import concept, has_style, phrase, shows, style

LEFT = ("the left picture shows {}", "there is {} in the left picture")
RIGHT = ("the right picture shows {}", "there is {} in the right picture")
ONE = ("there is {} in exactly one of the pictures", "only one of the two pictures shows {}")
SAME = ("the two pictures show the same kind of thing", "both pictures show things of one kind")
BOTH = {
    "photograph": ("both pictures are photographs", "each of the pictures is a photo"),
    "drawing": ("both pictures are drawings", "each of the pictures is drawn"),
    "work of art": ("both pictures show works of art", "each of the pictures is of a work of art"),
}
LEFTS, RIGHTS = 20, 60
"""So many pictures are tried until one fits a statement."""

Row = Mapping[str, Any]
Truth = Callable[[Row, Row], bool | None]


class Stated(NamedTuple):
    """A statement about two pictures."""

    id: str
    left: bytes
    right: bytes
    text: str
    label: str
    """``True`` or ``False``."""


def statements(rows: Sequence[Row], name: str) -> list[Stated]:
    """One statement per picture, which is the left one; of an odd number one picture has two.

    Args:
        rows: pictures of one split.
        name: of the split; the same name gives the same statements.
    """
    return _Maker(rows, name).made()


class _Idea(NamedTuple):
    text: str
    truth: Truth
    likely: Sequence[Row]
    """Pictures that make it hard to say: those that have what the statement is about."""


class _Maker:
    def __init__(self, rows: Sequence[Row], name: str) -> None:
        self.rows = rows
        self.draw = generator("embedded", "statements", name)
        self.by_concept, self.by_style = defaultdict(list), defaultdict(list)
        for row in rows:
            self.by_concept[concept(row)].append(row)
            self.by_style[style(row)].append(row)

    def made(self) -> list[Stated]:
        waiting = [self.rows[place] for place in self.draw.permutation(len(self.rows))]
        if len(waiting) % 2:
            waiting.append(waiting[0])
        ideas = cycle((self._left, self._right, self._one, self._same, self._both))
        found: list[Stated] = []
        while waiting:
            first = waiting.pop()
            pair = None
            while pair is None:
                pair = self._pair(first, next(ideas)(first), waiting)
            found += pair
        return [found[place] for place in self.draw.permutation(len(found))]

    def _pair(self, first: Row, idea: _Idea | None, waiting: list[Row]) -> list[Stated] | None:
        """A true statement about one picture and a false one about another that waits."""
        right = self._right_of(first, idea, wanted=True) if idea else None
        if idea is None or right is None:
            return None
        places = self.draw.permutation(len(waiting)).tolist()
        if self.draw.random() < 0.5:  # the other picture has what the statement is about, if there is one
            ids = {row["id"] for row in idea.likely}
            places.sort(key=lambda place: waiting[place]["id"] not in ids)
        for place in places[:LEFTS]:
            other = self._right_of(waiting[place], idea, wanted=False)
            if other is not None:
                second = waiting.pop(place)
                return [_stated(first, right, idea, "True"), _stated(second, other, idea, "False")]
        return None

    def _right_of(self, left: Row, idea: _Idea, *, wanted: bool) -> Row | None:
        likely = idea.likely or self.rows
        for chance, place in self.draw.random((RIGHTS, 2)).tolist():
            some = likely if chance < 0.5 else self.rows
            right = some[int(place * len(some))]
            if right["id"] != left["id"] and idea.truth(left, right) is wanted:
                return right
        return None

    def _words(self, variants: Sequence[str], name: str = "") -> str:
        return variants[int(self.draw.integers(len(variants)))].format(phrase(name) if name else "")

    def _left(self, row: Row) -> _Idea:
        name = concept(row)
        return _Idea(self._words(LEFT, name), lambda left, _: shows(name, left), self.by_concept[name])

    def _right(self, _: Row) -> _Idea:
        name = concept(self.rows[int(self.draw.integers(len(self.rows)))])
        return _Idea(self._words(RIGHT, name), lambda _, right: shows(name, right), self.by_concept[name])

    def _one(self, row: Row) -> _Idea:
        name = concept(row)

        def truth(left: Row, right: Row) -> bool | None:
            found = shows(name, left), shows(name, right)
            return None if None in found else found[0] != found[1]

        return _Idea(self._words(ONE, name), truth, self.by_concept[name])

    def _same(self, row: Row) -> _Idea:
        def truth(left: Row, right: Row) -> bool | None:
            return shows(concept(left), right)

        return _Idea(self._words(SAME), truth, self.by_concept[concept(row)])

    def _both(self, row: Row) -> _Idea | None:
        name = style(row)
        if name is None:
            return None

        def truth(left: Row, right: Row) -> bool | None:
            found = has_style(name, left), has_style(name, right)
            return False if False in found else None if None in found else True

        return _Idea(self._words(BOTH[name]), truth, self.by_style[name])


def _stated(left: Row, right: Row, idea: _Idea, label: str) -> Stated:
    return Stated(f"{left['id']}+{right['id']}", left["image"], right["image"], idea.text, label)
