"""Which checkpoints a folder holds and which are kept. Only one rank calls this."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beitctl.engine.saving import manifest
from beitctl.errors import DataError


@dataclass(frozen=True)
class Kept:
    """The committed checkpoints of a folder; drafts (``.tmp``) and ``.corrupt`` ones never count."""

    folder: Path
    keep: int
    """Newest checkpoints that stay."""
    every_hours: float
    """Of each period of so many hours, the first checkpoint stays too; 0: none does."""

    def list(self) -> list[tuple[int, Path]]:
        """Step and folder of every checkpoint, newest first."""
        if not self.folder.is_dir():
            return []
        matches = [(re.fullmatch(r"step-(\d{8,})", path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The manifest of the newest whole checkpoint; newer ones that are not are renamed ``.corrupt``."""
        for step, path in self.list():
            try:
                return manifest.verified(path, step)
            except DataError as error:
                _set_aside(path, str(error), warn)
        return None

    def retire(self, warn: Callable[[str], None]) -> None:
        """Delete what is not kept; if it cannot be told, nothing."""
        try:
            found = self.list()
            firsts = self._firsts(found)
        except OSError as error:
            warn(f"{self.folder}: old checkpoints stay until the next save ({error})")
        else:
            _delete([path for _, path in found[self.keep :] if path not in firsts], warn)

    def make_room(self, warn: Callable[[str], None]) -> None:
        """Delete all but the newest whole checkpoint; nothing if there is none."""
        whole = self.newest(warn)
        if whole is None:
            return
        rest = [path for step, path in self.list() if step < whole["step"]]
        if rest:
            warn(
                f"{self.folder}: the disk is full; {', '.join(path.name for path in rest)} deleted to make "
                f"room, the last whole checkpoint is that of step {whole['step']}"
            )
        _delete(rest, warn)

    def _firsts(self, found: Sequence[tuple[int, Path]]) -> set[Path]:
        """The first checkpoint of every period."""
        if not self.every_hours:
            return set()
        firsts: dict[float, Path] = {}
        for _, path in reversed(found):
            time = _time(path)
            if time is not None:
                firsts.setdefault(time // (3600 * self.every_hours), path)
        return set(firsts.values())


def _time(path: Path) -> float | None:
    """When a checkpoint was saved, in seconds since 1970, by its manifest; None: it does not say."""
    try:
        return float(json.loads((path / manifest.MANIFEST).read_text(encoding="utf-8"))["time"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _delete(paths: Sequence[Path], warn: Callable[[str], None]) -> None:
    """Delete checkpoints; renamed first, so that half of one never looks like a whole one."""
    for path in paths:
        try:
            shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp")))
        except OSError as error:
            warn(f"{path} is no longer needed but cannot be deleted: {error.strerror}")


def _set_aside(path: Path, reason: str, warn: Callable[[str], None]) -> None:
    target = path.with_name(f"{path.name}.corrupt")
    try:
        if target.exists():
            shutil.rmtree(target)
        path.rename(target)
    except OSError as error:
        warn(f"{reason}; passed over (it cannot be renamed: {error.strerror})")
    else:
        warn(f"{reason}; renamed {target.name}")
