"""Vision models of Hugging Face transformers as teachers."""

from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from beitctl.api import Plugin
from beitctl.checkpoints.files import located, looked_at
from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.teachers.features import Features, Sight, brief, needed, on_grid

INSTALL = "pip install 'beitctl[hf]'"
SAFE = {"trust_remote_code": False}
"""Code that comes with a model is not run, and nobody is asked whether it may."""
UNREAD = ("pooler.", "head.")
"""Modules behind the features, which files may lack."""
Colours = tuple[float, float, float]


class TransformersTeacher(Plugin):
    """Any vision model of transformers: its last hidden state, or that of a layer."""

    model: str
    """A folder of ``save_pretrained``, or a name on the Hugging Face Hub."""
    layer: int | None = None
    """Which of ``hidden_states`` is read: 0 is the embedding, -1 the last, without a norm behind it. By
    default ``last_hidden_state``, which has the last norm where the model's code puts it (ViT, DINOv2,
    SigLIP; not CLIP, for which there is the teacher ``clip``)."""
    mean: Colours | None = None
    """Channel means of values in 0..1; by default those of the model's own image processor."""
    std: Colours | None = None
    """Channel deviations; by default those of the model's own image processor."""
    input_px: int = Field(default=224, ge=8)
    """Side of the picture that the teacher sees, in pixels; positions are resampled where the model can."""

    def open(self, grid: int) -> Any:
        """The frozen features on a grid.

        Raises:
            SetupError: transformers is not installed, or the model cannot be fetched.
            UserError: the model reads no such pictures, or has no such layer or no features of places.
            DataError: the folder cannot be read, tensors are missing, or features are not finite.
        """
        hf = needed("transformers", INSTALL)
        folder = self._folder()
        network = self._network(hf, folder)
        sight = Sight(self.model, self.input_px, *self._look(hf, folder), self._doubt())
        read = partial(_hidden, layer=self.layer, name=self.model, extra=_resampling(network, self.input_px))
        return Features(network, read, sight, grid)

    def _doubt(self) -> str:
        return "" if self.layer is None else f"has no layer {self.layer}, or "

    def _folder(self) -> Path | None:
        """The folder that ``model`` names; None where it is a name on the Hub."""
        path = located(self.model)
        with looked_at(path):
            if path.is_dir():
                return path
            if path.exists() or self.model.startswith((".", "/", "~")) or self.model.count("/") > 1:
                raise DataError(f"{path}: no such folder; expected one with a config.json of transformers")
        return None

    def _network(self, hf: Any, folder: Path | None) -> Any:
        try:
            loaded, info = hf.AutoModel.from_pretrained(
                str(folder or self.model), dtype=torch.float32, output_loading_info=True, **SAFE
            )
        except Exception as error:  # transformers runs code of many authors on files of many more
            raise self._unreadable(error, folder) from error
        whole = hasattr(loaded.config, "vision_config")
        network = getattr(loaded, "vision_model", None) if whole else loaded
        if getattr(network, "main_input_name", None) != "pixel_values":
            raise UserError(f"{self.model}: {type(loaded).__name__} reads no pictures; name a vision model")
        prefix = "vision_model." if whole else ""
        names = sorted(n.removeprefix(prefix) for n in info["missing_keys"] if n.startswith(prefix))
        missing = [name for name in names if not name.removeprefix("vision_model.").startswith(UNREAD)]
        if missing:
            more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
            raise DataError(
                f"{self.model}: {len(missing)} tensors of {type(network).__name__} are not in its files: "
                f"{', '.join(missing[:6])}{more}; they would be random. Copy or download it again"
            )
        return network

    def _unreadable(self, error: Exception, folder: Path | None) -> Exception:
        if folder is not None:
            return DataError(f"{folder}: transformers cannot read a model there: {brief(error)}")
        if isinstance(error, OSError):
            return SetupError(f"{self.model}: cannot be fetched from the Hugging Face Hub: {brief(error)}")
        return UserError(f"{self.model}: transformers cannot read it as a model: {brief(error)}")

    def _look(self, hf: Any, folder: Path | None) -> tuple[Colours, Colours]:
        """Means and deviations for values in 0..1."""
        if self.mean is not None and self.std is not None:
            return self.mean, self.std
        try:
            own = hf.AutoImageProcessor.from_pretrained(str(folder or self.model), **SAFE).to_dict()
        except Exception as error:
            raise DataError(
                f"{self.model}: how its pictures are normalised is not said (preprocessor_config.json): "
                f"{brief(error)}. Put that file there, or set the teacher's mean and std"
            ) from error
        plain = not own.get("do_normalize", True)
        factor = 255 * own.get("rescale_factor", 1 / 255) if own.get("do_rescale", True) else 255
        mean = [0.0] * 3 if plain else own.get("image_mean")
        std = [1.0] * 3 if plain else own.get("image_std")
        return self.mean or self._colours(mean, factor), self.std or self._colours(std, factor)

    def _colours(self, found: Any, factor: float) -> Colours:
        if isinstance(found, float | int):
            found = [found] * 3
        if not isinstance(found, list | tuple) or len(found) != 3:
            raise DataError(
                f"{self.model}: its image processor normalises with {found!r}, expected 3 numbers; set the "
                "teacher's mean and std"
            )
        return found[0] / factor, found[1] / factor, found[2] / factor


def _resampling(network: Any, input_px: int) -> dict[str, bool]:
    """The argument that asks for resampled positions, where the model has it and needs it."""
    own = getattr(network.config, "image_size", input_px)
    fits = own == input_px or own in ((input_px, input_px), [input_px, input_px])
    takes = "interpolate_pos_encoding" in signature(network.forward).parameters
    return {"interpolate_pos_encoding": True} if takes and not fits else {}


def _hidden(network: Any, pixels: Tensor, layer: int | None, name: str, extra: dict[str, bool]) -> Tensor:
    """A hidden state as a map (B, D, h, w)."""
    found = network(pixel_values=pixels, output_hidden_states=layer is not None, **extra)
    state = getattr(found, "last_hidden_state", None) if layer is None else found.hidden_states[layer]
    if isinstance(state, Tensor) and state.ndim == 4:
        return state
    patch = getattr(network.config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) and len(set(patch)) == 1 else patch
    if not isinstance(state, Tensor) or state.ndim != 3 or not isinstance(patch, int):
        return on_grid(state, 0, name)
    return on_grid(state, _prefix(network.config, state.shape[1], pixels.shape[-1] // patch, name), name)


def _prefix(config: Any, count: int, side: int, name: str) -> int:
    """How many of ``count`` tokens stand before those of the places, of which there are ``side * side``.

    Class, distillation and register tokens; none where the model merges patches by twos (Swin).

    Raises:
        UserError: the number fits neither.
    """
    spare, most = count - side * side, 2 + getattr(config, "num_register_tokens", 0)
    if 0 <= spare <= most:
        return spare
    if any(count == (side >> halvings) ** 2 for halvings in range(1, side.bit_length())):
        return 0
    raise UserError(
        f"{name}: gives {count} tokens where its patches make a grid of {side} x {side} and at most {most} "
        "class or register tokens; a model that hides patches (MAE) or has no grid cannot be a teacher"
    )
