"""Parts of ``benchmarks.gpu`` that train: full steps, the official step, checkpoints, the image tokenizer."""

import contextlib
import functools
import importlib
import math
import shutil
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from beitctl.config import ModelConfig, TrainConfig
from beitctl.data.batch import Batch
from beitctl.engine import dist, optim
from beitctl.engine.compiling import rows_multiple
from beitctl.engine.learner import HALF, normalise
from beitctl.engine.loop import train
from beitctl.engine.measuring.meter import nominal
from beitctl.engine.saving.checkpoint import Checkpoints
from beitctl.engine.session import Session
from beitctl.engine.shard import compute_dtype, fill
from beitctl.errors import CapacityError
from beitctl.model.codebook import Codebook
from beitctl.model.vqkd import VQKDModel
from benchmarks import mixed
from benchmarks.gpu_kernels import config_of
from benchmarks.timing import Bench, attempt

TRIPLES = {"base": (512, 256, 128), "large": (192, 128, 64), "giant": (96, 64, 32), "tiny": (2,)}
"""Pictures, texts and pairs of a micro-batch, so many of each, tried from the largest."""
STEPS, WARM = 12, 4
"""Steps of the loop that are taken, and those of them that warm up."""
POOL = 2**22
TOKENIZER_PICTURES = 256


