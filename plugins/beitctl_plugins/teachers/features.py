"""What all teachers share: their own normalisation, frozen weights, one vector for each place of a grid."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.errors import DataError, SetupError, UserError

Reader = Callable[[Any, Tensor], Tensor]
"""Reads a network's features of normalised pictures (B, 3, H, W) as a map (B, D, h, w)."""
REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What networks raise at pictures or settings that they do not take."""
LONGEST = 300
"""Characters of another library's message that ours shows."""


@dataclass(frozen=True)
class Sight:
    """What a network must be shown."""

    name: str
    """What messages call the network."""
    input_px: int
    """Side of the square picture in pixels."""
    mean: Sequence[float]
    """Means of the channels, of values in 0..1."""
    std: Sequence[float]
    """Deviations of the channels."""
    doubt: str = ""
    """What else may be wrong where the network refuses a picture, for the message."""


class Features(nn.Module):
    """A frozen network's features, resampled to a grid of patches."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, read: Reader, sight: Sight, grid: int) -> None:
        """Freeze the network and look at two random pictures with it.

        Raises:
            UserError: the network does not read such pictures, or its features fill no square grid.
            DataError: its features are not finite.
        """
        super().__init__()
        if grid < 1:
            raise UserError(f"a teacher's grid must have at least 1 patch a side, found {grid}")
        self.model, self.read, self.sight, self.grid = network, read, sight, grid
        self.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(sight.mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(sight.std, dtype=torch.float32)[:, None, None])
        self.width = self._probed()
        self.to(memory_format=torch.channels_last)  # convolutions run several times faster so on a CPU

    def train(self, mode: bool = True) -> "Features":
        """Stay in eval mode, whatever is trained around it."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 to (B, grid * grid, D)."""
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        maps = self.read(self.model, x)
        if maps.shape[-1] != self.grid or maps.shape[-2] != self.grid:
            maps = F.interpolate(maps.float(), (self.grid, self.grid), mode="bilinear", antialias=True)
        return maps.flatten(2).transpose(1, 2)

    def _probed(self) -> int:
        """The width of the features, after a look at two random pictures."""
        sight = self.sight
        draw = torch.Generator().manual_seed(0)
        pictures = torch.rand(2, 3, sight.input_px, sight.input_px, generator=draw)
        try:
            with torch.no_grad():
                maps = self.read(self.model, (pictures - self.mean) / self.std)
        except REFUSALS as error:
            raise UserError(
                f"{sight.name} {sight.doubt}reads no pictures of input_px = {sight.input_px}: {brief(error)}"
            ) from error
        if maps.ndim != 4 or maps.shape[-1] != maps.shape[-2]:
            raise UserError(
                f"{sight.name}: its features are {tuple(maps.shape[1:])} for a square picture; a teacher's "
                "must be a square map (channels, places, places): choose another stage or model"
            )
        if not maps.isfinite().all():
            raise DataError(
                f"{sight.name}: its features of random pictures are not finite "
                f"({int((~maps.isfinite()).sum())} of {maps.numel()} values): the weights are broken; "
                "download or copy them again"
            )
        return maps.shape[1]


def on_grid(tokens: Any, prefix: int, name: str, grid: tuple[int, int] | None = None) -> Tensor:
    """Tokens (B, n, D) without their first ``prefix`` as a map (B, D, h, w).

    Args:
        tokens: the output of a transformer.
        prefix: class and register tokens, by the model's own statement.
        name: what messages call the network.
        grid: height and width in tokens; by default square.

    Raises:
        UserError: they are no list of tokens, or not as many as the grid has places.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise UserError(
            f"{name}: gives no features of places ({shape}), only something about the whole picture; "
            "a teacher must give patch tokens or feature maps"
        )
    count = tokens.shape[1] - prefix
    height, width = grid or (isqrt(max(count, 0)),) * 2
    if count < 1 or height * width != count:
        raise UserError(
            f"{name}: its {tokens.shape[1]} tokens with {prefix} class or register tokens among them fill "
            f"no {f'grid of {height} x {width}' if grid else 'square grid'}; choose another model or input_px"
        )
    maps: Tensor = tokens[:, prefix:].transpose(1, 2).reshape(len(tokens), -1, height, width)
    return maps


def needed(module: str, command: str) -> Any:
    """Import an optional package.

    Raises:
        SetupError: it is not installed, or broken; says the ``command`` that mends it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise SetupError(f"this teacher needs the package {module} ({error}): {command}") from error


def brief(error: BaseException) -> str:
    """Another library's message in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
