"""Attention over the sequences of a packed batch.

Backends read queries, keys and values in modality-major rows and return contexts in the same rows.

* ``padded`` runs everywhere and is the reference: sequences are gathered into a grid (S, M) per kind, with a
  key mask.
* ``varlen-flash`` reads sequences as they are, through ``cu_seqlens``: CUDA, bf16 or fp16.
* ``varlen-fa3`` and ``varlen-cudnn`` are other kernels for the same call, on Hopper and later.

A dispatcher never chooses: each backend pins its kernel (pytorch#196678: cuDNN with a mask gives NaN).
"""

import functools
import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from beitctl.config import ModelConfig
from beitctl.model import relative
from beitctl.model.plan import BatchPlan

BACKENDS = ("padded", "varlen-flash", "varlen-fa3", "varlen-cudnn")
"""Names of all backends."""
HOPPER = (9, 0)
CUDNN = 91800
"""First version of cuDNN that PyTorch's variable-length attention may use."""


@functools.cache
def _takes_splits() -> bool:
    """Whether ``varlen_attn`` has ``num_splits``, which keeps it from cuDNN; torch 2.11 never takes that."""
    varlen = importlib.import_module("torch.nn.attention.varlen")
    return "num_splits" in inspect.signature(varlen.varlen_attn).parameters


