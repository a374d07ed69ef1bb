"""OpenAI's DALL-E encoder: the image tokenizer of BEiT-1. Names of parameters are those of the official file.

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
    """Residual bottleneck of four convolutions, each after a ReLU."""

    def __init__(self, fan_in: int, fan_out: int, gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = nn.Identity() if fan_in == fan_out else Conv(fan_in, fan_out, 1)
        inner = fan_out // 4
        plan = ((fan_in, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, fan_out, 1))
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


def map_pixels(x: Tensor) -> Tensor:
    """Map values in [0, 1] to [0.1, 0.9], which the encoder was trained on; no mean or deviation."""
    return (1 - 2 * EPSILON) * x + EPSILON
