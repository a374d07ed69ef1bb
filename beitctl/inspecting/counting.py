"""Numbers about millions of examples in little memory: counters and hashes, never the examples."""

import unicodedata
from array import array
from collections import Counter
from hashlib import blake2b
from typing import Any

import numpy as np

EXACT = 10_000
"""Numbers from here on are counted to three digits, so that there are few different ones."""
MAX_CLASSES = 100_000
DIGEST_BYTES = 16
WIDTHS = ("FULLWIDTH", "HALFWIDTH")
"""First words of names of letters that say how wide a letter is drawn; its script comes after."""
OTHER = ("MATHEMATICAL", "MODIFIER", "SCRIPT", "DOUBLE", "UNKNOWN", "FEMININE", "MASCULINE")
"""First words of names of letters that belong to no script, or to several."""


class Spread:
    """Smallest, median, 99 % and largest of whole numbers."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._smallest: int | None = None
        self._largest = 0

    def add(self, value: int) -> None:
        """Count a number, 0 or more."""
        self._smallest = value if self._smallest is None else min(self._smallest, value)
        self._largest = max(self._largest, value)
        scale = 10 ** (len(str(value)) - 3) if value >= EXACT else 1
        self._counts[round(value / scale) * scale if scale > 1 else value] += 1

    def below(self, value: int) -> float:
        """Share of the numbers that are smaller than one below ``EXACT``."""
        total = self._counts.total()
        return sum(count for number, count in self._counts.items() if number < value) / total if total else 0

    def summary(self) -> dict[str, int]:
        """``min``, ``median``, ``p99``, ``max``; empty if there are no numbers."""
        if self._smallest is None:
            return {}
        ordered = sorted(self._counts.items())
        ends = np.cumsum([count for _, count in ordered])
        at = [ordered[int(np.searchsorted(ends, share * ends[-1]))][0] for share in (0.5, 0.99)]
        median, late = (min(max(value, self._smallest), self._largest) for value in at)
        return {"min": self._smallest, "median": median, "p99": late, "max": self._largest}


class Digests:
    """Hashes in the order they come, 16 bytes each, to find those that are equal."""

    def __init__(self) -> None:
        self._hashes = bytearray()
        self._places = array("q")

    def add(self, digest: bytes, place: int) -> None:
        """Remember a hash of 16 bytes, and the number of what has it."""
        self._hashes += digest
        self._places.append(place)

    def equal(self, groups: int = 5, members: int = 10) -> tuple[int, int, list[list[int]]]:
        """Number of groups of equal ones, how many are in them beyond one each, and the first groups."""
        if len(self._places) < 2:
            return 0, 0, []
        hashes = np.frombuffer(self._hashes, np.uint64).reshape(-1, 2)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal ones stay in their order
        hashes = hashes[order]
        same = (hashes[1:] == hashes[:-1]).all(axis=1)
        starts = np.flatnonzero(same & ~np.concatenate(([False], same[:-1])))
        first = []
        for start in starts[np.argsort(order[starts], kind="stable")[:groups]]:
            end = start + 1
            while end < len(same) and end - start < members and same[end]:
                end += 1
            first.append([self._places[int(place)] for place in order[start : min(end + 1, start + members)]])
        return len(starts), int(same.sum()), first


class Writing:
    """Lengths, scripts and repetitions of texts."""

    def __init__(self) -> None:
        self.count = 0
        self.size = 0
        """Bytes in UTF-8."""
        self._characters, self._words = Spread(), Spread()
        self._letters: Counter[str] = Counter()
        self._digests = Digests()

    def add(self, text: str) -> None:
        """Count a text."""
        encoded = text.encode("utf-8", "surrogatepass")
        self._digests.add(blake2b(encoded, digest_size=DIGEST_BYTES).digest(), self.count)
        self.count += 1
        self.size += len(encoded)
        self._characters.add(len(text))
        self._words.add(len(text.split()))
        self._letters.update(text)

    def summary(self) -> dict[str, Any]:
        """What is reported."""
        return {
            "count": self.count,
            "characters": self._characters.summary(),
            "words": self._words.summary(),
            "repeated": self._digests.equal()[1],
            "scripts": scripts(self._letters),
        }


class Classes:
    """How often each class occurs."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.overflow = False
        """Whether there are more classes than are counted."""

    def add(self, label: str) -> None:
        """Count a label."""
        if label in self._counts or len(self._counts) < MAX_CLASSES:
            self._counts[label] += 1
        else:
            self.overflow = True

    def summary(self, shown: int = 20) -> dict[str, Any] | None:
        """What is reported; None without labels."""
        if not self._counts:
            return None
        ordered = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))
        return {
            "count": len(ordered),
            "complete": not self.overflow,
            "largest": ordered[0],
            "smallest": ordered[-1],
            "first": sorted(self._counts.items())[:shown],
        }


def scripts(letters: Counter[str]) -> dict[str, float]:
    """Share of the letters that each script has, largest first."""
    found: Counter[str] = Counter()
    for letter, count in letters.items():
        if name := script(letter):
            found[name] += count
    total = found.total()
    return {name: count / total for name, count in sorted(found.items(), key=lambda i: (-i[1], i[0]))}


def script(letter: str) -> str:
    """Script of a letter by its Unicode name, such as ``Latin`` or ``Han``; empty for what is no letter."""
    if not unicodedata.category(letter).startswith("L"):
        return ""
    words = unicodedata.name(letter, "UNKNOWN").replace("-", " ").split()
    word = words[1] if words[0] in WIDTHS else words[0]
    if word in OTHER:
        return "other"
    return "Han" if word in ("CJK", "IDEOGRAPHIC") else word.capitalize()
