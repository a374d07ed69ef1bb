"""Heads that say something of every pixel: BEiT's feature pyramid with UPerNet, and what they need.

Names of parameters and buffers are those of the files of transformers' ``BeitForSemanticSegmentation``, so
that ``heads.segmenter.`` before theirs gives ours.

Letters: n pictures, d width, h x w patches along height and width, V classes.
Sources: arXiv:2106.08254, section 3.3, and its code; UPerNet arXiv:1807.10221; mmsegmentation 0.11.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.multiway import Encoded

POOLED = (1, 2, 3, 6)
"""Sides of the grids that UPerNet pools its coarsest map to."""
AUXILIARY = 256
"""Channels of the auxiliary head."""
AUXILIARY_TAP = 2
"""Which of the four maps the auxiliary head reads."""
SHARES = (1 / 3, 1 / 2, 2 / 3, 1)
"""How deep the four maps are taken; of 12 blocks after 4, 6, 8 and 12."""
PUBLISHED = {24: (8, 12, 16, 24)}
"""Blocks after which the maps are taken, where it is published and ``SHARES`` does not say it."""


def default_taps(layers: int) -> tuple[int, ...]:
    """Numbers of blocks after which the four maps are taken: 4, 6, 8, 12 of 12 and 8, 12, 16, 24 of 24."""
    return PUBLISHED.get(layers, tuple(max(1, round(share * layers)) for share in SHARES))


def feature_maps(encoded: Encoded, picture_rows: Tensor, depths: Sequence[int]) -> list[Tensor]:
    """Patches as maps (n, d, h, w) after each of some numbers of blocks, which must be in ``encoded.inner``.

    Args:
        encoded: the encoded batch.
        picture_rows: (n, P) rows of every picture, class token first.
        depths: numbers of blocks, one for each map.
    """
    config = encoded.model.config
    patches = picture_rows[:, config.prefix :]
    found = [encoded.inner[depth][patches] for depth in depths]
    return [rows.transpose(1, 2).reshape(len(rows), config.width, *config.grid) for rows in found]


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(n, c, any, any) at another size, bilinear, corners not aligned."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class _Normalised(torch.autograd.Function):
    """Batch normalisation by the statistics of all ranks: three small sums over them a step, in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normalised x; mean and variance (c,); number of values of a channel (1,)."""
        wide = x.float()
        own = wide.new_full((1,), x.numel() // x.shape[1])
        sums = _over_ranks(torch.cat([wide.sum((0, 2, 3)), own]))
        count = sums[-1:]
        mean = sums[:-1] / count.clamp(min=1)
        centred = wide - _channels(mean)
        variance = _over_ranks(centred.square().sum((0, 2, 3))) / count.clamp(min=1)
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        y = centred * _channels(scale * weight) + _channels(bias)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        wide = grad.float()
        normal = (x.float() - _channels(mean)) * _channels(scale)
        of_bias, of_weight = wide.sum((0, 2, 3)), (wide * normal).sum((0, 2, 3))
        both = _over_ranks(torch.cat([of_bias, of_weight])) / count.clamp(min=1)
        by_mean, by_variance = both.chunk(2)
        of_x = wide - _channels(by_mean) - normal * _channels(by_variance)
        return (of_x * _channels(scale * weight)).to(x.dtype), of_weight, of_bias, None


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]


def _over_ranks(own: Tensor) -> Tensor:
    """The sum of what all ranks hold; ``own`` may be overwritten."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(own)
    return own


class SyncedBatchNorm(nn.Module):
    """Batch norm over (n, c, h, w) whose statistics are those of all ranks; torch's own refuses CPUs.

    Names are those of ``nn.BatchNorm2d``. All ranks must call it equally often; one may hold no samples. It
    computes in fp32, whatever it is given. A channel of a single value, for which torch raises, becomes its
    bias. Gradients of weight and bias are of this rank's samples, as all gradients of the engine are.
    """

    compute_fp32 = True
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.int64))
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Mean 0, variance 1, nothing seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to the same shape and type."""
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training:
            known = (self.running_mean.float(), self.running_var.float())
            found = F.batch_norm(x.float(), *known, weight, bias, eps=self.eps)
            return found.to(x.dtype)
        y: Tensor
        y, mean, variance, count = _Normalised.apply(x, weight, bias, self.eps)
        self._track(mean, variance, count)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics, whose variance is the unbiased one; not where no rank has samples."""
        share = self.momentum * (count > 0)
        unbiased = variance * count / (count - 1).clamp(min=1)
        self.running_mean.copy_(torch.lerp(self.running_mean.float(), mean, share))
        self.running_var.copy_(torch.lerp(self.running_var.float(), unbiased, share))
        self.num_batches_tracked.add_((count > 0).long().squeeze())


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, ReLU; the size stays."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        self.bn = SyncedBatchNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to (n, out, h, w)."""
        found: Tensor = F.relu(self.bn(self.conv(x)))
        return found


