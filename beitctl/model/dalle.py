"""OpenAI's DALL-E encoder, the image tokenizer of BEiT-1, and its decoder, which draws what codes say.

Names of parameters are those of the official files.

Shapes: B pictures of H x W pixels; K codes; h = H / 8, w = W / 8.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.errors import DataError

EPSILON = 0.1
"""What keeps mapped pixels away from 0 and 1 (the logit-Laplace distribution needs it)."""


class Conv(nn.Module):
    """Convolution that keeps the size: weight ``w``, bias ``b``, zeros around the picture."""

    def __init__(self, fan_in: int, fan_out: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(fan_out, fan_in, kernel, kernel) / (fan_in * kernel**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """Residual bottleneck of four convolutions, each after a ReLU.

    Args:
        fan_in: width of what comes in.
        fan_out: width of what goes out; inside it is a quarter of that.
        gain: factor of the residual path.
        kernels: sides of the four convolutions; the decoder has them the other way round.
    """

    def __init__(
        self, fan_in: int, fan_out: int, gain: float, kernels: tuple[int, int, int, int] = (3, 3, 3, 1)
    ) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = nn.Identity() if fan_in == fan_out else Conv(fan_in, fan_out, 1)
        inner = fan_out // 4
        ends = ((fan_in, inner), (inner, inner), (inner, inner), (inner, fan_out))
        plan = [(*widths, kernel) for widths, kernel in zip(ends, kernels, strict=True)]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for number, sizes in enumerate(plan, 1):
            layers[f"relu_{number}"] = nn.ReLU()
            layers[f"conv_{number}"] = Conv(*sizes)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return out


class DalleEncoder(nn.Module):
    """Pictures to logits of codes, in fp32 whatever the autocast.

    Args:
        hidden: width of the first group; each further group has twice the width of the one before.
        codes: number of codes.
        blocks: blocks per group.
        groups: number of groups; all but the last end by halving the picture.
        channels: channels of a picture.

    Source: github.com/openai/DALL-E, ``dall_e/encoder.py``; there CUDA computes all but the logits in fp16.
    """

    def __init__(
        self, hidden: int = 256, codes: int = 8192, blocks: int = 2, groups: int = 4, channels: int = 3
    ) -> None:
        super().__init__()
        self.codes, self.shrink = codes, 2 ** (groups - 1)
        gain = 1 / (groups * blocks) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(channels, hidden, 7))
        width = hidden
        for group in range(groups):
            inside: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(blocks):
                inside[f"block_{block + 1}"] = Block(width, hidden * 2**group, gain)
                width = hidden * 2**group
            if group < groups - 1:
                inside["pool"] = nn.MaxPool2d(2)
            layers[f"group_{group + 1}"] = nn.Sequential(inside)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(width, codes, 1)))
        self.blocks = nn.Sequential(layers)

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> "DalleEncoder":
        """An encoder of the size that a state dict has; its values are not loaded.

        Raises:
            DataError: the state dict is not one of this encoder.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        blocks = sum(name.startswith("blocks.group_1.") and name.endswith(".conv_1.w") for name in shapes)
        match shapes.get("blocks.input.w"), shapes.get("blocks.output.conv.w"):
            case (hidden, channels, 7, 7), (codes, _, 1, 1) if blocks:
                return cls(hidden, codes, blocks, channels=channels)
        raise DataError(
            "not the weights of a DALL-E encoder: expected blocks.input.w (width, channels, 7, 7), "
            "blocks.group_1.block_1.res_path.conv_1.w and blocks.output.conv.w (codes, width, 1, 1); "
            f"found {', '.join(f'{name} {shape}' for name, shape in list(shapes.items())[:3]) or 'nothing'}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, h, w) of pictures (B, 3, H, W) that ``map_pixels`` mapped.

        Raises:
            ValueError: H or W is no multiple of what the pools need.
        """
        if x.shape[-1] % self.shrink or x.shape[-2] % self.shrink:
            raise ValueError(
                f"pictures of {tuple(x.shape[-2:])} pixels: sides must be multiples of {self.shrink}"
            )
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.blocks(x.float())
        return logits

    def tokens(self, images: Tensor) -> Tensor:
        """Codes (B, h * w) int64, row by row, of pictures (B, 3, H, W) in [0, 1]."""
        logits: Tensor = self(map_pixels(images))
        return logits.argmax(1).flatten(1)


class DalleDecoder(nn.Module):
    """Codes to pictures, in fp32 whatever the autocast.

    Args:
        hidden: width of the last group; each group has twice the width of the one after it.
        codes: number of codes.
        blocks: blocks per group.
        first: width that codes are embedded in.
        channels: channels of a picture.

    Source: github.com/openai/DALL-E, ``dall_e/decoder.py``.
    """

    groups = 4

    def __init__(
        self, hidden: int = 256, codes: int = 8192, blocks: int = 2, first: int = 128, channels: int = 3
    ) -> None:
        super().__init__()
        self.codes, self.channels = codes, channels
        gain = 1 / (self.groups * blocks) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(codes, first, 1))
        width = first
        for group in range(self.groups):
            inside: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(blocks):
                out = hidden * 2 ** (self.groups - 1 - group)
                inside[f"block_{block + 1}"] = Block(width, out, gain, (1, 3, 3, 3))
                width = out
            if group < self.groups - 1:
                inside["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
            layers[f"group_{group + 1}"] = nn.Sequential(inside)
        last = Conv(width, 2 * channels, 1)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=last))
        self.blocks = nn.Sequential(layers)

    @classmethod
    def from_shapes(cls, state: Mapping[str, Tensor]) -> "DalleDecoder":
        """A decoder of the size that a state dict has; its values are not loaded.

        Raises:
            DataError: the state dict is not one of this decoder.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        blocks = sum(name.startswith("blocks.group_1.") and name.endswith(".conv_1.w") for name in shapes)
        match shapes.get("blocks.input.w"), shapes.get("blocks.output.conv.w"):
            case (first, codes, 1, 1), (twice, hidden, 1, 1) if blocks and twice % 2 == 0:
                return cls(hidden, codes, blocks, first, twice // 2)
        raise DataError(
            "not the weights of a DALL-E decoder: expected blocks.input.w (width, codes, 1, 1), "
            "blocks.group_1.block_1.res_path.conv_1.w and blocks.output.conv.w (6, width, 1, 1); "
            f"found {', '.join(f'{name} {shape}' for name, shape in list(shapes.items())[:3]) or 'nothing'}"
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) int64 to mean and log-scale (B, 6, 8h, 8w) of a logit-Laplace for every pixel."""
        one = F.one_hot(codes, self.codes).movedim(-1, 1)
        with torch.autocast(codes.device.type, enabled=False):
            out: Tensor = self.blocks(one.float())
        return out

    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures (B, 3, 8h, 8w) in [0, 1] of codes (B, h, w): the mean alone."""
        return unmap_pixels(self(codes)[:, : self.channels].sigmoid())


def map_pixels(x: Tensor) -> Tensor:
    """Map values in [0, 1] to [0.1, 0.9], which the encoder was trained on; no mean or deviation."""
    return (1 - 2 * EPSILON) * x + EPSILON


def unmap_pixels(x: Tensor) -> Tensor:
    """The way back from ``map_pixels``, cut to [0, 1]."""
    return ((x - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)