def available(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why a backend cannot run there; empty if it can. ``head_dim`` is the width of a head, d/H."""
    if backend == "padded":
        return ""
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bf16 or fp16, not in {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"needs heads of a multiple of 8 up to 256, not {head_dim}"
    if backend == "varlen-flash":
        return "" if torch.cuda.get_device_capability(device) >= (8, 0) else "needs an Ampere GPU or newer"
    if torch.cuda.get_device_capability(device) < HOPPER:
        return "needs a Hopper GPU or newer"
    if backend == "varlen-fa3":
        found = importlib.util.find_spec("flash_attn_interface")
        return "" if found else "needs the package flash_attn_interface (FlashAttention 3)"
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if head_dim > 128 or not _takes_splits() or (version or 0) < CUDNN:
        return "needs torch 2.12, cuDNN 9.18 and heads up to 128"
    return ""


def chosen(setting: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that a setting means for a model; ``auto`` is the fastest exact one that needs no check.

    Relative positions are biases, which only ``padded`` adds; pictures alone need no padding there.

    Raises:
        ValueError: the backend cannot run there.
    """
    size = config.width // config.heads
    mixed = config.position == "absolute" and config.vocabulary > 0
    if setting == "auto":
        flash = mixed and not available("varlen-flash", device, dtype, size)
        return "varlen-flash" if flash else "padded"
    reason = available(setting, device, dtype, size)
    if setting != "padded" and config.position != "absolute":
        reason = f'adds no biases, which position = "{config.position}" needs'
    if reason:
        raise ValueError(f'attention_backend = "{setting}" {reason}; use "auto" or "padded"')
    return setting


@dataclass(frozen=True)
class Grid:
    """Sequences of one kind, padded to the longest of them."""

    sequences: int
    longest: int
    mask: Tensor | None
    """(S, 1, 1 or M, M) bool, True where a query may see a key; None when all see all."""
    relative: Tensor | None = None
    """(M, M) row of the table of relative positions for query and key; None without such a table."""


@dataclass(frozen=True)
class Layout:
    """The index tensors of a plan on the device."""

    plan: BatchPlan
    cuts: tuple[int, int, int, int]
    """Ends b0, nv, b1, T of the four segments."""
    backend: str
    """How ``attend`` works."""
    in_order: bool
    """Whether rows lie in the order of their sequences."""
    grids: tuple[Grid, ...]
    """Of ``padded``."""
    gather: Tensor
    """(slots,) row of every slot of all grids, one after the other; 0 at padding. Of ``padded``."""
    slots: Tensor
    """(T,) slot of every row. Of ``padded``."""
    perm: Tensor
    """(T,) row of every token in the order of sequences. Of the other backends."""
    inverse: Tensor
    """(T,) place in that order of every row. Of the other backends."""
    cu_seqlens: Tensor
    """(S + 1,) int32, where sequences begin in that order, and T. Of the other backends."""
    pinned: bool
    """Whether the kernel is kept from being cuDNN's. Of the other backends."""
    longest: int
    """Bound on the tokens of a sequence that is the same for all batches of a model."""
    row_sequence: Tensor
    """(T,) sequence of every row."""
    text_positions: Tensor
    """(rows of C and D,) positions in their texts."""

    @classmethod
    def of(
        cls, plan: BatchPlan, config: ModelConfig, device: torch.device, backend: str = "padded"
    ) -> "Layout":
        """Copy the indices of a plan to a device; text that sees no later words is always ``padded``."""
        padded = backend == "padded" or (plan.causal_text and plan.pairs > 0)
        grids = plan.grids if padded else []
        flat = np.concatenate([np.zeros(0, np.int64), *(rows.ravel() for _, rows in grids)])
        perm = np.zeros(0, np.int64) if padded else plan.perm
        return cls(
            plan=plan,
            cuts=plan.cuts,
            backend="padded" if padded else backend,
            in_order=plan.in_order,
            grids=tuple(_grid(kind, rows, plan, config, device) for kind, rows in grids),
            gather=_on(device, flat.clip(min=0)),
            slots=_on(device, plan.slots if padded else perm),
            perm=_on(device, perm),
            inverse=_on(device, np.argsort(perm)),
            cu_seqlens=_on(device, plan.cu_seqlens.astype(np.int32)),
            pinned=not padded and backend == "varlen-flash" and _takes_splits(),
            longest=max(config.picture_tokens + config.text_tokens, _longest(plan)),
            row_sequence=_on(device, plan.row_sequence),
            text_positions=_on(device, plan.text_positions),
        )


def _longest(plan: BatchPlan) -> int:
    """Longest filler: the one kind of sequence that a model's sizes do not bound."""
    return max(plan.fillers or (0,))


def _on(device: torch.device, array: Any) -> Tensor:
    """An array on a device, by way of pinned memory: the copy to a GPU then does not wait for its work."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _grid(kind: str, rows: Any, plan: BatchPlan, config: ModelConfig, device: torch.device) -> Grid:
    """What the attention of one kind of sequences needs besides queries, keys and values."""
    longest, real = rows.shape[1], rows >= 0
    mask = None if real.all() else real[:, None, None, :]
    if kind == "pair" and plan.causal_text:
        mask = (
            _causal(plan.picture_tokens, longest)
            if mask is None
            else mask & _causal(plan.picture_tokens, longest)
        )
    return Grid(
        rows.shape[0],
        longest,
        None if mask is None else _on(device, mask),
        None if config.position == "absolute" else _on(device, _positions(kind, longest, plan, config)),
    )


def _positions(kind: str, longest: int, plan: BatchPlan, config: ModelConfig) -> Any:
    """(M, M) rows of the table of relative positions; any of fillers that are longer than a text."""
    if kind == "image":
        return relative.picture_index(config.grid)
    if kind == "pair":
        return relative.pair_index(longest - plan.picture_tokens, config)
    if longest > config.text_tokens:
        return np.zeros((longest, longest), np.int64)
    return relative.text_index(longest, config)


def _causal(picture: int, longest: int) -> Any:
    """(1, 1, M, M) bool: all see the picture, a text token also itself and what stands before it."""
    at = np.arange(longest)
    return ((at[None, :] < picture) | ((at[:, None] >= picture) & (at[None, :] <= at[:, None])))[None, None]


class _Gather(torch.autograd.Function):
    """``x[index]`` whose backward is a gather too, because ``inverse`` undoes ``index``.

    Slots of ``index`` that ``inverse`` never names (padding) must not reach the loss: their gradient is
    dropped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Scatter(torch.autograd.Function):
    """``x[slots]``, whose backward fills the slots that are not named with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.rows = x.shape[0]
        return x.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        full = grad.new_zeros(ctx.rows, *grad.shape[1:])
        full[slots] = grad  # every slot is named once: no accumulation
        return full, None


def attend(qkv: Tensor, layout: Layout, heads: int, biases: list[Tensor] | None = None) -> Tensor:
    """Full attention inside every sequence: (T, 3d) queries, keys, values to (T, d) contexts.

    ``biases`` holds the (H, M, M) that is added to the logits of every grid; of ``padded`` alone.
    """
    if layout.backend == "padded":
        return _padded(qkv, layout, heads, biases)
    return from_sequences(attend_in_order(to_sequences(qkv, layout), layout, heads), layout)


def to_sequences(x: Tensor, layout: Layout) -> Tensor:
    """Rows (T, ...) in the order of sequences; backward is a gather, not a scatter. Not of ``padded``."""
    if layout.in_order:
        return x
    found: Tensor = _Gather.apply(x, layout.perm, layout.inverse)
    return found


def from_sequences(x: Tensor, layout: Layout) -> Tensor:
    """Undoes ``to_sequences``."""
    if layout.in_order:
        return x
    found: Tensor = _Gather.apply(x, layout.inverse, layout.perm)
    return found


def attend_in_order(qkv: Tensor, layout: Layout, heads: int) -> Tensor:
    """(T, 3d) queries, keys, values in the order of sequences to (T, d) contexts; not of ``padded``."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - loads the compiler, most of a second

    total, triple = qkv.shape
    q, k, v = qkv.view(total, 3, heads, triple // 3 // heads).unbind(1)
    pinned: dict[str, Any] = {"num_splits": 1} if layout.pinned else {}
    cu, longest = layout.cu_seqlens, layout.longest
    context = varlen_attn(q, k, v, cu, cu, longest, longest, **pinned)
    assert isinstance(context, Tensor)
    return context.reshape(total, triple // 3)


def _padded(qkv: Tensor, layout: Layout, heads: int, biases: list[Tensor] | None) -> Tensor:
    """Rows are gathered into the grid of their kind; pictures alone are a grid as they lie."""
    total, triple = qkv.shape
    if total == 0:  # zeros that read the biases: FSDP needs the gradient of their table on every rank
        return qkv[:, : triple // 3] + sum((bias.sum() for bias in biases or []), qkv.new_zeros(()))
    dense = layout.cuts[0] == total
    slots = qkv if dense else _Gather.apply(qkv, layout.gather, layout.slots)
    contexts = []
    parts = torch.split(slots, [grid.sequences * grid.longest for grid in layout.grids])
    for index, (grid, part) in enumerate(zip(layout.grids, parts, strict=True)):
        part = part.view(grid.sequences, grid.longest, 3, heads, triple // 3 // heads)  # (S, M, 3, H, d/H)
        q, k, v = part.permute(2, 0, 3, 1, 4)  # each (S, H, M, d/H)
        bias = biases[index] if biases else None
        context = (_fused if q.is_cuda else _plain)(q, k, v, grid.mask, bias)
        contexts.append(context.transpose(1, 2).reshape(-1, triple // 3))  # (S * M, d)
    if dense:
        return contexts[0]
    scattered: Tensor = _Scatter.apply(torch.cat(contexts), layout.slots)
    return scattered


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Softmax attention of (S, H, M, d/H) by PyTorch's kernels; never cuDNN with a mask (pytorch#196678)."""
    if bias is not None:
        added = bias.to(q.dtype).expand(len(q), -1, -1, -1)
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if mask is None:
        kernels.insert(0, SDPBackend.FLASH_ATTENTION)
    with sdpa_kernel(kernels, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Softmax attention of (S, H, M, d/H) by two batched products.

    On a CPU this is two to seven times faster in bf16, forward and backward, than PyTorch's fused kernel at
    the lengths of this family, and as fast in fp32 (docs/decisions.md).
    """
    sequences, heads, longest, size = q.shape
    q, k, v = (x.reshape(sequences * heads, longest, size) for x in (q * size**-0.5, k, v))
    logits = torch.bmm(q, k.transpose(1, 2)).view(sequences, heads, longest, longest)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    weights = logits.softmax(-1).view(sequences * heads, longest, longest)
    return torch.bmm(weights, v).view(sequences, heads, longest, size)
