"""Files that another machine has just written: a network file system may show them late."""

import os
import time
from collections.abc import Iterable
from pathlib import Path

PATIENCE = 60.0
"""Seconds to wait for a file that another rank has written."""
PAUSE = 0.2
"""Seconds between two looks."""


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
