"""Which of the large recipes fits the GPUs and the disk of a machine, by the figures of ``beitctl plan``."""

from collections.abc import Iterator

from beitctl import recipe
from beitctl.engine.measuring.gpus import GIB
from beitctl.examining.finding import Finding
from beitctl.planning.estimate import Asked, estimate
from beitctl.planning.memory import fixes, per_gpu
from beitctl.planning.work import work_of

RECIPES = ("beit3-base", "beit3-large", "beit3-giant")
"""From the smallest to the largest."""
CAPTION_TOKENS = 24


def fitting(gpus: int, memory: int, disk: int) -> Iterator[Finding]:
    """One finding for each large recipe.

    Args:
        gpus: number of GPUs.
        memory: bytes of the smallest of them.
        disk: free bytes where runs are kept.
    """
    for name in RECIPES:
        yield _fits(name, gpus, memory, disk)


def _fits(name: str, gpus: int, memory: int, disk: int) -> Finding:
    found = recipe.load(name, stage="pretrain")
    table = next(table for table in found.tables.values() if table.stage == "pretrain")
    work = work_of(found, table, CAPTION_TOKENS)
    needed = per_gpu(work, gpus, work.train.micro_samples).total()
    kept = estimate(found, work, Asked(gpus))["disk"]["checkpoints_at_most"]
    value = f"{needed / GIB:.0f} of {memory / GIB:.0f} GiB a GPU, checkpoints up to {kept / GIB:.0f} GiB"
    if needed > memory:
        way = next(fixes(work, gpus, memory), "larger GPUs")
        return Finding(f"recipe {name}", "note", f"does not fit as it is: {value}", f"it does with {way}")
    if kept > disk:
        fix = "set BEITCTL_RUNS to a larger disk, or lower train.keep_checkpoints"
        return Finding(f"recipe {name}", "note", f"{value}, but {disk / GIB:.0f} GiB are free", fix)
    return Finding(f"recipe {name}", "ok", f"fits: {value}")
