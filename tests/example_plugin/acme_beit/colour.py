"""The task ``colour``."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from beitctl.api import Example, Item, Plugin, Term, Tools
from beitctl.data.batch import Group
from beitctl.data.images import centre_crop
from beitctl.engine.losses import masked_cross_entropy
from beitctl.errors import DataError
from beitctl.model.multiway import Encoded

HEAD = "colour"


class Colour(Plugin):
    """Predict which of red, green and blue is strongest in every hidden patch; needs no tokenizer."""

    layout: ClassVar[Literal["image"]] = "image"

    mask_ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of the patches that are hidden, at least one."""

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        """One linear layer."""
        return {HEAD: nn.Linear(tools.model.width, 3)}

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        """The central square; some patches hidden, their strongest channel to be predicted."""
        if example.image is None:
            raise DataError(f"{example.id}: no picture")
        picture, grid, side = (
            tools.pictures.open(example.image, example.id),
            tools.model.grid[0],
            tools.model.patch_px,
        )
        image = tools.pictures.crop(picture, centre_crop(*picture.size), tools.model.side_px)
        strongest = image.reshape(3, grid, side, grid, side).mean((2, 4)).argmax(0).reshape(-1)
        mask = np.zeros(len(strongest), bool)
        mask[draw.permutation(len(mask))[: max(1, int(self.mask_ratio * len(mask)))]] = True
        return Item(image=image, image_mask=mask, patch_targets=np.where(mask, strongest, -1))

    def terms(self) -> Mapping[str, Term]:
        """One loss, averaged over hidden patches."""
        return {"": Term("patch")}

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Channels that the model says."""
        return {"patch": heads[HEAD](encoded.rows[group.patch_rows]).argmax(-1)}

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Cross-entropy over the three channels."""
        return {"": masked_cross_entropy(encoded.rows[group.patch_rows], group.patch_targets, heads[HEAD])}
