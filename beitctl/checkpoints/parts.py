"""What the tables of several formats share: sizes out of shapes, and the pairs of common layers."""

from collections.abc import Iterator, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from beitctl.checkpoints.mapping import Pair, same, view

HEAD_WIDTH = 64
"""Channels of an attention head in nearly all models of the family."""


def shape(state: Mapping[str, Tensor], name: str, axes: int) -> torch.Size:
    """Shape of a tensor that says sizes of the model.

    Raises:
        ValueError: it is not there, or has another number of axes.
    """
    if name not in state:
        raise ValueError(f"there is no {name}, which says a size of the model")
    if state[name].ndim != axes:
        raise ValueError(f"{name} is {tuple(state[name].shape)}, expected {axes} axes")
    return state[name].shape


def rows(shapes: Mapping[str, torch.Size], *names: str) -> int:
    """Rows of the first of these tensors that is there; 0 if none is."""
    return next((shapes[name][0] for name in names if shapes.get(name)), 0)


def square(patches: int) -> int:
    """Side of a square grid of so many patches; 0 if they make none."""
    side = isqrt(max(0, patches))
    return side if side * side == patches else 0


def told_grid(settings: Mapping[str, Any], patch_px: int) -> tuple[int, int] | None:
    """The grid of the settings' ``image_px`` if that is a height and a width that patches divide."""
    told = settings.get("image_px")
    if not isinstance(told, tuple | list) or len(told) != 2 or any(side % patch_px for side in told):
        return None
    return told[0] // patch_px, told[1] // patch_px


def linear(ours: str, theirs: str, out: int, width: int, group: str = "") -> Iterator[Pair]:
    """Weight and bias of a linear layer."""
    yield same(f"{ours}.weight", f"{theirs}.weight", (out, width), group)
    yield same(f"{ours}.bias", f"{theirs}.bias", (out,), group)


def norm(ours: str, theirs: str, width: int, group: str = "") -> Iterator[Pair]:
    """Gain and bias of a LayerNorm."""
    for part in ("weight", "bias"):
        yield same(f"{ours}.{part}", f"{theirs}.{part}", (width,), group)


def patches(ours: str, theirs: str, width: int, channels: int, patch_px: int) -> Iterator[Pair]:
    """The patch projection: a convolution there, a linear layer on flat patches here."""
    kernel = (width, channels, patch_px, patch_px)
    yield view(f"{ours}.weight", f"{theirs}.weight", (width, channels * patch_px**2), kernel)
    yield same(f"{ours}.bias", f"{theirs}.bias", (width,))
