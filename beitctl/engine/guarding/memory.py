"""What a step that does not fit into memory is explained with."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from beitctl.config import TrainConfig
from beitctl.engine.session import Session
from beitctl.errors import CapacityError

GIB = 2**30


@contextlib.contextmanager
def explained(step: int, micro: Sequence[Any], config: TrainConfig, session: Session) -> Iterator[None]:
    """Say what to change when a step, counted from 1, does not fit; it is not tried again.

    On CUDA a memory snapshot is written to the run folder if one is recorded.

    Raises:
        CapacityError: memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        device, rank = session.ranks.device, session.ranks.rank
        snapshot = _snapshot(session.folder / f"memory-rank-{rank}.pickle", device)
        plan = f"{hint}. " if (hint := session.memory_hint()) else ""
        raise CapacityError(
            f"step {step}: rank {rank} ran out of memory on {device} ({_use(device)}) with {_size(micro)}. "
            f"{plan}To make it fit: {_settings(config)}{snapshot}"
        ) from error


def _size(micro: Sequence[Any]) -> str:
    plans = [plan for batch in micro if (plan := getattr(batch, "plan", None)) is not None]
    tokens = f" and {sum(plan.tokens for plan in plans):,} tokens" if plans else ""
    samples = sum(len(batch.samples) for batch in micro)
    return f"{samples:,} samples{tokens} in {len(micro)} passes"


def _settings(config: TrainConfig) -> str:
    return (
        f"lower micro_samples ({config.micro_samples or 'no limit'}), lower memory_budget "
        f"({config.memory_budget:g}; for compiled blocks), set recompute ({str(config.recompute).lower()}), "
        f"or raise shard_ranks ({config.shard_ranks or 'the ranks of one machine'})"
    )


def _use(device: torch.device) -> str:
    if device.type != "cuda":
        return "host memory"
    free, total = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_allocated(device)
    return f"{mine / GIB:.1f} GiB allocated by this process, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _snapshot(path: Path, device: torch.device) -> str:
    """Write what the allocator recorded, if it did; says where it is."""
    if device.type != "cuda" or not torch._C._cuda_isHistoryEnabled():
        return ""
    with contextlib.suppress(OSError, RuntimeError):
        torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
        return f". {path} is a memory snapshot (https://pytorch.org/memory_viz reads it)"
    return ""
