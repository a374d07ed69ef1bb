"""The plan of a training as one mapping with stable keys; what cannot be known is null, never guessed."""

from dataclasses import dataclass
from typing import Any

from beitctl.engine.measuring.gpus import CARDS, GIB, Gpu
from beitctl.planning.memory import FP32, MACHINE, SAVED, Memory, compute_bytes, fixes, per_gpu
from beitctl.planning.work import Work, examples
from beitctl.recipe import Recipe

PICTURES_PER_CORE = 550
"""Pictures a second that one core decodes and crops: ``python -m benchmarks.loader`` on the authors' machine
(JPEGs of 500 x 375, 224 pixels, 550.9 from a folder and 557.4 from tars)."""
CODE_BYTES = 2
"""Of one code in a token store, before compression."""
VIEW_BYTES = 32
"""Of the crop of one view, about."""
KEPT = {
    "eager": "blocks that are not compiled",
    "compiled": "compiled blocks (train.compile, on GPUs)",
    "recompute": "blocks that run again in the backward pass (train.recompute)",
}


@dataclass(frozen=True)
class Asked:
    """What the user asks about besides the recipe."""

    gpus: int = 1
    gpu: Gpu | None = None
    mfu: float = 0.4


def estimate(recipe: Recipe, work: Work, asked: Asked) -> dict[str, Any]:
    """Everything about one table."""
    memory = per_gpu(work, asked.gpus, work.train.micro_samples)
    flops, time = work.flops(), _time(work, asked)
    return {
        "recipe": recipe.name,
        "table": work.key,
        "gpus": asked.gpus,
        "gpu": _card(asked.gpu),
        "parameters": {name.replace(" ", "_"): count for name, count in work.sizes.parts.items()}
        | {"trainable": work.sizes.trainable},
        "step": _step(work, memory),
        "flops": {**flops.as_dict(), "per_gpu": flops.training / asked.gpus},
        "memory": _memory(work, memory, asked),
        "time": time,
        "disk": _disk(recipe, work),
        "loader": _loader(work, asked, time["step_seconds"]),
        "network": _network(work, memory, asked, time["step_seconds"]),
        "data": {part.name: _data(part, work.train.steps) for part in work.parts},
        "problems": _problems(work, memory, asked),
        "warnings": _warnings(work, asked),
        "fixes": list(fixes(work, asked.gpus, _limit(asked.gpu))) if asked.gpu else [],
        "assumptions": _assumptions(work, memory, asked),
    }


def _limit(gpu: Gpu) -> int:
    return int(CARDS[gpu].gib * GIB)


def _card(gpu: Gpu | None) -> dict[str, Any] | None:
    if gpu is None:
        return None
    card = CARDS[gpu]
    return {
        "name": gpu.value,
        "title": card.title,
        "tflops": card.tflops,
        "memory_bytes": _limit(gpu),
        "bandwidth_tb_per_second": card.bandwidth,
    }


def _step(work: Work, memory: Memory) -> dict[str, Any]:
    """Samples, rows and predictions of a step over all GPUs, and how one GPU takes them."""
    picture = work.model.picture_tokens
    objectives = {
        part.name: {
            "samples": part.samples,
            "pictures": part.pictures,
            "text_tokens": part.text_tokens,
            "rows": part.rows(picture),
            "predicted_patches": part.predicted("patch") if part.patches else 0,
            "predicted_tokens": part.predicted("text") if part.words else 0,
        }
        for part in work.parts
    }
    keys = ("samples", "pictures", "rows", "predicted_patches", "predicted_tokens")
    return {
        "objectives": objectives,
        **{key: sum(found[key] for found in objectives.values()) for key in keys},
        "steps": work.train.steps,
        "picture_tokens": picture,
        "micro_samples": memory.micro_samples,
        "passes": memory.passes,
    }


def _memory(work: Work, memory: Memory, asked: Asked) -> dict[str, Any]:
    limit = None if asked.gpu is None else _limit(asked.gpu)
    totals = {saved: memory.total(saved) for saved in SAVED}
    return {
        **memory.parts,
        "activations": dict(memory.activations),
        "total": totals,
        "judged_by": memory.judged_by,
        "shard": memory.shard,
        "copies": asked.gpus // memory.shard,
        "limit": limit,
        "fits": None if limit is None else memory.total() <= limit,
    }


def _time(work: Work, asked: Asked) -> dict[str, Any]:
    """Time at the assumed share of the bf16 peak; null without a known GPU, and in fp32."""
    if asked.gpu is None or compute_bytes(work.train.precision) == FP32:
        return dict.fromkeys(("step_seconds", "days", "gpu_days", "samples_per_second", "mfu"))
    seconds = work.flops().training / (asked.gpus * CARDS[asked.gpu].tflops * 1e12 * asked.mfu)
    days = seconds * work.train.steps / 86_400
    return {
        "step_seconds": seconds,
        "days": days,
        "gpu_days": days * asked.gpus,
        "samples_per_second": work.samples / seconds,
        "mfu": asked.mfu,
    }


def _disk(recipe: Recipe, work: Work) -> dict[str, Any]:
    """Bytes on disk; a new checkpoint is written before the oldest is deleted."""
    total, keep = work.sizes.parts["total"], work.train.keep_checkpoints
    one = FP32 * total + (3 if work.train.ema_decay else 2) * FP32 * work.sizes.trainable
    return {
        "checkpoint": one,
        "checkpoints": one * keep,
        "checkpoints_at_most": one * (keep + 1),
        "weights": FP32 * total,
        "token_store": _token_store(recipe, work),
    }