def quick(name: str, shape: torch.Size) -> Tensor:
    """Weights in no time: a small pool of normal numbers over and over; one-dimensional ones are 1 or 0."""
    if len(shape) < 2:
        return torch.full(shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)) * 0.02
    count = math.prod(shape)
    return pool.repeat(-(-count // POOL))[:count].view(shape)


class Same:
    """Data of a run: the same batch in every step."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> list[Batch]:
        return [self.batch]


def batch_of(bench: Bench, config: ModelConfig, triples: int) -> Batch:
    """The usual mix, in pinned memory on a machine with a GPU."""
    mix = mixed.mix_of(triples, mixed.CAPTION_TOKENS, mixed.PROSE_TOKENS)
    multiple = rows_multiple(mixed.settings(), bench.device)
    batch = mixed.batch_of(mix, config, multiple=multiple)
    return batch.pin_memory() if bench.cuda else batch


def steps(bench: Bench, size: str, ceiling: float | None) -> dict[str, Any]:
    """Steps of the training loop on the largest micro-batch of a few that fits; recomputed if none does."""
    config = config_of(bench, size, "shared" if size == "giant" else "decoupled")
    train_config = mixed.settings()
    found: dict[str, Any] = {"attention": config.attention, "tried": {}}
    for triples in TRIPLES["tiny" if bench.tiny else size]:
        if bench.late(f"{size} with {triples} triples", 5):
            break
        bench.forget()
        outcome = attempt(lambda n=triples: _steps(bench, config, train_config, n, ceiling))  # type: ignore[misc]
        found["tried"][triples] = outcome
        if "error" not in outcome:
            found["triples"] = triples
            break
    return found


def _steps(
    bench: Bench, config: ModelConfig, train_config: TrainConfig, triples: int,
    ceiling: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Seconds of steps of ``engine.loop.train``, the device waited for after each; FSDP survives no OOM."""
    build = functools.partial(mixed.learner_of, config)
    learner = mixed.prepared(build, dist.start(), train_config, quick)
    batch = batch_of(bench, config, triples)
    session = Session(ranks=dist.start(), folder=bench.folder / "steps", layers=config.layers)
    seconds: list[float] = []
    norm = math.nan
    try:
        with contextlib.closing(train(learner, Same(batch), train_config, session)) as running:
            begun = time.perf_counter()
            for step in running:
                bench.wait()
                seconds.append(time.perf_counter() - begun)
                norm = float(step.grad_norm)
                if len(seconds) >= (3 if bench.tiny else STEPS) or (
                    len(seconds) > WARM + 2 and bench.left < 0
                ):
                    break
                begun = time.perf_counter()
    except (torch.OutOfMemoryError, CapacityError) as error:
        raise RuntimeError("out of memory") from error
    finally:
        shutil.rmtree(session.folder, ignore_errors=True)
    useful = learner.flops(batch)
    kept = seconds[1 if bench.tiny else WARM :]
    found = reached(bench, statistics.median(kept), useful, ceiling)
    return found | {
        "first_step_seconds": seconds[0], "all_seconds": seconds, "grad_norm": norm,
        "tokens": batch.plan.real_tokens, "tokens_per_s": batch.plan.real_tokens / found["seconds"],
        "samples_per_s": 3 * triples / found["seconds"],
    }  # fmt: skip


def reached(bench: Bench, seconds: float, useful: float, ceiling: float | None) -> dict[str, Any]:
    """Speed against the nominal peak, if the GPU is known, and against the measured ceiling."""
    tflops = useful / seconds / 1e12
    peak = nominal(torch.cuda.get_device_name(bench.device)) if bench.cuda else None
    return {
        "seconds": seconds,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "mfu_of_measured": tflops / ceiling if ceiling else None,
        "memory_gib": bench.memory(),
    }


def official(bench: Bench, size: str, triples: int, ceiling: float | None) -> dict[str, Any]:
    """Torchscale's step on the same batch, decoupled: eager, autocast, clip and fused AdamW as well."""
    theirs = importlib.import_module("benchmarks.official")  # torchscale may not be there
    config = config_of(bench, size, "decoupled")
    with bench.device:
        module = theirs.Torchscale(config, mixed.CODES)
    adam = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    found: dict[str, Any] = {}
    for count in (triples, triples // 2, triples // 4):
        if not count or bench.late(f"official {size} with {count} triples", 5):
            break
        bench.forget()
        batch = mixed.batch_of(mixed.mix_of(count, mixed.CAPTION_TOKENS, mixed.PROSE_TOKENS), config)
        passes = [mixed.moved(given, bench.device) for given in theirs.passes_of(batch, config)]
        outcome = attempt(lambda p=passes: bench.seconds(lambda: _official(bench, module, adam, p), 5, 2))  # type: ignore[misc]
        if isinstance(outcome, float):
            useful = mixed.counted(config).flops(batch)
            found |= reached(bench, outcome, useful, ceiling)
            return found | {"triples": count, "seconds_per_triple": outcome / count}
        adam.zero_grad(set_to_none=True)
        found[f"{count} triples"] = outcome
    return found


def _official(bench: Bench, module: nn.Module, adam: torch.optim.Optimizer, passes: list[Any]) -> None:
    half = compute_dtype("auto", bench.device) == torch.bfloat16
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
        loss: Tensor = torch.stack([module(given) for given in passes]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(module.parameters(), mixed.CLIP)
    adam.step()
    adam.zero_grad(set_to_none=True)


def saving(bench: Bench, size: str) -> dict[str, Any]:
    """How long ``begin`` holds training up, and how long writing takes behind it; twice, for warm buffers."""
    config = config_of(bench, size, "shared" if size == "giant" else "decoupled")
    ranks, folder = dist.start(), bench.folder / "saving"
    learner = mixed.prepared(functools.partial(mixed.learner_of, config), ranks, mixed.settings(), quick)
    adam = optim.adamw(learner, mixed.settings().optim, config.layers)
    tensors = dict(optim.weights_and_state(learner, adam))
    needed = sum(value.numel() * value.element_size() for value in tensors.values())
    free = shutil.disk_usage(bench.folder).free
    found: dict[str, Any] = {
        "size": size,
        "gb": needed / 1e9,
        "free_disk_gb": free / 1e9,
        "stall_seconds": [],
    }
    if free < 3 * needed:
        return found | {"error": "too little disk for two checkpoints"}
    warned: list[str] = []
    written: list[float] = []
    checkpoints = Checkpoints(folder, ranks, 1, warned.append)
    try:
        for step in (1, 2):
            if bench.late(f"save {step} of {size}", 2):
                break
            bench.wait()
            begun = time.perf_counter()
            checkpoints.begin(step, tensors, {}, lambda step, path, seconds: written.append(seconds))
            found["stall_seconds"].append(time.perf_counter() - begun)
            checkpoints.settle(wait=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found | {"written_seconds": written, "warnings": warned}


def tokenizer(bench: Bench) -> dict[str, Any]:
    """Pictures per second through VQ-KD's encoder, ViT-B with 8,192 codes, as the stages run it."""
    shape: dict[str, Any] = {
        "layers": 12,
        "width": 768,
        "heads": 12,
        "ffn": 3072,
        "image_px": 224,
        "patch_px": 16,
    }
    if bench.tiny:
        shape = {"layers": 1, "width": 32, "heads": 2, "ffn": 64, "image_px": 32, "patch_px": 8}
    model = VQKDModel(
        ModelConfig(**shape, mask_token=False, norm="pre"), 1, 8, Codebook(64 if bench.tiny else 8192, 32)
    )
    fill(model, quick)
    model.codebook.vectors.copy_(
        torch.nn.functional.normalize(torch.randn_like(model.codebook.vectors), dim=-1)
    )
    model = model.eval().to(bench.device)
    count, px = 2 if bench.tiny else TOKENIZER_PICTURES, shape["image_px"]
    pixels = torch.randint(0, 256, (count, 3, px, px), dtype=torch.uint8, device=bench.device)
    half = compute_dtype("auto", bench.device) == torch.bfloat16
    found: dict[str, Any] = {"batch": count}

    def run() -> None:
        with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
            model.tokens(normalise(pixels, HALF))

    def speed() -> float:
        return count / bench.seconds(run)

    found["eager_pictures_per_s"] = attempt(speed)
    if not bench.tiny and not bench.late("the tokenizer, compiled", 20):
        for block in model.encoder.blocks:
            block.compile(fullgraph=True)
        found["compiled_pictures_per_s"] = attempt(speed)
    return found
