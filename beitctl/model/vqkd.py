"""VQ-KD, the image tokenizer of BEiT v2 (arXiv:2208.06366): a Vision Transformer to a codebook, and back.

Both halves are Multiway models without a language branch. The codebook is a buffer that follows an
exponential moving average of the vectors assigned to it; no gradient reaches it.
Letters: B pictures, N patches, K codes, D width of a code, F width of the teacher's features.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.multiway import Multiway


class TaskLayer(nn.Sequential):
    """Linear, tanh, linear, in fp32."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))

    def forward(self, x: Tensor) -> Tensor:
        first, last = cast("tuple[nn.Linear, nn.Linear]", (self[0], self[2]))
        with torch.autocast(x.device.type, enabled=False):
            x = torch.tanh(F.linear(x.float(), first.weight.float(), first.bias.float()))
            return F.linear(x, last.weight.float(), last.bias.float())


class Codebook(nn.Module):
    """K unit vectors of width D that follow the data."""

    vectors: Tensor
    usage: Tensor
    idle: Tensor
    ready: Tensor
    steps: Tensor

    def __init__(
        self, codes: int, width: int, *, decay: float = 0.99, revive_after: int = 0,
        start_after: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.codes, self.width, self.decay, self.revive_after = codes, width, decay, revive_after
        self.start_after, self.seed = start_after, seed
        self.register_buffer("vectors", torch.empty(codes, width))
        self.register_buffer("usage", torch.empty(codes))
        self.register_buffer("idle", torch.empty(codes, dtype=torch.int64))
        self.register_buffer("ready", torch.empty((), dtype=torch.int64))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))

    def reset_buffers(self) -> None:
        """An empty codebook; the first training batch that reaches it fills it."""
        for buffer in (self.vectors, self.usage, self.idle, self.ready, self.steps):
            buffer.zero_()

    def assign(self, z: Tensor) -> Tensor:
        """(n, D) unit vectors to the indices (n,) of their closest codes; in fp32: codes can lie close."""
        with torch.autocast(z.device.type, enabled=False):
            return (z.float() @ self.vectors.T).argmax(-1)

    def asleep(self) -> bool:
        """Whether the encoder still trains without the codebook; counts the steps."""
        self.steps += 1
        return int(self.steps) <= self.start_after

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """k-means on the vectors of all ranks, once; every rank reaches the same codebook.

        The released code clusters on each rank apart and so starts with as many codebooks as ranks.
        """
        if int(self.ready):
            return
        every = _gathered(z)
        generator = torch.Generator().manual_seed(self.seed)
        picked = torch.randperm(len(every), generator=generator)[torch.arange(self.codes) % len(every)]
        centres = every[picked.to(every.device)].clone()
        for _ in range(10):
            nearest = (every @ centres.T).argmax(-1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, every)
            filled = torch.bincount(nearest, minlength=self.codes) > 0
            centres = torch.where(filled[:, None], F.normalize(sums, dim=-1), centres)
        self.vectors.copy_(centres)
        self.ready.fill_(1)

    @torch.no_grad()
    def follow(self, z: Tensor, indices: Tensor) -> None:
        """Move every used code toward the mean of its vectors; wake codes that were idle for too long."""
        counts = torch.bincount(indices, minlength=self.codes).float()
        sums = torch.zeros_like(self.vectors).index_add_(0, indices, z)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        means = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
        moved = F.normalize(self.decay * self.vectors + (1 - self.decay) * means, dim=-1)
        used = counts > 0
        self.vectors.copy_(torch.where(used[:, None], moved, self.vectors))
        self.usage += counts
        self.idle.copy_(torch.where(used, 0, self.idle + 1))
        if self.revive_after:
            self._revive(z)

    def _revive(self, z: Tensor) -> None:
        """Put codes that nothing chose for ``revive_after`` steps on random vectors of this batch."""
        dead = (self.idle >= self.revive_after).nonzero().flatten()
        if not len(dead):
            return
        every = _gathered(z)
        generator = torch.Generator().manual_seed(self.seed + int(self.usage.sum()))
        picked = torch.randint(len(every), (len(dead),), generator=generator).to(every.device)
        self.vectors[dead] = every[picked]
        self.idle[dead] = 0


