"""A discrete variational autoencoder of pictures: the tokenizer of BEiT-1 that one can train oneself.

The "customized" DiscreteVAE of BEiT-1's code (after lucidrains' DALLE-pytorch), with its parameter names:
strided convolutions to logits of codes, a Gumbel-softmax sample of the codebook, transposed convolutions.
Letters: B pictures of H x W pixels, N = h * w positions, K codes, D width of a code.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.errors import DataError

FACTORS = (-2048144789, -1028477387)
"""Multipliers of MurmurHash3's finalizer, 0x85EBCA6B and 0xC2B2AE35, as int32."""


class ResBlock(nn.Module):
    """Adds three convolutions of x to x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.net(x)
        return out


class DiscreteVAE(nn.Module):
    """Pictures to logits of codes, and codes to pictures; pixels are normalised to -1..1.

    Args:
        layers: halvings of the picture; a code stands for ``2 ** layers`` pixels squared.
        width: channels of the convolutions.
        blocks: residual blocks after every halving and every doubling (BEiT-1's code: 1).
        codes: K.
        code_width: D.
        channels: channels of a picture.

    Source: microsoft/unilm, ``beit/modeling_discrete_vae.py``, class ``DiscreteVAE``.
    """

    def __init__(
        self, layers: int = 3, width: int = 256, blocks: int = 1, codes: int = 8192, code_width: int = 512,
        channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.codes, self.shrink = codes, 2**layers
        self.codebook = nn.Embedding(codes, code_width)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for layer in range(layers):
            fan_in, code_in = (width, width) if layer else (channels, code_width)
            down.append(nn.Sequential(nn.Conv2d(fan_in, width, 4, stride=2, padding=1), nn.ReLU()))
            up.append(nn.Sequential(nn.ConvTranspose2d(code_in, width, 4, stride=2, padding=1), nn.ReLU()))
            down += [ResBlock(width) for _ in range(blocks)]
            up += [ResBlock(width) for _ in range(blocks)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, codes, 1))
        self.decoder = nn.Sequential(*up, nn.Conv2d(width, channels, 1))

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> "DiscreteVAE":
        """A model of the size that a state dict has; its values are not loaded.

        Raises:
            DataError: the state dict is not one of this model.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        layers = _matching(shapes, r"encoder\.\d+\.0\.weight")
        blocks = _matching(shapes, r"encoder\.\d+\.net\.0\.weight")
        match shapes.get("codebook.weight"), shapes.get("encoder.0.0.weight"):
            case (codes, code_width), (width, channels, 4, 4) if layers and blocks % layers == 0:
                return cls(layers, width, blocks // layers, codes, code_width, channels)
        raise DataError(
            "not the weights of a discrete VAE: expected codebook.weight (codes, width of a code) and "
            "encoder.0.0.weight (width, channels, 4, 4); "
            f"found {', '.join(f'{name} {shape}' for name, shape in list(shapes.items())[:3]) or 'nothing'}"
        )

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 to logits (B, N, K), row by row; the last layer computes in fp32.

        Raises:
            ValueError: H or W is no multiple of ``shrink``.
        """
        if images.shape[-1] % self.shrink or images.shape[-2] % self.shrink:
            raise ValueError(
                f"pictures of {tuple(images.shape[-2:])} pixels: sides must be multiples of {self.shrink}"
            )
        dtype = self.codebook.weight.dtype
        x: Tensor = self.encoder[:-1](images.to(dtype, memory_format=torch.channels_last))
        last = cast("nn.Conv2d", self.encoder[-1])
        with torch.autocast(x.device.type, enabled=False):
            rows = x.float().flatten(2).transpose(1, 2)
            return F.linear(rows, last.weight.float().flatten(1), cast("Tensor", last.bias).float())

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 to the most likely codes (B, N) int64."""
        return self.logits(images).argmax(-1)

    def pictures(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Vectors of codes (B, N, D) on a grid (h, w) to pictures (B, 3, H, W) in about -1..1, fp32."""
        maps = vectors.transpose(1, 2)
        out: Tensor = self.decoder(maps.view(*maps.shape[:2], *grid))  # in channels-last order already
        return out.float()

    def forward(
        self, images: Tensor, keys: Tensor, temperature: float, straight_through: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Reconstruct pictures through a relaxed sample of their codes.

        Args:
            images: (B, 3, H, W) in -1..1.
            keys: (B, 2) int32, what the noise of each picture follows from.
            temperature: of the Gumbel-softmax; the lower, the closer is the sample to one code.
            straight_through: use the one most likely code forward, and the relaxed sample backward.

        Returns:
            Pictures (B, 3, H, W), and log-probabilities of the codes (B, N, K), both fp32.
        """
        logits = self.logits(images)
        noise = gumbel(keys, logits.shape[1] * logits.shape[2]).view_as(logits)
        sample = ((logits + noise) / temperature).softmax(-1)
        if straight_through:
            one = F.one_hot(sample.argmax(-1), self.codes).to(sample.dtype)
            sample = one + sample - sample.detach()
        table = self.codebook.weight
        grid = (images.shape[-2] // self.shrink, images.shape[-1] // self.shrink)
        return self.pictures(sample.to(table.dtype) @ table, grid), logits.log_softmax(-1)


def gumbel(keys: Tensor, count: int) -> Tensor:
    """Gumbel noise (B, count) fp32: number i of a picture is a hash of (its key, i) and of nothing else.

    Counter-based, so that it depends on no generator's state: equal on every rank, in every pass, and up to
    rounding on every device. MurmurHash3's finalizer is applied twice, once for each half of the key.

    Args:
        keys: (B, 2) int32.
        count: numbers for each picture.
    """
    mixed = _mix(torch.arange(count, dtype=torch.int32, device=keys.device) ^ keys[:, :1])
    mixed = _mix(mixed ^ keys[:, 1:])
    uniform = ((mixed >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2**-23)  # 23 bits: never 0 and never 1
    return uniform.log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer, in place; int32 products wrap around."""
    for shift, factor in ((16, FACTORS[0]), (13, FACTORS[1])):
        x ^= (x >> shift) & ((1 << (32 - shift)) - 1)
        x *= factor
    x ^= (x >> 16) & 0xFFFF
    return x


def kl_to_uniform(shares: Tensor, logs: Tensor) -> Tensor:
    """KL divergence (B, N) in nats of probabilities (B, N, K), given with their logarithms, to 1 / K."""
    return (shares * logs).sum(-1) + math.log(logs.shape[-1])


def initial_dvae(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Initial value of a parameter, fp32 on the CPU, from its own generator.

    As PyTorch builds BEiT-1's class: the codebook is N(0, 1), weights of convolutions are
    U(+-1 / sqrt(fan in)); but biases are 0.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    value = torch.empty(shape)
    if name.endswith("codebook.weight"):
        return value.normal_(generator=draw)
    if len(shape) == 1:
        return value.zero_()
    fan_in = shape[1:].numel()  # of a transposed convolution, too, this is what PyTorch counts
    return value.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=draw)


def _matching(names: Iterable[str], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)
