"""Writing one checkpoint, by all ranks together, in the thread of the training or beside it."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from beitctl.engine.agreement import Together
from beitctl.engine.dist import Ranks
from beitctl.engine.saving import dcp, files, manifest
from beitctl.engine.saving.pieces import Piece
from beitctl.engine.saving.retention import Kept
from beitctl.engine.saving.sums import Hashes, added, check_replicas, hashes_of, own_sum
from beitctl.errors import CapacityError, UserError


@dataclass(frozen=True)
class Writing:
    """How checkpoints are written."""

    ranks: Ranks
    """All ranks, over a process group that no other thread uses meanwhile."""
    kept: Kept
    warn: Callable[[str], None]
    """Hears on rank 0 what could not be deleted or had to be."""

    def write(self, step: int, pieces: Sequence[Piece], meta: dict[str, Any]) -> Path:
        """Write the checkpoint of a step, or leave no trace; returns its folder. All ranks call it.

        If there is no space, all but the newest whole checkpoint are deleted and it is tried once more.

        Raises:
            CapacityError: the disk is full, or will be.
            DivergedError: ranks hold different values of the same tensor.
            UserError: the folder cannot be written, or holds a checkpoint of this step or a later one.
        """
        try:
            return self._attempt(step, pieces, meta)
        except CapacityError:
            self._together.on_main(lambda: self.kept.make_room(self.warn))
            return self._attempt(step, pieces, meta)

    @property
    def _together(self) -> Together:
        return Together(self.ranks, self.kept.folder)

    def _attempt(self, step: int, pieces: Sequence[Piece], meta: dict[str, Any]) -> Path:
        path = self.kept.folder / f"step-{step:08d}"
        draft = path.with_name(f"{path.name}.tmp")
        self._together.on_main(lambda: self._prepare(step, draft, pieces))
        try:
            sums = self._sums(pieces)
            shards = self._together.everywhere(lambda: self._write_shard(draft, pieces))
            body = {
                "step": step, "meta": meta, "world": self.ranks.world, "torch": str(torch.__version__),
                "time": time.time(), "sums": sums,
                "files": {name: entry for shard in shards for name, entry in shard.items()},
            }  # fmt: skip
            self._together.on_main(lambda: self._commit(draft, path, body))
        except BaseException:
            if self.ranks.main:
                shutil.rmtree(draft, ignore_errors=True)
            raise
        return path

    def _prepare(self, step: int, draft: Path, pieces: Sequence[Piece]) -> None:
        folder = self.kept.folder
        folder.mkdir(parents=True, exist_ok=True)
        check_order(self.kept, step)
        for leftover in folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        sizes = [piece.shape.numel() * piece.local.element_size() for piece in pieces]
        needed = int(1.3 * sum(size + 2048 for size in sizes))
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CapacityError(
                f"{folder}: a checkpoint needs {needed / 1e9:.2f} GB of free disk, there are "
                f"{free / 1e9:.2f} GB; make room, lower keep_checkpoints, or use another --out"
            )
        draft.mkdir()

    def _sums(self, pieces: Sequence[Piece]) -> dict[str, int]:
        """Checksum of every tensor by its name, after a look whether replicas are equal."""
        own: dict[str, int] = {}
        hashes: Hashes = {}

        def compute() -> None:
            hashes.update(hashes_of(pieces))
            for piece in pieces:
                own[piece.name] = own_sum(piece) if piece.holders[0] == self.ranks.rank else 0

        self._together.everywhere(compute)
        check_replicas(hashes, self.ranks)
        return dict(zip(own, added(list(own.values()), self.ranks), strict=True))

    def _write_shard(self, draft: Path, pieces: Sequence[Piece]) -> dict[str, dict[str, Any]]:
        """Write this rank's shard; returns size and hash of the files that it wrote."""
        dcp.write(draft, pieces, self.ranks.group)
        names = [path.name for path in draft.glob(f"__{self.ranks.rank}_*.distcp")]
        return {name: manifest.entry(draft / name) for name in names + [dcp.INDEX] * self.ranks.main}

    def _commit(self, draft: Path, path: Path, body: dict[str, Any]) -> None:
        """Seal and rename the draft; from here on it counts."""
        absent = files.absent(draft, body["files"])
        if absent:
            raise UserError(
                f"{draft} lacks {dcp.some(absent)}, written by other ranks: the folder is not shared between "
                "the machines; use an --out that all of them see"
            )
        manifest.write(draft, body)
        draft.rename(path)
        try:
            manifest.sync(self.kept.folder)
        except OSError as error:  # it is whole and in its place; only a power cut could still take it
            self.warn(f"{path} is written, but {self.kept.folder} cannot be synchronised: {error.strerror}")
        self.kept.retire(self.warn)


def check_order(kept: Kept, step: int) -> None:
    """Refuse to save a step where a checkpoint of it or of a later one is.

    Raises:
        UserError: there is one.
    """
    later = [path.name for number, path in kept.list() if number >= step]
    if later:
        raise UserError(
            f"{kept.folder} already holds {dcp.some(later)}, so step {step} of another run cannot be "
            "saved there; resume that run, or use another --out"
        )
