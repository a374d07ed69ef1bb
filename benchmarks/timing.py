"""Time on a device, and what a part of ``benchmarks.gpu`` is given. Needs torch alone."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """Where the parts run, how large, and until when."""

    device: torch.device
    tiny: bool
    """Toy sizes, which go through the same code."""
    folder: Path
    """For what a part writes, such as a checkpoint; emptied by the part."""
    until: float = float("inf")
    """``time.monotonic()`` at which a part begins nothing more."""
    notes: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds that remain."""
        return self.until - time.monotonic()

    def late(self, what: str, seconds: float = 0.0) -> bool:
        """Whether fewer than so many seconds remain; then ``what`` is noted as left out."""
        if self.left > seconds:
            return False
        self.notes.append(f"no time for {what}")
        return True

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Work, rounds: int = 10, warm: int = 3) -> float:
        """Median time of a repetition after warming up; on a GPU by events, without waiting in between."""
        if self.tiny:
            rounds, warm = 2, 1
        for _ in range(warm):
            work()
        self.wait()
        if not self.cuda:
            return statistics.median(_clock(work) for _ in range(rounds))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        self.wait()
        return statistics.median(float(a.elapsed_time(b)) / 1e3 for a, b in itertools.pairwise(marks))

    def memory(self) -> float | None:
        """Most GiB that tensors took since ``forget``; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None

    def forget(self) -> None:
        """Give back what nobody holds, and start counting memory anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def _clock(work: Work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def attempt(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, or how it failed: a benchmark goes on."""
    try:
        return work()
    except Exception as error:  # whatever a driver or a compiler raises is a result here
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
