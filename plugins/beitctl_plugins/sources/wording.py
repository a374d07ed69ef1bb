"""Names from broken files in messages: on one line, printable, and never longer than somebody reads."""

from collections.abc import Iterable, Mapping
from itertools import islice

SHOWN_NAMES = 20
"""Columns that a message lists."""
SHOWN_CHARACTERS = 300
"""Of one name."""


def cut(name: str, characters: int = SHOWN_CHARACTERS) -> str:
    """A name for a message: what is not printable as in Python, and without the middle if it is long.

    Args:
        name: as it came out of a file; it may hold half characters and line breaks.
        characters: most that are kept.
    """
    if len(name) > characters:
        name = f"{name[: characters // 2]}...{name[-characters // 2 :]}"
    shown = name.encode(errors="backslashreplace").decode()
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in shown)


def listed(names: Iterable[object]) -> str:
    """Names of columns, the first ones only; ``nothing`` where there are none."""
    names = iter(names)
    first = [cut(str(name), 60) for name in islice(names, SHOWN_NAMES)]
    more = sum(1 for _ in names)
    return (", ".join(first) or "nothing") + (f" and {more:,} more" if more else "")


def no_row(where: Mapping[str, str]) -> str:
    """That nothing is left of a table."""
    wanted = ", ".join(f"{key} = {value!r}" for key, value in where.items())
    return f"no row{' with ' if wanted else ''}{wanted}; correct 'path' or 'where'"
