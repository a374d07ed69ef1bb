"""Checks of the numerics on the machine at hand: attention against its definition, and sharding.

``beitctl doctor`` runs them, and a run does so before it uses an attention backend that was asked for by
name. Kernels have been wrong before on some machines and lengths alone (pytorch#196678, cudnn-frontend#1072).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from beitctl.config import ModelConfig
from beitctl.errors import SetupError
from beitctl.model import attention
from beitctl.model.plan import BatchPlan

PICTURE = 257
"""Tokens of a picture: 256 patches of 14 pixels, as in the giant."""
MIXED = BatchPlan(PICTURE, 2, (128, 1, 25), (128, 1, 0, 64, 1), fillers=(3, 29))
"""Lengths 257, 385, 258, 282, 128, 64 and 1, an empty slot, and fillers."""
ADVERSARIAL = BatchPlan(PICTURE, 0, (63, 128), (192, 64, 320))
"""Four of five lengths leave 64 when divided by 128."""
LOGIT = -120.0
"""Mean of all logits in the adversarial case: cuDNN's backward pass gave NaN there."""
PARTS = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Bounds:
    """Largest errors that pass, relative to the Frobenius norm of what is right."""

    out: float
    grad: float

    def of(self, part: str) -> float:
        """Bound of one of ``PARTS``."""
        return self.out if part == "out" else self.grad


BOUNDS = {
    torch.float64: Bounds(1e-12, 1e-12),
    torch.float32: Bounds(1e-5, 1e-5),
    torch.bfloat16: Bounds(1e-2, 2e-2),
}
ADVERSARIAL_BOUNDS = {
    torch.float64: Bounds(1e-10, 1e-10),
    torch.float32: Bounds(1e-3, 1e-3),
    torch.bfloat16: Bounds(0.5, 0.5),
}
"""Wider: a logit of -120 is rounded to 8e-6 in fp32 and to 0.5 in bf16, in which ``padded`` keeps logits on a
processor. What is looked for there is NaN and numbers that have nothing to do with the right ones."""


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    errors: dict[str, float]
    """Relative error of every part, of the worst sequence."""
    reason: str = ""
    """Why it did not pass; empty if it did."""

    @property
    def passed(self) -> bool:
        """Whether it did."""
        return not self.reason

    def __str__(self) -> str:
        numbers = ", ".join(f"{part} {error:.1e}" for part, error in self.errors.items())
        return f"{self.name}: {self.reason or 'ok'}" + (f" ({numbers})" if numbers else "")


def attends(
    backend: str, device: torch.device, dtype: torch.dtype, heads: int = 4, head_dim: int = 64
) -> list[Check]:
    """Compare a backend with attention written down from its definition in fp64, one sequence at a time.

    Args:
        backend: one of ``beitctl.model.attention.BACKENDS``.
        device: where it runs.
        dtype: fp64, fp32 or bf16.
        heads: attention heads.
        head_dim: width of a head.

    Returns:
        One check of mixed lengths, and one of logits near -120.
    """
    config = ModelConfig(
        layers=1, width=heads * head_dim, heads=heads, ffn=1, image_px=224, patch_px=14, vocabulary=8,
        text_tokens=512,
    )  # fmt: skip
    cases = (
        ("mixed lengths", MIXED, 0.0, BOUNDS[dtype]),
        ("logits near -120", ADVERSARIAL, LOGIT, ADVERSARIAL_BOUNDS[dtype]),
    )
    return [
        _attends(name, _Case(backend, plan, config, device, dtype, logit), bounds)
        for name, plan, logit, bounds in cases
    ]


def require(
    backend: str, device: torch.device, dtype: torch.dtype, heads: int = 4, head_dim: int = 64
) -> None:
    """Refuse a backend that cannot run here or that is wrong here.

    Raises:
        SetupError: it is; the message has the numbers.
    """
    reason = attention.available(backend, device, dtype, head_dim)
    checks = [] if reason else attends(backend, device, dtype, heads, head_dim)
    failed = "; ".join(str(check) for check in checks if not check.passed)
    if reason or failed:
        raise SetupError(
            f'attention_backend = "{backend}" cannot be used on {_name(device)} with torch '
            f"{torch.__version__}, {heads} heads of {head_dim} in {_kind(dtype)}: {reason or failed}. "
            'Set attention_backend = "auto"'
        )