class UPerHead(nn.Module):
    """Four maps of different sizes to logits of the size of the finest (arXiv:1807.10221)."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(channels, classes, 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNormAct(width, channels, 1)) for side in POOLED
        )
        self.bottleneck = ConvNormAct(width + len(POOLED) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormAct(width, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvNormAct(4 * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor], kept: Tensor | None = None) -> Tensor:
        """Maps (n, d, ., .), finest first, to (n, V, ., .); ``kept`` (n, channels) scales the last features.

        That is dropout of whole channels, drawn elsewhere.
        """
        top = maps[-1]
        pooled = [resized(pool(top), top.shape[2:]) for pool in self.psp_modules]
        found = [conv(part) for conv, part in zip(self.lateral_convs, maps[:-1], strict=True)]
        found.append(self.bottleneck(torch.cat([top, *pooled], dim=1)))
        for level in (2, 1, 0):
            found[level] = found[level] + resized(found[level + 1], found[level].shape[2:])
        found = [*(conv(x) for conv, x in zip(self.fpn_convs, found[:-1], strict=True)), found[-1]]
        size = found[0].shape[2:]
        joined = torch.cat([found[0], *(resized(x, size) for x in found[1:])], dim=1)
        logits: Tensor = self.classifier(_dropped(self.fpn_bottleneck(joined), kept))
        return logits


class FCNHead(nn.Module):
    """One convolution and a classifier on one map (arXiv:1411.4038)."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ConvNormAct(width, channels, 3)])
        self.classifier = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """(n, d, h, w) to (n, V, h, w); ``kept`` (n, channels) as of ``UPerHead``."""
        for conv in self.convs:
            x = conv(x)
        logits: Tensor = self.classifier(_dropped(x, kept))
        return logits


def _dropped(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x * kept.to(x.dtype)[:, :, None, None]


class Segmenter(nn.Module):
    """BEiT's pyramid of four maps of patches, UPerNet on it, and an auxiliary head for training.

    The maps have one size; deconvolutions and a pooling make them 4, 2, 1 and 1/2 times as large.
    """

    def __init__(self, config: ModelConfig, classes: int, *, auxiliary: bool = True) -> None:
        super().__init__()
        d = config.width
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(d, d, 2, stride=2),
            SyncedBatchNorm(d),
            nn.GELU(),
            nn.ConvTranspose2d(d, d, 2, stride=2),
        )
        self.fpn2 = nn.Sequential(nn.ConvTranspose2d(d, d, 2, stride=2))
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(2, 2)
        self.decode_head = UPerHead(d, d, classes)
        self.auxiliary_head = FCNHead(d, AUXILIARY, classes) if auxiliary else None
        self.width, self.classes = d, classes

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (n, d, h, w), shallowest first, to logits (n, V, 4 h, 4 w)."""
        logits: Tensor = self.decode_head(self.pyramid(maps))
        return logits

    def both(self, maps: Sequence[Tensor], kept: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (n, V, 4 h, 4 w), and those of the auxiliary head (n, V, h, w).

        ``kept`` (n, d + AUXILIARY) scales the channels of the last features of both.
        """
        levels = self.pyramid(maps)
        of_main, of_other = (None, None) if kept is None else (kept[:, : self.width], kept[:, self.width :])
        logits = self.decode_head(levels, of_main)
        if self.auxiliary_head is None:
            return logits, None
        return logits, self.auxiliary_head(levels[AUXILIARY_TAP], of_other)

    def pyramid(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (n, d, h, w) at 4, 2, 1 and 1/2 times their size."""
        kind = next(self.fpn2.parameters()).dtype
        layers = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [layer(x.to(kind)) for layer, x in zip(layers, maps, strict=True)]

    def operations(self, samples: int, grid: tuple[int, int]) -> int:
        """Floating-point operations of the convolutions in a forward pass of ``both``, as torch counts."""
        d, v, area = self.width, self.classes, grid[0] * grid[1]
        small = (grid[0] // 2) * (grid[1] // 2)
        pyramid = 4 * d * d * (area + 4 * area + area)
        pooled = d * d * sum(side * side for side in POOLED) + 9 * (1 + len(POOLED)) * d * d * small
        levels = (1 + 9) * d * d * (16 + 4 + 1) * area
        last = (9 * 4 * d * d + d * v) * 16 * area
        other = 0 if self.auxiliary_head is None else (9 * d + v) * AUXILIARY * area
        return 2 * samples * (pyramid + pooled + levels + last + other)
