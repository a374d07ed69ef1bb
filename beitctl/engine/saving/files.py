"""Files of a run folder: those that other machines have just written, and lists that grow."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Seconds to wait for a file that another rank has written."""
PAUSE = 0.2
"""Seconds between two looks."""


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add JSON lines to a list; a disk that is full is told on stderr and ends no run."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        os.write(2, f"warning: {path} is incomplete: {error.strerror or error}\n".encode())


def absent(folder: Path, names: Iterable[str]) -> list[str]:
    """Names that a folder still lacks after ``PATIENCE`` seconds, sorted.

    Folders are listed anew at every look: what NFS remembers about a single name may be old.
    """
    limit = time.monotonic() + PATIENCE
    while missing := sorted(set(names) - _listed(folder)):
        if time.monotonic() > limit:
            return missing
        time.sleep(PAUSE)
    return []


def _listed(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder)) if folder.name in os.listdir(folder.parent) else set()
    except FileNotFoundError:
        return set()
