"""Sums of losses over the predicted rows, and the gather that contrastive losses need."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Sums = dict[str, tuple[Tensor, Tensor]]
"""Per term the sum of its losses and the number of right predictions, 0-d each."""
MOST_LOGITS = 2**28
"""Logits that are in memory at once, 1 GiB in fp32; with more they are computed in chunks, twice."""


def masked_cross_entropy(
    rows: Tensor, targets: Tensor, head: nn.Module, most: int = MOST_LOGITS
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the rows that are predicted, evaluated nowhere else.

    Args:
        rows: (m, d) encoded rows, already gathered.
        targets: (m,) ids.
        head: (m, d) to (m, V) logits.
        most: logits above which rows go through the head in chunks that keep no logits for the backward pass.

    Returns:
        Sum of the losses in fp32 and number of right predictions, both 0-d. With m = 0 both are 0 and the
        head still takes part in the graph, which FSDP needs.
    """
    classes = max((len(parameter) for parameter in head.parameters()), default=1)
    if rows.shape[0] * classes <= most:
        return _cross_entropy(rows, targets, head)
    size = max(1, most // classes)
    parts = [
        checkpoint(_cross_entropy, *part, head, use_reentrant=False)
        for part in zip(torch.split(rows, size), torch.split(targets, size), strict=True)
    ]
    losses, hits = zip(*parts, strict=True)
    return torch.stack(losses).sum(), torch.stack(hits).sum()


def _cross_entropy(rows: Tensor, targets: Tensor, head: nn.Module) -> tuple[Tensor, Tensor]:
    logits = head(rows).float()
    total = F.cross_entropy(logits, targets, reduction="sum")
    return total, (logits.detach().argmax(-1) == targets).sum()


def weighted(sums: Sums, weights: Mapping[str, float], counts: Mapping[str, float]) -> Tensor:
    """The loss of a pass, 0-d: of every term its weight times the sum over the global count, added up."""
    parts = [weight * sums[term][0] / max(1.0, counts[term]) for term, weight in weights.items()]
    return torch.stack(parts).sum()


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
