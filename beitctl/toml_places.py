"""Line and column of every key in a TOML text, which no TOML parser of Python tells.

The text must be valid TOML already: the scanner only finds where things are, not what they mean.
"""

import re
import tomllib
from bisect import bisect_right

Keys = tuple[str | int, ...]
"""Keys from the top of a document down to a value; a number counts the entries of a list, from 0."""

_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*'""")
_SCALAR = re.compile(
    r'"""(?:\\.|[^\\])*?""""{0,2}'
    r"|'''.*?''''{0,2}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'"
    r"|[^,\]}#\r\n]*",
    re.DOTALL,
)


def places(text: str) -> dict[Keys, tuple[int, int]]:
    """Line and column, both from 1, of every key, table and list entry of a valid TOML text."""
    return _Scanner(text).scan()


def dotted_key(text: str, start: int = 0) -> tuple[list[tuple[str, int]], int]:
    """Parts of the dotted key at ``start``, each with where it begins, and where the key ends.

    Raises:
        ValueError: there is no key.
    """
    parts: list[tuple[str, int]] = []
    while True:
        start = _after(_SPACE, text, start)
        found = _KEY.match(text, start)
        if not found:
            raise ValueError(f"no key at character {start + 1} of {text!r}")
        parts.append((_plain(found[0]), start))
        start = _after(_SPACE, text, found.end())
        if text[start : start + 1] != ".":
            return parts, start
        start += 1


def dotted(keys: Keys) -> str:
    """Keys as they are written, ``pretrain.train.steps``."""
    return ".".join(map(str, keys))


def _plain(key: str) -> str:
    """Name that a key stands for: quotes and escapes undone."""
    return next(iter(tomllib.loads(f"{key} = 0"))) if key[0] in "\"'" else key


def _after(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return found.end() if found else start


class _Scanner:
    """One walk over a text; ``at`` is the next character."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.starts = [0, *(found.end() for found in re.finditer("\n", text))]
        self.found: dict[Keys, tuple[int, int]] = {}
        self.entries: dict[Keys, int] = {}  # arrays of tables: number of the newest entry

    def scan(self) -> dict[Keys, tuple[int, int]]:
        table: Keys = ()
        while self._blank() < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._pair(table)
        return self.found

    def _blank(self) -> int:
        self.at = _after(_BLANK, self.text, self.at)
        return self.at

    def _mark(self, keys: Keys, at: int) -> None:
        line = bisect_right(self.starts, at)
        self.found.setdefault(keys, (line, at - self.starts[line - 1] + 1))

    def _header(self) -> Keys:
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        parts, self.at = dotted_key(self.text, self.at + brackets)
        self.at += brackets
        keys: Keys = ()
        for place, (name, at) in enumerate(parts):
            keys = (*keys, name)
            self._mark(keys, at)
            if brackets == 2 and place == len(parts) - 1:
                self.entries[keys] = self.entries.get(keys, -1) + 1
            if keys in self.entries:
                keys = (*keys, self.entries[keys])
                self._mark(keys, at)
        return keys

    def _pair(self, table: Keys) -> None:
        parts, self.at = dotted_key(self.text, self.at)
        for name, at in parts:
            table = (*table, name)
            self._mark(table, at)
        self.at += 1  # the equals sign
        self._value(table)

    def _value(self, keys: Keys) -> None:
        self._blank()
        opening = self.text[self.at : self.at + 1]
        if opening in ("[", "{"):
            self.at += 1
            self._inside(keys, "]" if opening == "[" else "}")
        else:
            self.at = _after(_SCALAR, self.text, self.at)

    def _inside(self, keys: Keys, closing: str) -> None:
        """Entries of a list, or pairs of an inline table, up to the closing bracket."""
        entry = 0
        while self.text[self._blank()] != closing:
            if closing == "}":
                self._pair(keys)
            else:
                self._mark((*keys, entry), self.at)
                self._value((*keys, entry))
                entry += 1
            if self.text[self._blank()] == ",":
                self.at += 1
        self.at += 1
