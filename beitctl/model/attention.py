"""Attention over the sequences of a packed batch.

Backends read queries, keys and values in modality-major rows and return contexts in the same rows.
``padded`` runs everywhere and is the reference: sequences are gathered into a grid (S, M) per kind, with a
key mask.
"""

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
    grids: tuple[Grid, ...]
    gather: Tensor
    """(slots,) row of every slot of all grids, one after the other; 0 at padding."""
    slots: Tensor
    """(T,) slot of every row."""
    row_sequence: Tensor
    """(T,) sequence of every row."""
    text_positions: Tensor
    """(rows of C and D,) positions in their texts."""

    @classmethod
    def of(cls, plan: BatchPlan, config: ModelConfig, device: torch.device) -> "Layout":
        """Copy the indices of a plan to a device."""
        flat = torch.cat(
            [torch.zeros(0, dtype=torch.int64), *(_tensor(rows).flatten() for _, rows in plan.grids)]
        )
        return cls(
            plan=plan,
            grids=tuple(_grid(kind, rows, plan, config, device) for kind, rows in plan.grids),
            gather=flat.clamp(min=0).to(device),
            slots=torch.from_numpy(plan.slots).to(device),
            row_sequence=torch.from_numpy(plan.row_sequence).to(device),
            text_positions=torch.from_numpy(plan.text_positions).to(device),
        )


def _tensor(rows: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows))


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
    index = None
    if config.position != "absolute":
        text = longest - (plan.picture_tokens if kind == "pair" else 0)
        index = {
            "image": lambda: relative.picture_index(config.grid),
            "pair": lambda: relative.pair_index(text, config),
            "text": lambda: relative.text_index(text, config),
        }[kind]()
    return Grid(
        rows.shape[0],
        longest,
        None if mask is None else _tensor(mask).to(device),
        None if index is None else _tensor(index).to(device),
    )


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

    ``biases`` holds the (H, M, M) that is added to the logits of every grid.
    """
    total, triple = qkv.shape
    if total == 0:  # zeros that read the biases: FSDP needs the gradient of their table on every rank
        return qkv[:, : triple // 3] + sum((bias.sum() for bias in biases or []), qkv.new_zeros(()))
    slots = _Gather.apply(qkv, layout.gather, layout.slots)
    contexts = []
    parts = slots.split([grid.sequences * grid.longest for grid in layout.grids])
    for index, (grid, part) in enumerate(zip(layout.grids, parts, strict=True)):
        part = part.view(grid.sequences, grid.longest, 3, heads, triple // 3 // heads)  # (S, M, 3, H, d/H)
        q, k, v = part.permute(2, 0, 3, 1, 4)  # each (S, H, M, d/H)
        bias = biases[index] if biases else None
        context = (_fused if q.is_cuda else _plain)(q, k, v, grid.mask, bias)
        contexts.append(context.transpose(1, 2).reshape(-1, triple // 3))  # (S * M, d)
    scattered: Tensor = _Scatter.apply(torch.cat(contexts), layout.slots)
    return scattered


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """Softmax attention of (S, H, M, d/H) by PyTorch's kernels; never cuDNN with a mask (pytorch#196678)."""
    if bias is not None:
        added = bias.to(q.dtype).expand(len(q), -1, -1, -1)
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
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
