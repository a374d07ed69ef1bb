"""A model of this family as a teacher: our own runs, or any file that ``beitctl.load_model`` reads."""

from functools import partial
from typing import Any

from pydantic import Field
from torch import Tensor

from beitctl.api import Plugin
from beitctl.checkpoints.loading import load_model
from beitctl.engine.learner import PIXELS
from beitctl.errors import UserError
from beitctl.model.multiway import Multiway
from beitctl_plugins.teachers.features import Features, Sight, on_grid


class OwnTeacher(Plugin):
    """A BEiT, VLMo, BEiT-3, ViT or DeiT: patch tokens after the last norm, or after some blocks."""

    path: str
    """A run folder of ``pretrain`` or ``finetune``, or a model file of unilm, timm or transformers."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What the file does not say, such as ``heads``: fields of the model's table."""
    blocks: int | None = Field(default=None, ge=1)
    """Read the output of that many blocks, without a norm; by default all and the last norm, if there is
    one. BEiT's features are best about two thirds up."""
    input_px: int = Field(default=224, ge=8)
    """Side of the picture that the teacher sees, in pixels; positions are resampled."""

    def open(self, grid: int) -> Any:
        """The frozen features on a grid.

        Raises:
            UserError: a setting is needed or does not fit, the model has fewer blocks, or other channels.
            DataError: the file cannot be read, or gives features that are not finite.
        """
        if "image_px" in self.settings:
            raise UserError("beitctl teacher: the size of the pictures is input_px, not settings.image_px")
        loaded: Any = load_model(self.path, **self.settings, image_px=self.input_px)
        model: Multiway = loaded if isinstance(loaded, Multiway) else loaded.model
        config = model.config
        if config.channels != 3:
            raise UserError(f"{self.path}: reads pictures of {config.channels} channels; a teacher sees 3")
        if self.blocks is not None and self.blocks > config.layers:
            raise UserError(f"{self.path}: has {config.layers} blocks, blocks = {self.blocks} is beyond them")
        mean, std = PIXELS[config.pixels]
        sight = Sight(self.path, self.input_px, mean, std)
        return Features(model, partial(_patch_map, blocks=self.blocks), sight, grid)


def _patch_map(model: Multiway, pixels: Tensor, blocks: int | None) -> Tensor:
    return on_grid(model.patches(pixels, blocks), 0, "beitctl", model.config.grid)