def _token_store(recipe: Recipe, work: Work) -> dict[str, Any] | None:
    """The token store that another table of the recipe writes; null if none does."""
    table = recipe.tables.get(work.tokens.removeprefix("@")) if work.tokens.startswith("@") else None
    plugin: Any = table.plugin if table else None
    if not hasattr(plugin, "views") or not hasattr(plugin, "sources"):
        return None
    counts = [examples(source) for source in plugin.sources]
    known = [count for count in counts if count is not None]
    each = plugin.views * (CODE_BYTES * work.model.patches + VIEW_BYTES)
    pictures = sum(known) if len(known) == len(counts) else None
    return {
        "pictures": pictures,
        "views": plugin.views,
        "bytes_per_picture": each,
        "bytes": None if pictures is None else pictures * each,
    }


def _loader(work: Work, asked: Asked, seconds: float | None) -> dict[str, Any]:
    """Pictures that must be decoded, and the cores for it."""
    pictures = sum(part.pictures for part in work.parts)
    rate = None if seconds is None else pictures / seconds
    return {
        "pictures_per_step": pictures,
        "pictures_per_second": rate,
        "pictures_per_second_per_gpu": None if rate is None else rate / asked.gpus,
        "pictures_per_core": PICTURES_PER_CORE,
        "cores_per_gpu": None if rate is None else rate / asked.gpus / PICTURES_PER_CORE,
    }


def _network(work: Work, memory: Memory, asked: Asked, seconds: float | None) -> dict[str, Any]:
    """Bytes that one GPU receives in a step.

    In every pass weights for forward and backward, and gradients, from its group; once a step its shard of
    the gradients from the other groups.
    """
    others = (memory.shard - 1) / memory.shard * memory.passes
    copies = asked.gpus // memory.shard
    gather = int(2 * compute_bytes(work.train.precision) * work.sizes.parts["total"] * others)
    scatter = int(FP32 * work.sizes.trainable * others)
    reduce = int(2 * FP32 * work.sizes.trainable / memory.shard * (copies - 1) / copies)
    together = gather + scatter + reduce
    return {
        "all_gather": gather,
        "reduce_scatter": scatter,
        "all_reduce": reduce,
        "total": together,
        "gigabytes_per_second": None if seconds is None else together / seconds / 1e9,
    }


def _data(part: Any, steps: int) -> dict[str, Any]:
    held = examples(part.source)
    seen = part.samples * steps
    return {"samples_seen": seen, "examples": held, "epochs": seen / held if held else None}


def _problems(work: Work, memory: Memory, asked: Asked) -> list[str]:
    """What would not run; memory first."""
    found = []
    if asked.gpu and memory.total() > _limit(asked.gpu):
        found.append(
            f"memory: {memory.total() / GIB:.1f} GiB a GPU, an {asked.gpu.value} has "
            f"{CARDS[asked.gpu].gib:.1f} GiB"
        )
    if asked.gpus % memory.shard:
        found.append(
            f"{asked.gpus} GPUs are no whole number of groups of {memory.shard}: set {work.key}.train."
            "shard_ranks to a divisor"
        )
    return found + [
        f"{part.name}: a contrastive task needs samples ({part.samples}) to be a multiple of the "
        f"{asked.gpus} GPUs, and micro_samples = 0"
        for part in work.parts
        if part.task.layout == "dual" and (part.samples % asked.gpus or work.train.micro_samples)
    ]


def _warnings(work: Work, asked: Asked) -> list[str]:
    """What runs, but wastes GPUs."""
    return [
        f"{part.name}: {part.samples} samples for {asked.gpus} GPUs leave some without; take fewer GPUs, or "
        "raise samples"
        for part in work.parts
        if part.samples < asked.gpus
    ]


def _assumptions(work: Work, memory: Memory, asked: Asked) -> list[str]:
    """Everything that the figures take for granted."""
    kind = "bf16" if compute_bytes(work.train.precision) == 2 else "fp32"
    said = [
        *work.assumptions,
        "flops: products of matrices alone, without padding, nothing computed twice; norms, softmax and "
        "relative positions are left out (under 1 %)",
        f"memory: {kind} compute, fp32 weights, gradients and moments, sharded over {memory.shard} GPUs; "
        "largest parts added up though they do not meet in time; 3 GiB for CUDA, NCCL and the allocator; not "
        "measured",
        f"memory: it fits or not by what {KEPT[memory.judged_by]} keep; compiled blocks: (8 d + 2 f) numbers "
        "a row and block, of which memory_budget keeps its share",
        "network: every pass gathers the weights twice and scatters fp32 gradients, in a group of GPUs with "
        "one copy; the groups add up their gradients once a step; what one GPU receives",
        f"loader: one core gives {PICTURES_PER_CORE} pictures/s (benchmarks.loader: JPEG 500 x 375, crops of "
        "224 pixels); larger pictures take more",
        f"token store: {CODE_BYTES} bytes a code and {VIEW_BYTES} a view, before compression",
    ]
    if work.frozen:
        said.append("flops and activations: frozen parameters are counted as if they were trained")
    if not work.train.shard_ranks and asked.gpus > MACHINE:
        said.append(f"machines have {MACHINE} GPUs each; train.shard_ranks says otherwise")
    if asked.gpu is None:
        said.append("no time, and not whether it fits: no known GPU; say --gpu " + "|".join(Gpu))
    elif kind == "fp32":
        said.append("no time: what GPUs reach is known for bf16, and this recipe computes in fp32")
    else:
        said.append(
            f"time: {asked.mfu:.0%} of the nominal {CARDS[asked.gpu].tflops:g} TFLOP/s (--mfu), whatever the "
            "network, the loader and small batches cost; not measured"
        )
    return said
