"""``beitctl data check``: every example is read, every picture decoded, and all of it counted."""

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from beitctl.api import Example, Examples
from beitctl.data.images import Pictures
from beitctl.errors import DataError
from beitctl.inspecting.counting import Classes, Digests, Spread, Writing
from beitctl.inspecting.finding import Found
from beitctl.inspecting.looking import Measured, Seen, look, read
from beitctl.inspecting.ordered import in_order
from beitctl.report.bars import Bar
from beitctl.report.events import plain

HAVING = (
    "image", "second", "segmentation", "captions", "text", "label", "answers", "token_ids", "caption_ids",
    "objects",
)  # fmt: skip
"""Parts of an example that are counted."""
LISTED = 1000
"""Broken examples that are listed by name."""
SIDES = (64, 224)
"""Pictures whose short side is below these are counted: too small to see much, and enlarged in training."""


def spread_over(count: int, limit: int | None) -> Sequence[int]:
    """All indices of ``count`` examples, or ``limit`` of them evenly spread, in order."""
    if limit is None or limit >= count:
        return range(count)
    places: Sequence[int] = np.arange(limit, dtype=np.int64) * count // limit  # type: ignore[assignment]
    return places


def check(
    found: Found, examples: Examples, *, limit: int | None = None, workers: int = 2, quiet: bool = False
) -> dict[str, Any]:
    """Look at examples and report what they are, as plain data for JSON.

    Args:
        found: the source.
        examples: the source, opened.
        limit: look at this many only, evenly spread.
        workers: threads that decode.
        quiet: draw no bar.

    Raises:
        ChangedError: the data changed meanwhile.
    """
    indices = spread_over(len(examples), limit)
    counts = _Counts()
    one = functools.partial(look, examples, pictures=Pictures())
    with (
        contextlib.closing(in_order(one, indices, workers)) as stream,
        Bar("checking", len(indices), quiet=quiet) as bar,
    ):
        for seen in stream:
            counts.add(seen)
            bar.advance()
    problems = list(getattr(examples, "problems", ()))
    ignored = {str(key): int(value) for key, value in dict(getattr(examples, "ignored", {})).items()}
    return {
        "kind": found.kind,
        "source": {"kind": found.kind, **plain(found.table)},
        "recipe": found.line,
        "also": list(found.also),
        "fingerprint": examples.fingerprint,
        "examples": len(examples),
        "checked": len(indices),
        **counts.report(examples),
        "left_out": {"count": len(problems), "first": problems[:LISTED]},
        "ignored": ignored,
        "notes": [str(note) for note in getattr(examples, "notes", ())],
    }


def refuse(report: dict[str, Any], path: str, max_bad_share: float) -> None:
    """End with exit code 3 if what was checked cannot be trained on.

    Raises:
        DataError: nothing is usable, or too much is broken.
    """
    broken, checked = report["broken"]["count"], report["checked"]
    if broken == checked:
        raise DataError(f"{path}: nothing in it can be used; the reasons are above")
    if broken > max_bad_share * checked:
        raise DataError(
            f"{path}: {broken:,} of {checked:,} examples ({broken / checked:.2%}) are broken, more than "
            f"the {max_bad_share:.2%} that are allowed; replace or remove those listed above, or allow more "
            "with --max-bad-share"
        )


class _Counts:
    """Everything that is counted."""

    def __init__(self) -> None:
        self.having: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.width, self.height, self.short = Spread(), Spread(), Spread()
        self.classes, self.captions, self.text = Classes(), Writing(), Writing()
        self.answers, self.objects = Classes(), Classes()
        self.each = Spread()
        self.copies = Digests()
        self.picture_bytes = 0
        self.good = self.broken = 0
        self.first_broken: list[dict[str, str]] = []

    def add(self, seen: Seen) -> None:
        """Count one example."""
        if seen.example is None:
            self.broken += 1
            if len(self.first_broken) < LISTED:
                self.first_broken.append({"id": seen.id, "reason": seen.reason})
            return
        self.good += 1
        self._words(seen.example)
        for picture in seen.pictures:
            self._picture(picture)
        if seen.digest:
            self.copies.add(seen.digest, seen.index)

    def _words(self, example: Example) -> None:
        for name in HAVING:
            found = getattr(example, name)
            self.having[name] += found is not None and (not isinstance(found, tuple) or bool(found))
        for thing in example.objects:
            self.objects.add(thing.label)
        for answer in filter(str.strip, example.answers):
            self.answers.add(answer)
        for caption in example.captions:
            self.captions.add(caption)
        if example.captions:
            self.each.add(len(example.captions))
        if example.text is not None:
            self.text.add(example.text)
        if example.label is not None:
            self.classes.add(example.label)

    def _picture(self, picture: Measured) -> None:
        self.formats[picture.format] += 1
        self.modes[picture.mode] += 1
        self.kinds["animated"] += picture.animated
        self.kinds["cmyk"] += picture.mode == "CMYK"
        self.kinds["transparent"] += picture.transparent
        self.width.add(picture.width)
        self.height.add(picture.height)
        self.short.add(min(picture.width, picture.height))
        self.picture_bytes += picture.size

    def report(self, examples: Examples) -> dict[str, Any]:
        """All numbers."""
        groups, extra, first = self.copies.equal()
        looked_at = self.good + self.broken
        captions = {"per_example": self.each.summary(), **self.captions.summary()}
        return {
            "with": dict(self.having),
            "bytes": self.picture_bytes + self.captions.size + self.text.size,
            "pictures": self._pictures() if self.formats else None,
            "classes": self.classes.summary(),
            "answers": self.answers.summary(),
            "objects": self.objects.summary(),
            "captions": captions if self.captions.count else None,
            "text": self.text.summary() if self.text.count else None,
            "broken": {
                "count": self.broken,
                "share": self.broken / looked_at if looked_at else 0.0,
                "first": self.first_broken,
            },
            "duplicates": {
                "groups": groups,
                "extra": extra,
                "first": [[_name(examples, place) for place in group] for group in first],
            },
        }

    def _pictures(self) -> dict[str, Any]:
        return {
            "count": self.formats.total(),
            "bytes": self.picture_bytes,
            "formats": dict(self.formats.most_common()),
            "modes": dict(self.modes.most_common()),
            "width": self.width.summary(),
            "height": self.height.summary(),
            "smaller_than": {str(side): self.short.below(side) for side in SIDES},
            **self.kinds,
        }


def _name(examples: Examples, index: int) -> str:
    """Id of an example that was readable a moment ago."""
    seen = read(examples, index)
    return seen.id
