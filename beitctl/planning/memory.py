"""Memory of one GPU, in closed form, and which change of settings would make a training fit.

Letters: d width, f FFN width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from beitctl.config import ModelConfig, TrainConfig
from beitctl.engine.measuring.gpus import GIB
from beitctl.planning.work import Work

Saved = Literal["eager", "compiled", "recompute"]
SAVED: tuple[Saved, ...] = ("eager", "compiled", "recompute")
"""What a forward pass keeps for the backward: what PyTorch keeps by itself; what Inductor keeps of a compiled
block; the input of every block alone, with full activation checkpointing."""
MACHINE = 8
"""GPUs of a machine, where a plan must assume it."""
BUDGETS = (0.75, 0.5, 0.25, 0.1)
"""Values of ``memory_budget`` that are tried, the cheapest first."""
RESERVE = 3 * GIB
"""CUDA context, libraries, NCCL buffers and holes in the allocator's memory: assumed, not measured."""
FP32 = 4
MOST_GPUS = 8192


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment; parts that do not meet in time are added all the same."""

    parts: Mapping[str, int]
    """Without activations."""
    activations: Mapping[Saved, int]
    judged_by: Saved
    """What the settings make the engine keep, by which a plan fits or not."""
    shard: int
    """GPUs that share one copy of weights, gradients and optimizer state."""
    micro_samples: int
    """Samples of the largest forward pass, over all objectives."""
    passes: int

    def total(self, saved: Saved | None = None) -> int:
        """Everything together, by default as the settings say."""
        return sum(self.parts.values()) + self.activations[saved or self.judged_by]


def judged(train: TrainConfig) -> Saved:
    """What a forward pass keeps on a GPU with these settings."""
    if train.recompute:
        return "recompute"
    return "eager" if train.compile == "off" else "compiled"


def shard_of(train: TrainConfig, gpus: int) -> int:
    """GPUs that share one copy of the states: ``shard_ranks``, or those of one machine."""
    return min(train.shard_ranks or MACHINE, gpus)


def compute_bytes(precision: str) -> int:
    """Bytes of a number in the compute type; ``auto`` is bf16 on every GPU here."""
    return FP32 if precision == "fp32" else 2


def per_gpu(work: Work, gpus: int, micro_samples: int) -> Memory:
    """Memory of one GPU when FSDP2 shards the states over a group of GPUs, and groups hold copies."""
    passes, mine = work.share(gpus, micro_samples)
    sizes, number = work.sizes, compute_bytes(work.train.precision)
    total, shard = sizes.parts["total"], shard_of(work.train, gpus)
    gathered = sizes.root + 2 * sizes.block if shard > 1 else total
    rows = [(each.plan.tokens, each.blocks) for each in mine.passes()]
    pixels = sum(each.plan.pictures for each in mine.passes() if each.embedded)
    pixels *= work.model.channels * work.model.size[0] * work.model.size[1]
    return Memory(
        parts={
            "master_weights": -(-FP32 * total // shard),
            "moments": -(-2 * FP32 * sizes.trainable // shard),
            "gradients": -(-FP32 * sizes.trainable // shard),
            "average": -(-FP32 * sizes.trainable // shard) if work.train.ema_decay else 0,
            "gathered_weights": number * gathered,
            "gradient_buffers": (number + FP32) * sizes.block + number * sizes.root,
            "logits": (number + 3 * FP32) * mine.logits(),
            "pictures": (1 + FP32 + number) * pixels,
            "workspace": number * _workspace(mine),
            "reserve": RESERVE,
        },
        activations={
            saved: int(number * sum(_activations(work, tokens, blocks, saved) for tokens, blocks in rows))
            for saved in SAVED
        },
        judged_by=judged(work.train),
        shard=shard,
        micro_samples=mine.samples,
        passes=passes,
    )


def saved_numbers(model: ModelConfig, saved: Saved) -> int:
    """Numbers that one block keeps of one row.

    Eager: input and normed input of both branches (4 d), queries, keys and values (3 d), context (2 d: of all
    slots, and in rows), fc1 and GELU outputs (2 f), with sub-LN what the two inner norms give (d + f), with
    LayerScale the two branches (2 d). Compiled: (8 d + 2 f), as estimated in engine.md, section 2.4.
    """
    d, f = model.width, model.ffn
    if saved == "recompute":
        return d
    if saved == "compiled":
        return 8 * d + 2 * f
    return 9 * d + 2 * f + (d + f if model.norm == "sub" else 0) + (2 * d if model.layer_scale else 0)


def _activations(work: Work, rows: int, blocks: int, saved: Saved) -> float:
    """Numbers that all blocks keep; with recompute also what one of them makes again.

    Of a compiled block ``memory_budget`` keeps a share of what is not its input.
    """
    model, kept = work.model, float(saved_numbers(work.model, saved))
    if saved == "compiled":
        kept = model.width + work.train.memory_budget * (kept - model.width)
    again = saved_numbers(model, "eager") if saved == "recompute" else 0
    return rows * (blocks * kept + again)


def _workspace(mine: Work) -> int:
    """Numbers that live only inside a block: three of its widest tensors, and biases of attention."""
    model, plans = mine.model, [each.plan for each in mine.passes()]
    rows = max(plan.tokens for plan in plans)
    found = 3 * rows * max(model.ffn, 3 * model.width)
    if model.position != "absolute":  # the bias of every sequence, and its gradient
        found += 2 * model.heads * max(sum(int(n) ** 2 for n in plan.lengths) for plan in plans)
    return found


def fixes(work: Work, gpus: int, limit: int) -> Iterator[str]:
    """Changes of settings each of which makes a training fit that does not."""
    micro = work.train.micro_samples
    now = per_gpu(work, gpus, micro)
    if now.total() <= limit:
        return
    if all(part.task.layout != "dual" for part in work.parts):  # contrast compares all samples of one pass
        fitting = _fitting(work, gpus, limit, now.passes)
        if fitting:
            yield f"--set {work.key}.train.micro_samples={fitting}"
    more = gpus * 2
    while more <= min(MOST_GPUS, work.samples) and per_gpu(work, more, micro).total() > limit:
        more *= 2
    if more <= min(MOST_GPUS, work.samples):
        yield f"--gpus {more}"
    said: set[str] = set()
    for settings in _settings(work.train, gpus):
        changed = replace(work, train=replace(work.train, **settings))
        first = next(iter(settings))
        if first not in said and per_gpu(changed, gpus, micro).total() <= limit:
            said.add(first)
            yield " ".join(f"--set {work.key}.train.{key}={_toml(value)}" for key, value in settings.items())


def _settings(train: TrainConfig, gpus: int) -> Iterator[Mapping[str, Any]]:
    """Settings of the training loop that take less memory than those of ``train``."""
    if train.compile == "off":
        yield {"compile": "auto"}
    elif not train.recompute:
        yield from ({"memory_budget": share} for share in BUDGETS if share < train.memory_budget)
    if not train.recompute:
        yield {"recompute": True} | ({"memory_budget": 1.0} if train.memory_budget < 1 else {})
    if shard_of(train, gpus) < gpus:
        yield {"shard_ranks": gpus}


def _toml(value: Any) -> str:
    return str(value).lower()


def _fitting(work: Work, gpus: int, limit: int, passes: int) -> int:
    """``micro_samples`` with which it fits when the passes are doubled until then; 0 if it never does."""
    mine = -(-work.samples // gpus)
    micro = mine
    while micro > 1:
        passes *= 2
        micro = -(-mine // passes)
        if per_gpu(work, gpus, micro).total() <= limit:
            return micro
    return 0
