"""VQ-KD, the image tokenizer of BEiT v2 (arXiv:2208.06366): a Vision Transformer to a codebook, and back.

Both halves are Multiway models without a language branch; ``beitctl.model.codebook`` has what is between.
Letters: B pictures, N patches, K codes, D width of a code, F width of the teacher's features.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.codebook import Codebook
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


class VQKDModel(nn.Module):
    """Encoder, codebook, decoder; the encoder's half is the tokenizer."""

    feature_mean: Tensor

    def __init__(self, encoder: ModelConfig, decoder_layers: int, features: int, codebook: Codebook) -> None:
        super().__init__()
        decoder = decoder_config(encoder, decoder_layers, codebook.width)
        self.encoder = Multiway(encoder)
        self.to_code = TaskLayer(encoder.width, codebook.width)
        self.codebook = codebook
        self.decoder = Multiway(decoder)
        self.to_feature = TaskLayer(decoder.width, features)
        self.register_buffer("feature_mean", torch.empty(features))

    def reset_buffers(self) -> None:
        """Nothing is subtracted from the teacher's features."""
        self.feature_mean.zero_()

    def vectors(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 to unit vectors (B, N, D)."""
        return F.normalize(self.to_code(self.encoder.patches(images)), dim=-1)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 to codes (B, N)."""
        z = self.vectors(images)
        return self.codebook.assign(z.flatten(0, 1)).view(z.shape[:2])

    def quantised(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Closest code vectors (B, N, D) of unit vectors (B, N, D), and their numbers (B, N)."""
        indices = self.codebook.assign(z.detach().flatten(0, 1))
        return self.codebook.vectors[indices].view_as(z), indices.view(z.shape[:2])

    def features(self, z: Tensor) -> Tensor:
        """(B, N, D) code vectors to reconstructed features (B, N, F)."""
        maps = z.transpose(1, 2).reshape(len(z), -1, *self.decoder.config.grid)
        found: Tensor = self.to_feature(self.decoder.patches(maps))
        return found

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, commitment and codes of pictures (B, 3, H, W) in -1..1.

        Returns:
            Reconstructed features (B, N, F), squared commitment (B, N, D), codes (B, N).
        """
        z = self.vectors(images)
        codes, indices = self.quantised(z)
        return self.features(z + (codes - z).detach()), (codes - z).square(), indices


def decoder_config(encoder: ModelConfig, layers: int, code_width: int) -> ModelConfig:
    """The decoder reads the map of codes as a picture with patches of one pixel."""
    return ModelConfig(
        layers=layers, width=encoder.width, heads=encoder.heads, ffn=encoder.ffn, image_px=encoder.grid,
        patch_px=1, channels=code_width, norm=encoder.norm, key_bias=encoder.key_bias,
        norm_eps=encoder.norm_eps, mask_token=False, init=encoder.init,
    )  # fmt: skip
