"""Worker processes that load the batches of steps ahead of training, and what happens when one dies.

A step's batches follow from its number alone, so a dead worker costs time and nothing else: loading goes on
at the first step that has not been handed out.
"""

import multiprocessing
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from beitctl.errors import BeitctlError, DataError

DEATHS = 3
"""Deaths of workers at the same sample after which loading ends."""
STUCK = 10
"""Deaths of workers before the same step, at whatever samples, after which loading ends."""
AHEAD = 2
"""Steps that each worker loads ahead."""
_NOTE_BYTES = 1024
_DIED = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)", re.DOTALL)

_note: Any = None
"""In a worker process: shared memory in which it says what it is at work on."""


def working_on(what: str) -> None:
    """Say what this process loads, so that it can be named if the process dies of it."""
    if _note is not None:
        _note.value = f"{os.getpid()} {what}".encode(errors="replace")[: _NOTE_BYTES - 1]


def steps(
    data: Dataset[Any], start: int, stop: int, workers: int, started: Callable[[int], None],
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[Any]:  # fmt: skip
    """``data[step]`` for the steps ``start`` .. ``stop - 1`` in order, loaded ahead by ``workers`` if any.

    Args:
        data: gives the batches of a step by its number.
        start: first step.
        stop: end of the steps.
        workers: processes; 0 loads in this one.
        started: called in every worker process with its number.
        warn: called when a worker died and was replaced.

    Raises:
        DataError: workers died of the same sample, or without getting anywhere, too often.
    """
    deaths: Counter[str] = Counter()
    while start < stop:
        notes = [multiprocessing.RawArray("c", _NOTE_BYTES) for _ in range(workers)]
        try:
            for batches in _loader(data, start, stop, notes, started):
                if isinstance(batches, _Failure):
                    raise batches.error
                start += 1
                yield batches
        except RuntimeError as error:
            if not workers or not _DIED.search(str(error)):
                raise
            found = _at_work(str(error), notes)
            deaths.update([*found, f"before step {start}"])
            _judge(str(error), found, deaths, start)
            warn(
                f"a data-loading process died at step {start} or soon after ({_reason(str(error))}) while it "
                f"loaded {', '.join(found) or 'nothing known'}; all were started again there"
            )


@dataclass(frozen=True)
class _Failure:
    """An error of ours that a worker met: the DataLoader would bury it in a traceback."""

    error: BeitctlError


class _Told(Dataset[Any]):
    """Data whose errors come as values."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __getitem__(self, step: int) -> Any:
        try:
            return self.data[step]
        except BeitctlError as error:
            return _Failure(type(error)(str(error)))
        finally:
            working_on("")


@dataclass(frozen=True)
class _Start:
    """Begins a worker process."""

    notes: Sequence[Any]
    started: Callable[[int], None]

    def __call__(self, worker: int) -> None:
        global _note
        _note = self.notes[worker]
        assert get_worker_info() is not None
        working_on("")
        self.started(worker)


def _loader(
    data: Dataset[Any], start: int, stop: int, notes: Sequence[Any], started: Callable[[int], None]
) -> Iterator[Any]:
    loader = DataLoader(
        _Told(data),
        sampler=range(start, stop),
        batch_size=None,
        num_workers=len(notes),
        collate_fn=_same,
        worker_init_fn=_Start(notes, started),
        prefetch_factor=AHEAD if notes else None,
        pin_memory=torch.cuda.is_available(),
    )
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if signal.getsignal(signal.SIGCHLD) is not before:
        # torch's handler raises wherever this process happens to be, in the middle of a training step; the
        # iterator finds a dead worker by itself while it waits for it
        signal.signal(signal.SIGCHLD, before)
    yield from iterator


def _same(batches: Any) -> Any:
    return batches


def _at_work(message: str, notes: Sequence[Any]) -> list[str]:
    """What the dead workers were loading; of all workers where it is not known which died."""
    listed = re.search(r"pid(?:\(s\))? ([\d, ]+)", message)
    dead = set(re.findall(r"\d+", listed[1])) if listed else set()
    found = []
    for note in notes:
        pid, _, what = note.value.decode(errors="replace").partition(" ")
        if what and (pid in dead or not dead):
            found.append(what)
    return found


def _judge(message: str, found: Sequence[str], deaths: Counter[str], start: int) -> None:
    """Give up if workers die of the same thing again and again."""
    again = [what for what in found if deaths[what] >= DEATHS]
    if again:
        raise DataError(
            f"data-loading processes died {DEATHS} times while they loaded {', '.join(again)} "
            f"({_reason(message)}); remove or replace it"
        )
    if deaths[f"before step {start}"] >= STUCK:
        raise DataError(
            f"data-loading processes died {STUCK} times before step {start} ({_reason(message)}), "
            f"last while they loaded {', '.join(found) or 'nothing known'}; if memory is short, lower "
            "train.workers"
        )


def _reason(message: str) -> str:
    """What the DataLoader says of a death, in few words."""
    killed = re.search(r"killed by signal: ([^.]*)", message)
    return f"killed: {killed[1].strip()}" if killed else "ended, perhaps killed for want of memory"
