"""Sums of losses over the predicted rows, and the gather that contrastive losses need."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def masked_cross_entropy(rows: Tensor, targets: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the rows that are predicted, evaluated nowhere else.

    Args:
        rows: (m, d) encoded rows, already gathered.
        targets: (m,) ids.
        head: (m, d) to (m, V) logits.

    Returns:
        Sum of the losses in fp32 and number of right predictions, both 0-d. With m = 0 both are 0 and the
        head still takes part in the graph, which FSDP needs.
    """
    logits = head(rows).float()
    total = F.cross_entropy(logits, targets, reduction="sum")
    return total, (logits.detach().argmax(-1) == targets).sum()


class _AllGather(torch.autograd.Function):
    """Rows of all ranks, in rank order; the backward sums what every rank says of one's own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]


def gather_plain(x: Tensor) -> Tensor:
    """(n, ...) of this rank to those of all ranks in rank order, without gradient; n and shape are equal."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def info_nce(
    pictures: Tensor, texts: Tensor, scale: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric InfoNCE of unit vectors (n, d) against those of all ranks; every rank holds the same n.

    Returns:
        Sum of the losses of this rank's pictures and texts, halved; number of pictures whose text is found,
        0-d both; logits (n, all) of this rank's pictures with all texts.
    """
    all_pictures, first = gather_rows(pictures)
    all_texts, _ = gather_rows(texts)
    targets = first + torch.arange(len(pictures), device=pictures.device)
    to_text, to_picture = scale * pictures @ all_texts.T, scale * texts @ all_pictures.T
    losses = [
        F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
        for logits in (to_text, to_picture)
    ]
    return (losses[0] + losses[1]) / 2, (to_text.detach().argmax(-1) == targets).sum(), to_text


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """(n, d) rows of this rank to those of all ranks, with gradient; and the place of one's own first row.

    Every rank must hold the same number of rows.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x, 0
    gathered: Tensor = _AllGather.apply(x)
    return gathered, dist.get_rank() * x.shape[0]
