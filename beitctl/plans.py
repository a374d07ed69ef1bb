"""What ``--dry-run`` prints: plans, which are nested mappings."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show(plans: Mapping[str, Mapping[str, Any]], *, as_json: bool) -> None:
    """Print plans by name on stdout: one JSON object, a table each on a terminal, else indented lines."""
    if as_json:
        sys.stdout.write(json.dumps(plans) + "\n")
    elif sys.stdout.isatty():
        for name, plan in plans.items():
            Console().print(_table(name, plan))
    else:
        sys.stdout.write("".join(f"{line}\n" for line in lines(plans)))


def lines(value: Mapping[str, Any], depth: int = 0) -> list[str]:
    """``key: value`` each, what is nested under its key and indented."""
    found = []
    for key, item in value.items():
        nested = isinstance(item, Mapping)
        found.append(f"{'  ' * depth}{key}:" + ("" if nested else f" {_plain(item)}"))
        found += lines(item, depth + 1) if nested else []
    return found


def _table(name: str, plan: Mapping[str, Any]) -> Table:
    table = Table(title=name, title_justify="left", show_header=False)
    for line in lines(plan):
        key, _, value = line.partition(":")
        table.add_row(Text(key), Text(value.strip()))
    return table


def _plain(value: Any) -> str:
    """A value for people: whole numbers in groups of three digits, other numbers with four digits."""
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
