"""Checkpoints of a run: written whole or not at all, verified before they are used, free of code.

A checkpoint is a folder ``step-00000500`` with one shard per rank (torch DCP, so that any number of ranks can
load it), DCP's index ``.metadata`` and ``manifest.json``. It is written as ``step-00000500.tmp`` and renamed
when every rank has its files on disk. What does not match its manifest is renamed ``step-00000500.corrupt``.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from beitctl.engine.agreement import Together
from beitctl.engine.dist import Ranks
from beitctl.engine.saving import dcp, files, manifest
from beitctl.engine.saving.pieces import Memory, Piece, pieces_of
from beitctl.engine.saving.retention import Kept
from beitctl.engine.saving.sums import HALF, added, own_sum
from beitctl.engine.saving.writing import Writing, check_order
from beitctl.errors import CapacityError, DataError, DivergedError, UserError

Done = Callable[[int, Path, float], None]
"""Called with the step, the folder and the seconds of a checkpoint that was written in the background."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that was verified."""

    step: int
    """Steps done."""
    path: Path
    meta: dict[str, Any]
    """What ``save`` was given."""


@dataclass(frozen=True)
class _Flight:
    """A save in the background."""

    step: int
    done: Done
    begun: float
    warnings: list[str] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run; every method is called by all ranks, and fails on all or on none.

    ``keep`` newest are kept, and of each period of ``keep_every_hours`` the first (0: none). ``warn`` hears
    on rank 0 of what is left aside and of saves in the background that failed.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, keep: int, warn: Callable[[str], None], *,
        keep_every_hours: float = 0.0,
    ) -> None:  # fmt: skip
        self.ranks = ranks
        self._kept = Kept(folder, max(1, keep), keep_every_hours)
        self._warn: Callable[[str], None] = warn if ranks.main else lambda text: None
        self._together = Together(ranks, folder)
        self._memory = Memory(ranks.device)
        self._worker = ThreadPoolExecutor(1, "checkpoint", _use_device, (ranks.device,))
        self._background: Ranks | None = None
        self._flight: tuple[_Flight, Future[tuple[Path, float]]] | None = None
        self._diverged: DivergedError | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest; returns its folder. Earlier ones survive any failure.

        A save in the background is waited for first.

        Raises:
            CapacityError: the disk is full, or will be, even after all but the last checkpoint were deleted.
            DivergedError: ranks hold different values of the same tensor.
            UserError: the folder cannot be written, or holds a checkpoint of this step or a later one.
        """
        self.settle(wait=True)
        return Writing(self.ranks, self._kept, self._warn).write(step, pieces_of(tensors, self.ranks), meta)

    def begin(self, step: int, tensors: Mapping[str, Tensor], meta: dict[str, Any], done: Done) -> None:
        """Copy tensors to host memory, and write them in the background; an earlier save is waited for.

        When this returns, the tensors may change. What then fails is a warning, and training goes on;
        ``settle`` calls ``done`` if nothing does.

        Raises:
            DivergedError: ranks held different values of the same tensor at the save before.
            UserError: the folder holds a checkpoint of this step or a later one.
        """
        self.settle(wait=True)
        flight = _Flight(step, done, time.monotonic())
        copies: list[Piece] = []

        def stage() -> None:
            if self.ranks.main:
                with contextlib.suppress(OSError):  # a folder that cannot be listed now may be when writing
                    check_order(self._kept, step)
            copies.extend(self._memory.copied(pieces_of(tensors, self.ranks)))

        try:
            self._together.everywhere(stage)
        except CapacityError as error:
            self._tell_failure(step, error)
            return
        if self._background is None:
            self._background = self.ranks.background()
        writing = Writing(self._background, self._kept, flight.warnings.append)

        def write() -> tuple[Path, float]:
            path = writing.write(step, copies, meta)
            return path, time.monotonic() - flight.begun

        self._flight = (flight, self._worker.submit(write))

    def settle(self, wait: bool = False) -> None:
        """Report a save in the background that has ended: ``done``, or a warning.

        Without ``wait`` ranks may report the same save at different steps, so no rank may do more than tell.

        Args:
            wait: whether to wait for one in flight.

        Raises:
            DivergedError: with ``wait``, if ranks held different values of the same tensor.
        """
        if self._flight and (wait or self._flight[1].done()):
            (flight, future), self._flight = self._flight, None
            self._report(flight, future)
        if wait and self._diverged:
            diverged, self._diverged = self._diverged, None
            raise diverged

    def newest(self) -> Found | None:
        """The newest checkpoint whose every file is as it was written; others are renamed ``.corrupt``.

        Rank 0 decides, and the others wait until their file system shows it.

        Raises:
            DataError: there are checkpoints, but none is whole.
            UserError: a rank does not see it.
        """
        self.settle(wait=True)
        found = self._together.on_main(self._scan)
        if found is None:
            return None
        path = Path(found["path"])
        self._together.everywhere(lambda: self._await(path, found["files"]))
        return Found(found["step"], path, found["meta"])

    def load(self, found: Found, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors in place; the number of ranks may differ from that of the run which saved them.

        Raises:
            UserError: names, shapes or dtypes are not those of the checkpoint.
            DataError: its index names code, its files changed since they were verified, or the tensors are
                not those that were saved.
        """
        indexes: list[Metadata] = []

        def check() -> None:
            indexes.append(dcp.index_of(found.path, tensors))

        self._together.everywhere(check)
        self._together.everywhere(lambda: dcp.read(found.path, indexes[0], tensors))
        pieces = pieces_of(tensors, self.ranks)
        own: list[int] = []
        self._together.everywhere(lambda: own.extend(own_sum(piece) for piece in pieces))
        totals = added(own, self.ranks)
        self._together.on_main(lambda: _compare(found, pieces, totals))

    def _report(self, flight: _Flight, future: "Future[tuple[Path, float]]") -> None:
        try:
            path, seconds = future.result()
        except Exception as error:  # whatever it was, training is not to end of it
            self._tell_failure(flight.step, error)
            self._diverged = error if isinstance(error, DivergedError) else None
        else:
            flight.done(flight.step, path, seconds)
        for text in flight.warnings:
            self._warn(text)

    def _tell_failure(self, step: int, error: Exception) -> None:
        then = "Training goes on; the last whole checkpoint is as it was, and saving is tried again"
        if isinstance(error, DivergedError):
            then = "The last whole checkpoint is as it was, and the run ends"
        self._warn(f"NO CHECKPOINT of step {step} was written: {error}. {then} when the next one is due")

    def _scan(self) -> dict[str, Any] | None:
        body = self._kept.newest(self._warn)
        if body is not None:
            path = self._kept.folder / f"step-{body['step']:08d}"
            names = sorted([*body["files"], manifest.MANIFEST])
            return {"step": body["step"], "path": str(path), "meta": body["meta"], "files": names}
        broken = [path.name for _, path in self._kept.list()]
        broken += [path.name for path in self._kept.folder.glob("step-*.corrupt")]
        if broken:
            raise DataError(
                f"{self._kept.folder}: no checkpoint is whole, found {dcp.some(sorted(broken))}; restore one "
                "from a copy, or delete them to start anew"
            )
        return None

    def _await(self, path: Path, names: Sequence[str]) -> None:
        absent = files.absent(path, names)
        if absent:
            raise UserError(
                f"rank {self.ranks.rank} on {socket.gethostname()} does not see {dcp.some(absent)} in {path} "
                f"after {files.PATIENCE:.0f} s, but rank 0 does; use an --out that all machines share"
            )


def _compare(found: Found, pieces: Sequence[Piece], totals: Sequence[int]) -> None:
    """Compare what was loaded, all replicas added up, with the checksums of the manifest."""
    sums = manifest.read(found.path, found.step).get("sums")
    if sums is None:
        return  # written before checkpoints had them
    wrong = [
        piece.name
        for piece, total in zip(pieces, totals, strict=True)
        if sums[piece.name] * len(piece.holders) % HALF**2 != total
    ]
    if wrong:
        raise DataError(
            f"{found.path}: after loading, {dcp.some(wrong)} differ from what was saved, though the files "
            "are as they were written; run the command again, and if it stays so, rename the folder to "
            f"{found.path.name}.corrupt to go on from the checkpoint before it"
        )


def _use_device(device: torch.device) -> None:
    """Bind a new thread to the GPU of this rank; CUDA would take the first one otherwise."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
