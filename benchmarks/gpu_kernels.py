"""Parts of ``benchmarks.gpu`` below a step: matrix products, attention, one block."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beitctl.config import ModelConfig
from beitctl.engine.measuring import ceilings
from beitctl.engine.measuring.selfcheck import attends
from beitctl.engine.shard import compute_dtype
from beitctl.model import flops
from beitctl.model.attention import BACKENDS, Layout, attend, available, chosen
from beitctl.model.multiway import Block
from beitctl.model.plan import BatchPlan, plan_of
from benchmarks import mixed
from benchmarks.timing import Bench, attempt

ROWS = (32_896, 9_728)
"""Rows of 128 pictures of 257 tokens, and of 76 texts of 128."""
PRODUCTS = ((1408, 4224), (1408, 1408), (1408, 6144), (6144, 1408))
"""Inner and outer sizes of the giant's block: qkv, out, fc1, fc2."""
LENGTHS = (197, 257, 281, 385)
"""Tokens of a sequence: picture of 16 px and 14 px patches, with a caption of 24, with one of 128."""
HEADS = ((12, 64), (16, 64), (16, 88), (11, 128))
"""Heads and their width: base, large, giant, and a giant whose width 1408 is cut into 11."""
TOKENS = 32_768
"""Rows of an attention call, nearly."""


def gemm(bench: Bench) -> dict[str, Any]:
    """TFLOP/s of plain products in the compute type: the ceiling of everything else."""
    dtype = compute_dtype("auto", bench.device)
    rows, products = ((64,), ((32, 64),)) if bench.tiny else (ROWS, PRODUCTS)
    found: dict[str, Any] = {"dtype": str(dtype)}
    for m in rows:
        for k, n in products:
            found[f"{m}x{k}x{n}"] = ceilings.gemm((m, k, n), dtype, bench.device)
    found["ceiling_tflops"] = max(value for value in found.values() if isinstance(value, float))
    return found


def attention(bench: Bench) -> dict[str, Any]:
    """Forward and backward of every backend: errors of the self-check, milliseconds, useful TFLOP/s."""
    dtype = compute_dtype("auto", bench.device)
    lengths, shapes = ((17,), ((2, 16),)) if bench.tiny else (LENGTHS, HEADS)
    found: dict[str, Any] = {"dtype": str(dtype)}
    for backend in BACKENDS:
        for heads, size in shapes:
            name = f"{backend} {heads}x{size}"
            if bench.late(f"attention {name}"):
                return found
            if reason := available(backend, bench.device, dtype, size):
                found[name] = {"unavailable": reason}
                continue
            checked = functools.partial(_errors, bench, backend, dtype, heads, size)
            found[name] = {"errors": attempt(checked)}
            for length in lengths:
                case = (backend, heads, size, length, dtype)
                found[name][str(length)] = attempt(functools.partial(_attention, bench, *case))
    return found


def _errors(bench: Bench, backend: str, dtype: torch.dtype, heads: int, size: int) -> dict[str, Any]:
    checks = attends(backend, bench.device, dtype, heads, size)
    return {check.name: {"passed": check.passed, **check.errors} for check in checks}


def _attention(
    bench: Bench, backend: str, heads: int, size: int, length: int, dtype: torch.dtype
) -> dict[str, float]:
    """One backend on as many sequences of a length as fill ``TOKENS``."""
    width, count = heads * size, 2 if bench.tiny else TOKENS // length
    config = ModelConfig(
        layers=1, width=width, heads=heads, ffn=8, image_px=224, patch_px=14, vocabulary=8, text_tokens=128
    )
    layout = Layout.of(plan_of(length, count, [], []), config, bench.device, backend)
    qkv = torch.randn(count * length, 3 * width, device=bench.device, dtype=dtype, requires_grad=True)
    grad = torch.randn(count * length, width, device=bench.device, dtype=dtype)

    def both() -> None:
        qkv.grad = None
        attend(qkv, layout, heads).backward(grad)  # type: ignore[no-untyped-call]

    def forward() -> None:
        with torch.no_grad():
            attend(qkv, layout, heads)

    operations = 4 * count * length**2 * width
    seconds, alone = bench.seconds(both), bench.seconds(forward)
    return {
        "ms": seconds * 1e3, "tflops": 3 * operations / seconds / 1e12,
        "forward_ms": alone * 1e3, "forward_tflops": operations / alone / 1e12,
    }  # fmt: skip


def blocks(bench: Bench) -> dict[str, Any]:
    """One block of each size, forward and backward: eager, compiled, and with its input alone kept."""
    found: dict[str, Any] = {}
    for size in ("tiny",) if bench.tiny else ("giant", "large", "base"):
        for form in ("eager", "compiled", "compiled, recomputed", "eager, recomputed"):
            if (bench.tiny and "compiled" in form) or bench.late(f"block {size} {form}"):
                continue
            found[f"{size} {form}"] = attempt(functools.partial(_block, bench, size, form))
            bench.forget()
    return found


def _plan(bench: Bench, config: ModelConfig) -> BatchPlan:
    """Rows of the usual mix; pictures are 128, as many as fill whole tiles of a product."""
    if bench.tiny:
        return plan_of(config.picture_tokens, 2, [3, 5], [9, 4])
    mix = mixed.mix_of(64, mixed.CAPTION_TOKENS, mixed.PROSE_TOKENS)
    return plan_of(config.picture_tokens, mix.images, mix.pairs, mix.texts)


def _block(bench: Bench, size: str, form: str) -> dict[str, Any]:
    config = config_of(bench, size, "shared")
    dtype = compute_dtype("auto", bench.device)
    block = Block(config, 0).to(bench.device, dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.02)
    plan = _plan(bench, config)
    layout = Layout.of(plan, config, bench.device, chosen("auto", config, bench.device, dtype))
    run: Callable[..., Tensor] = _compiled(block) if form.startswith("compiled") else block
    x = torch.randn(plan.tokens, config.width, device=bench.device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def both() -> None:
        x.grad = None
        block.zero_grad(set_to_none=True)
        if form.endswith("recomputed"):
            out = checkpoint(run, x, layout, use_reentrant=False)
        else:
            out = run(x, layout)
        out.backward(grad)  # type: ignore[no-untyped-call]

    bench.forget()
    seconds = bench.seconds(both)
    useful = 3 * flops.of_pass(config, plan, blocks=1, embedded=False).forward
    return {
        "rows": plan.tokens, "ms": seconds * 1e3, "ns_per_row": seconds / plan.tokens * 1e9,
        "tflops": useful / seconds / 1e12, "memory_gib": bench.memory(), "backend": layout.backend,
    }  # fmt: skip


def _compiled(block: nn.Module) -> Callable[..., Tensor]:
    """A block as one graph."""
    torch.compiler.reset()
    found: Callable[..., Tensor] = torch.compile(block, fullgraph=True)
    return found


def config_of(bench: Bench, size: str, attention: str) -> ModelConfig:
    """The settings of a size; in toy runs those of a model that a second is enough for."""
    if not bench.tiny:
        return mixed.model_of(size, attention)
    toy = {"layers": 2, "width": 32, "heads": 2, "ffn": 64, "image_px": 32, "patch_px": 8, "vocabulary": 300}
    fusion = 1 if attention == "shared" else 0
    return mixed.model_of(size, attention, **toy, text_tokens=128, fusion_layers=fusion)
