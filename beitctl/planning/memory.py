"""Memory of one GPU, in closed form, and which change of settings would make a training fit.

Letters: d width, f FFN width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from beitctl.config import ModelConfig
from beitctl.planning.gpus import GIB
from beitctl.planning.work import Work

Saved = Literal["eager", "compiled", "recompute"]
SAVED: tuple[Saved, ...] = ("eager", "compiled", "recompute")
"""What a forward pass keeps for the backward: what PyTorch keeps by itself; what Inductor keeps of a compiled
block; the input of every block alone, with full activation checkpointing."""
ENGINE: Saved = "eager"
"""What the engine does, by which a plan fits or not."""
SETTINGS: Mapping[Saved, str] = {}
"""Settings of the table with which the engine does the others; it has none so far."""
NAMES: Mapping[Saved, str] = {"compiled": "compiled blocks", "recompute": "full activation checkpointing"}
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
    micro_samples: int
    """Samples of the largest forward pass, over all objectives."""
    passes: int

    def total(self, saved: Saved = ENGINE) -> int:
        """Everything together."""
        return sum(self.parts.values()) + self.activations[saved]


def compute_bytes(precision: str) -> int:
    """Bytes of a number in the compute type; ``auto`` is bf16 on every GPU here."""
    return FP32 if precision == "fp32" else 2


def per_gpu(work: Work, gpus: int, micro_samples: int) -> Memory:
    """Memory of one GPU when FSDP2 shards the states over all of them."""
    passes, mine = work.share(gpus, micro_samples)
    sizes, number = work.sizes, compute_bytes(work.train.precision)
    total = sizes.parts["total"]
    gathered = sizes.root + 2 * sizes.block if gpus > 1 else total
    rows = [(each.plan.tokens, each.blocks) for each in mine.passes()]
    pixels = sum(each.plan.pictures for each in mine.passes() if each.embedded)
    pixels *= work.model.channels * work.model.size[0] * work.model.size[1]
    return Memory(
        parts={
            "master_weights": -(-FP32 * total // gpus),
            "moments": -(-2 * FP32 * sizes.trainable // gpus),
            "gradients": -(-FP32 * sizes.trainable // gpus),
            "gathered_weights": number * gathered,
            "gradient_buffers": (number + FP32) * sizes.block + number * sizes.root,
            "logits": (number + 3 * FP32) * mine.logits(),
            "pictures": (1 + FP32 + number) * pixels,
            "workspace": number * _workspace(mine),
            "reserve": RESERVE,
        },
        activations={
            saved: number * sum(_activations(work.model, tokens, blocks, saved) for tokens, blocks in rows)
            for saved in SAVED
        },
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


def _activations(model: ModelConfig, rows: int, blocks: int, saved: Saved) -> int:
    """Numbers that all blocks keep; with recompute also what one of them makes again."""
    again = saved_numbers(model, "eager") if saved == "recompute" else 0
    return rows * (blocks * saved_numbers(model, saved) + again)


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
    for saved, name in NAMES.items():
        if saved != ENGINE and now.total(saved) <= limit:
            size = f"{name}: {now.total(saved) / GIB:.1f} GiB"
            setting = SETTINGS.get(saved)
            yield (
                f"--set {work.key}.{setting}" if setting else f"{size} (the engine has no setting for it yet)"
            )


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
