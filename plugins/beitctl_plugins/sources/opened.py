"""What every source of this package opens to, and what they share on the way there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beitctl.api import Example, Object
from beitctl.data.labels import words_of
from beitctl.errors import DataError

SMALL_BYTES = 64 * 2**20
"""Sets of files up to this size are hashed by content, larger ones by name and size."""


@dataclass(frozen=True)
class Opened:
    """Rows, in memory or memory-mapped, each made into an example when it is asked for."""

    rows: Sequence[Any]
    example: Callable[[Any], Example]
    fingerprint: str
    problems: list[str] = field(default_factory=list)
    """What was left out, and why: one line each."""
    shards: Sequence[int] = ()
    """Sizes of the runs of rows that lie together on disk; empty: any row is read as fast as any other."""
    lengths: Any = None
    """(n,) ints that grow with the length of each text, or None."""
    labelled: Callable[[Any], str | None] | None = None
    """Class of a row without the rest of it; None: reading the whole example is as fast."""
    window: int = 0
    """Most examples to mix with one another, where more would need more shards than memory holds; 0: many."""
    worded: Callable[[Any], tuple[str, ...]] | None = None
    """Captions and text of a row without its picture; None: reading the whole example is as fast."""
    state: str = ""
    """Changes whenever a file was touched, unlike the fingerprint; for caches."""
    segments: tuple[str, ...] = ()
    """Names of the classes 1, 2, .. of segmentations."""
    things: Callable[[Any], tuple[Object, ...]] | None = None
    """Objects of a row without the rest of it; None: reading the whole example is as fast."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.example(self.rows[index])

    def label(self, index: int) -> str | None:
        """Class of an example, without its picture where that is faster."""
        return self.labelled(self.rows[index]) if self.labelled else self[index].label

    def words(self, index: int) -> tuple[str, ...]:
        """Captions of an example, then its text, without its picture where that is faster."""
        return self.worded(self.rows[index]) if self.worded else words_of(self[index])

    def objects(self, index: int) -> tuple[Object, ...]:
        """Objects in the picture of an example, without the picture where that is faster."""
        return self.things(self.rows[index]) if self.things else self[index].objects


def existing(path: Path) -> Path:
    """A path with ``~`` resolved.

    Raises:
        DataError: there is nothing.
    """
    path = path.expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; correct 'path' in the recipe")
    return path


def check_share(path: Path, problems: list[str], good: int, limit: float) -> None:
    """Refuse data of which too little is usable.

    Raises:
        DataError: nothing is usable, or more than ``limit`` of it is not.
    """
    bad = len(problems)
    examples = "".join(f"\n  {line}" for line in problems[:5]) + ("\n  ..." if bad > 5 else "")
    if not good:
        raise DataError(f"{path}: nothing usable in it; {bad} rows were left out:{examples}")
    if bad > limit * (good + bad):
        raise DataError(
            f"{path}: {bad} of {good + bad} rows are unusable, more than max_bad_share ({limit:g}) allows; "
            f"correct them or raise it:{examples}"
        )