def _gathered(z: Tensor) -> Tensor:
    """Vectors of all ranks, in rank order; every rank must hold the same number."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.contiguous())
    return torch.cat(parts)


class VQKDModel(nn.Module):
    """Encoder, codebook, decoder; the encoder's half is the tokenizer."""

    feature_mean: Tensor
    measured: Tensor

    def __init__(self, encoder: ModelConfig, decoder_layers: int, features: int, codebook: Codebook) -> None:
        super().__init__()
        decoder = decoder_config(encoder, decoder_layers, codebook.width)
        self.encoder = Multiway(encoder)
        self.to_code = TaskLayer(encoder.width, codebook.width)
        self.codebook = codebook
        self.decoder = Multiway(decoder)
        self.to_feature = TaskLayer(decoder.width, features)
        self.register_buffer("feature_mean", torch.empty(features))
        self.register_buffer("measured", torch.empty((), dtype=torch.int64))

    def reset_buffers(self) -> None:
        """No mean is subtracted before one was measured."""
        self.feature_mean.zero_()
        self.measured.zero_()

    def vectors(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 to unit vectors (B, N, D)."""
        return F.normalize(self.to_code(self.encoder.patches(images)), dim=-1)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 to codes (B, N)."""
        z = self.vectors(images)
        return self.codebook.assign(z.flatten(0, 1)).view(z.shape[:2])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, commitment and codes of pictures (B, 3, H, W) in -1..1.

        Returns:
            Reconstructed features (B, N, F), squared commitment (B, N, D), codes (B, N).
        """
        z = self.vectors(images)
        flat = z.detach().flatten(0, 1)
        if self.training and self.codebook.asleep():
            nothing = torch.zeros_like(z), torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device)
            return self._decoded(z), *nothing
        if self.training:
            self.codebook.start(flat)
        indices = self.codebook.assign(flat)
        quantised = self.codebook.vectors[indices].view_as(z)
        if self.training:
            self.codebook.follow(flat, indices)
        features = self._decoded(z + (quantised - z).detach())
        return features, (quantised.detach() - z).square(), indices.view(z.shape[:2])

    def _decoded(self, z: Tensor) -> Tensor:
        """(B, N, D) codes to features (B, N, F)."""
        maps = z.transpose(1, 2).reshape(len(z), -1, *self.decoder.config.grid)
        features: Tensor = self.to_feature(self.decoder.patches(maps))
        return features

    @torch.no_grad()
    def centred(self, features: Tensor) -> Tensor:
        """Teacher features (B, N, F) minus their mean over the first training batch of all ranks."""
        if self.training and not int(self.measured):
            every = _gathered(features.flatten(0, 1))
            self.feature_mean.copy_(every.mean(0))
            self.measured.fill_(1)
        return features - self.feature_mean


def decoder_config(encoder: ModelConfig, layers: int, code_width: int) -> ModelConfig:
    """The decoder reads the map of codes as a picture with patches of one pixel."""
    return ModelConfig(
        layers=layers, width=encoder.width, heads=encoder.heads, ffn=encoder.ffn, image_px=encoder.grid,
        patch_px=1, channels=code_width, norm=encoder.norm, key_bias=encoder.key_bias,
        norm_eps=encoder.norm_eps, mask_token=False, init=encoder.init,
    )  # fmt: skip


def perplexity(counts: Tensor) -> float:
    """Exp of the entropy of a usage histogram: the number of codes in even use that would be as varied."""
    share = counts.double() / counts.sum().clamp(min=1)
    return float(torch.special.entr(share).sum().exp())
