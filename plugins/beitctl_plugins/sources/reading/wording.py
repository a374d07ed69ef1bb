"""What messages about tables have in common."""

from collections.abc import Iterable, Mapping
from itertools import islice

from beitctl.report.naming import printable

SHOWN_NAMES = 20
"""Columns that a message lists."""
LONGEST = 300
"""Characters of a name in a message."""


def listed(names: Iterable[object]) -> str:
    """Names of columns, the first ones only; ``nothing`` where there are none."""
    names = iter(names)
    first = [printable(str(name), 60) for name in islice(names, SHOWN_NAMES)]
    more = sum(1 for _ in names)
    return (", ".join(first) or "nothing") + (f" and {more:,} more" if more else "")


def no_row(where: Mapping[str, str]) -> str:
    """That nothing is left of a table."""
    wanted = ", ".join(f"{key} = {value!r}" for key, value in where.items())
    return f"no row{' with ' if wanted else ''}{wanted}; correct 'path' or 'where'"