@dataclass(frozen=True)
class _Case:
    backend: str
    plan: BatchPlan
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    logit: float

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Queries, keys and values (T, 3d) with a mean logit, and a gradient (T, d) of the contexts."""
        draw, width, heads = torch.Generator().manual_seed(0), self.config.width, self.config.heads
        qkv = torch.randn(self.plan.tokens, 3 * width, generator=draw, dtype=torch.float64)
        grad = torch.randn(self.plan.tokens, width, generator=draw, dtype=torch.float64)
        size = width // heads
        shift = math.sqrt(abs(self.logit) / math.sqrt(size))  # of each number: their product, over sqrt(size)
        qkv[:, :width] += shift
        qkv[:, width : 2 * width] += math.copysign(shift, self.logit)
        return qkv.to(self.device, self.dtype), grad.to(self.device, self.dtype)


def _attends(name: str, case: _Case, bounds: Bounds) -> Check:
    """Run a case and compare; what the kernel raises is a reason too."""
    qkv, grad = case.inputs()
    try:
        layout = attention.Layout.of(case.plan, case.config, case.device, backend=case.backend)
        leaf = qkv.clone().requires_grad_()
        out = attention.attend(leaf, layout, case.config.heads)
        (dqkv,) = torch.autograd.grad(out, leaf, grad)
    except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
        return Check(name, {}, f"{type(error).__name__}: {error}".partition("\n")[0])
    found = _parts(out.detach(), dqkv)
    errors = dict.fromkeys(PARTS, 0.0)
    right = _parts(*_definition(case, qkv.double(), grad.double()))
    for rows in _sequences(case.plan, case.device):
        for part in PARTS:
            errors[part] = _worse(errors[part], _error(found[part], right[part], rows))
    return Check(name, errors, _judged(errors, bounds))


def _parts(out: Tensor, dqkv: Tensor) -> dict[str, Tensor]:
    return dict(zip(PARTS, (out, *dqkv.chunk(3, dim=1)), strict=True))


def _sequences(plan: BatchPlan, device: torch.device) -> Iterator[Tensor]:
    """Rows of every sequence that has any."""
    for start, end in zip(plan.cu_seqlens[:-1], plan.cu_seqlens[1:], strict=True):
        if end > start:
            yield torch.from_numpy(plan.perm[start:end]).to(device)


def _definition(case: _Case, qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts (T, d) and gradient (T, 3d) of softmax attention inside every sequence, in fp64."""
    leaf = qkv.clone().requires_grad_()
    out = torch.zeros_like(grad)
    heads, width = case.config.heads, case.config.width
    for rows in _sequences(case.plan, case.device):
        q, k, v = (x.view(len(rows), heads, -1).transpose(0, 1) for x in leaf[rows].chunk(3, dim=1))
        weights = (q @ k.transpose(1, 2) / math.sqrt(width // heads)).softmax(-1)
        out = out.index_copy(0, rows, (weights @ v).transpose(0, 1).flatten(1))
    (dqkv,) = torch.autograd.grad(out, leaf, grad)
    return out.detach(), dqkv


def _error(found: Tensor, right: Tensor, rows: Tensor) -> float:
    """Relative Frobenius error in some rows.

    Rows where what is right is far smaller than elsewhere (gradients of a text of one token are 0) are
    measured by what is usual.
    """
    usual = float(right.square().mean().sqrt()) * math.sqrt(rows.numel() * right.shape[1])
    wrong = float((found[rows].double() - right[rows]).norm())
    return wrong / max(float(right[rows].norm()), usual)


def _worse(one: float, other: float) -> float:
    """The larger of two errors; NaN is the largest."""
    return other if math.isnan(other) or other > one else one


def _judged(errors: dict[str, float], bounds: Bounds) -> str:
    """Why errors do not pass; empty if they do."""
    broken = [part for part, error in errors.items() if not math.isfinite(error)]
    if broken:
        return f"not finite: {', '.join(broken)}"
    large = [f"{part} above {bounds.of(part):.0e}" for part in errors if errors[part] > bounds.of(part)]
    return ", ".join(large)


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
