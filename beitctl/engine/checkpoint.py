"""Checkpoints of a run: written whole or not at all, verified before they are used, free of code.

A checkpoint is a folder ``step-00000500`` with one shard per rank (torch DCP, so that any number of ranks can
load it), DCP's index ``.metadata`` and ``manifest.json``. It is written as ``step-00000500.tmp`` and renamed
when every rank has its files on disk. What does not match its manifest is renamed ``step-00000500.corrupt``.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from beitctl.engine import dcp
from beitctl.engine.dist import Ranks
from beitctl.errors import BeitctlError, CapacityError, DataError, UserError

FORMAT = 1
MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""Error numbers that mean: no more space."""
ERRORS: dict[str, type[BeitctlError]] = {
    kind.__name__: kind for kind in (UserError, DataError, CapacityError, BeitctlError)
}

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A checkpoint that was verified."""

    step: int
    """Steps done."""
    path: Path
    meta: dict[str, Any]
    """What ``save`` was given."""


class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks, and fails on all or on none.

    ``keep`` newest are kept. ``warn`` hears of what is left aside, on rank 0.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, warn: Callable[[str], None]) -> None:
        self.folder, self.ranks, self.keep, self.warn = folder, ranks, max(1, keep), warn

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest; returns its folder. Earlier ones survive any failure.

        Raises:
            CapacityError: the disk is full, or will be.
            UserError: the folder cannot be written, or holds a checkpoint of this step or a later one.
        """
        path = self.folder / f"step-{step:08d}"
        draft = path.with_name(f"{path.name}.tmp")
        self._on_main(lambda: self._prepare(step, draft, tensors))
        try:
            shards = self._everywhere(lambda: self._write(draft, tensors))
            files = {name: entry for shard in shards for name, entry in shard.items()}
            self._on_main(lambda: self._commit(draft, path, step, meta, files))
        except BaseException:
            if self.ranks.main:
                shutil.rmtree(draft, ignore_errors=True)
            raise
        return path

    def newest(self) -> Found | None:
        """The newest checkpoint whose every file is as it was written; others are renamed ``.corrupt``.

        Raises:
            DataError: there are checkpoints, but none is whole.
        """
        found = self._on_main(self._scan)
        return Found(found["step"], Path(found["path"]), found["meta"]) if found else None

    def load(self, found: Found, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place; the number of ranks may differ from that of the run which saved them.

        Raises:
            UserError: names, shapes or dtypes are not those of the checkpoint.
            DataError: its index names code, or its files changed since they were verified.
        """
        indexes: list[Metadata] = []

        def check() -> None:
            indexes.append(dcp.index_of(found.path, tensors))

        self._everywhere(check)
        self._everywhere(lambda: dcp.read(found.path, indexes[0], tensors))

    def _everywhere(self, action: Callable[[], T]) -> list[T]:
        """What ``action`` returns on each rank, or on all ranks the first error that any rank met."""
        outcome: dict[str, Any] = {}
        try:
            outcome["value"] = action()
        except OSError as error:
            outcome |= _described(_translated(error, self.folder))
        except BeitctlError as error:
            outcome |= _described(error)
        outcomes = self.ranks.gather_objects(outcome)
        for rank, other in enumerate(outcomes):
            if "error" in other:
                where = f" (rank {rank})" if self.ranks.world > 1 else ""
                raise ERRORS[other["error"]](other["text"] + where)
        return [other["value"] for other in outcomes]

    def _on_main(self, action: Callable[[], T]) -> Any:
        """What ``action`` returns on rank 0, on every rank."""
        return self._everywhere(lambda: action() if self.ranks.main else None)[0]

    def _prepare(self, step: int, draft: Path, tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        later = [path.name for number, path in self._list() if number >= step]
        if later:
            raise UserError(
                f"{self.folder} already holds {dcp.some(later)}, so step {step} of another run cannot be "
                "saved there; resume that run, or use another --out"
            )
        for leftover in self.folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        needed = int(1.3 * sum(t.numel() * t.element_size() + 2048 for t in tensors.values()))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CapacityError(
                f"{self.folder}: a checkpoint needs {needed / 1e9:.2f} GB of free disk, there are "
                f"{free / 1e9:.2f} GB; make room, lower keep_checkpoints, or use another --out"
            )
        draft.mkdir()

    def _write(self, draft: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Write this rank's shard; returns size and hash of the files that it wrote."""
        dcp.write(draft, tensors)
        names = [path.name for path in draft.glob(f"__{self.ranks.rank}_*.distcp")]
        return {name: _entry(draft / name) for name in names + [dcp.INDEX] * self.ranks.main}

    def _commit(
        self, draft: Path, path: Path, step: int, meta: dict[str, Any], files: dict[str, dict[str, Any]]
    ) -> None:
        """Seal and rename the draft; from here on it counts."""
        absent = sorted(name for name in files if not (draft / name).is_file())
        if absent:
            raise UserError(
                f"{draft} lacks {dcp.some(absent)}, written by other ranks: the folder is not shared between "
                "the machines; use an --out that all of them see"
            )
        body = {
            "format": FORMAT, "step": step, "meta": meta, "world": self.ranks.world, "files": files,
            "torch": str(torch.__version__),
        }  # fmt: skip
        with (draft / MANIFEST).open("w", encoding="utf-8") as stream:
            stream.write(_sealed(body))
            stream.flush()
            os.fsync(stream.fileno())
        _sync(draft)
        draft.rename(path)
        _sync(self.folder)
        self._retire()

    def _retire(self) -> None:
        """Delete all but the newest; renamed first, so that half of one never looks like a whole one."""
        for _, path in self._list()[self.keep :]:
            try:
                shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp")))
            except OSError as error:
                self.warn(f"{path} is no longer needed but cannot be deleted: {error.strerror}")

    def _list(self) -> list[tuple[int, Path]]:
        """Step and folder of committed checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        matches = [(re.fullmatch(r"step-(\d{8,})", path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)

    def _scan(self) -> dict[str, Any] | None:
        for step, path in self._list():
            try:
                body = _verified(path, step)
            except DataError as error:
                self._set_aside(path, str(error))
            else:
                return {"step": body["step"], "path": str(path), "meta": body["meta"]}
        broken = [path.name for _, path in self._list()]
        broken += [path.name for path in self.folder.glob("step-*.corrupt")]
        if broken:
            raise DataError(
                f"{self.folder}: no checkpoint is whole, found {dcp.some(sorted(broken))}; restore one "
                "from a copy, or delete them to start anew"
            )
        return None

    def _set_aside(self, path: Path, reason: str) -> None:
        target = path.with_name(f"{path.name}.corrupt")
        try:
            if target.exists():
                shutil.rmtree(target)
            path.rename(target)
        except OSError as error:
            self.warn(f"{reason}; passed over (it cannot be renamed: {error.strerror})")
        else:
            self.warn(f"{reason}; renamed {target.name}")


def _verified(path: Path, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as the manifest says.

    Raises:
        DataError: it is not.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        body = json.loads(text)
        seal = body.pop("sha256")
        whole = _sealed(body) == text and body["step"] == step
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: {MANIFEST} cannot be read ({error!r})") from error
    if not whole:
        raise DataError(f"{path}: {MANIFEST} was changed: it is not that of step {step} with sha256 {seal}")
    if body["format"] != FORMAT:
        raise UserError(
            f"{path} has format {body['format']}, this beitctl reads {FORMAT}; install the one that wrote it"
        )
    with ThreadPoolExecutor(8) as pool:
        for problem in pool.map(lambda item: _difference(path / item[0], item[1]), body["files"].items()):
            if problem:
                raise DataError(problem)
    return dict(body)


def _difference(path: Path, expected: dict[str, Any]) -> str:
    """How a file differs from its entry in the manifest; empty if it does not."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path} has {size} bytes instead of {expected['bytes']}"
        whole = _entry(path) == expected
        return "" if whole else f"{path} was changed: its sha256 is not that of the manifest"
    except PermissionError:
        raise
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _sealed(body: Mapping[str, Any]) -> str:
    """A manifest as text, with the hash of all the rest in it."""
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": seal}, sort_keys=True, indent=1)


def _sync(folder: Path) -> None:
    """Make names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _translated(error: OSError, folder: Path) -> BeitctlError:
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return CapacityError(
            f"{folder}: no space left for a checkpoint ({reason}); make room, or use another --out"
        )
    return UserError(
        f"{error.filename or folder}: cannot be used for checkpoints ({reason}); make it readable and "
        "writable, or use another --out"
    )


def _described(error: BeitctlError) -> dict[str, str]:
    kind = next(name for name, known in ERRORS.items() if isinstance(error, known))
    return {"error": kind, "text": str(error)}
