"""transformers' and timm's BEiT-1 on pictures of ``benchmarks.mixed``; ours gets its weights from them."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.checkpoints import mapping
from beitctl.checkpoints.timm import BEIT
from beitctl.checkpoints.transformers import TransformersBeit
from beitctl.config import ModelConfig
from beitctl.data.batch import Batch
from beitctl.engine.learner import PIXELS, normalise

Settings = Mapping[str, Any]


class Transformers(nn.Module):
    """``BeitForMaskedImageModeling``; its head reads all patches, as its ``forward`` has it."""

    form = TransformersBeit()

    def __init__(self, settings: Settings, codes: int) -> None:
        super().__init__()
        self.note = transformers.BeitConfig(
            hidden_size=settings["width"], num_hidden_layers=settings["layers"],
            num_attention_heads=settings["heads"], intermediate_size=settings["ffn"],
            patch_size=settings["patch_px"], vocab_size=codes, use_mask_token=True,
            use_shared_relative_position_bias=True, drop_path_rate=0.0,
        )  # fmt: skip
        self.body = transformers.BeitForMaskedImageModeling(self.note)

    def official(self) -> dict[str, Tensor]:
        """Its state under its own names."""
        return dict(self.body.state_dict())

    def config(self) -> dict[str, Any]:
        """What its ``config.json`` would say."""
        note: Any = self.note
        found: dict[str, Any] = note.to_dict()
        return found

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of the hidden patches."""
        found: Tensor = self.body(
            given["pixels"], bool_masked_pos=given["mask"], labels=given["targets"]
        ).loss
        return found


class Timm(nn.Module):
    """timm's BEiT, which has no mask token, with a head on the rows that predict."""

    form = BEIT

    def __init__(self, settings: Settings, codes: int) -> None:
        super().__init__()
        self.body = timm.create_model(
            "beit_base_patch16_224", num_classes=0, global_pool="token", use_fc_norm=False,
            embed_dim=settings["width"], depth=settings["layers"], num_heads=settings["heads"],
            mlp_ratio=settings["ffn"] / settings["width"], patch_size=settings["patch_px"],
        )  # fmt: skip
        self.head = nn.Linear(settings["width"], codes)

    def official(self) -> dict[str, Tensor]:
        """Its state under its own names, the head left out."""
        return dict(self.body.state_dict())

    def config(self) -> dict[str, Any]:
        """What its ``config.json`` would say."""
        return {"architecture": "beit_base_patch16_224", "num_classes": 0, "global_pool": "token"}

    def forward(self, given: Mapping[str, Tensor]) -> Tensor:
        """Mean loss at the hidden places, whose pixels it sees."""
        body: Any = self.body
        rows = body.forward_features(given["pixels"])[given["places"]]
        return F.cross_entropy(self.head(rows).float(), given["targets"])


KINDS: dict[str, type[Transformers] | type[Timm]] = {"transformers": Transformers, "timm": Timm}


def ours_of(module: Transformers | Timm) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The settings of our model and its weights (``model.*``, ``heads.*``), read from the official one."""
    state = module.official()
    config = module.form.config(state, module.config(), {})
    table = module.form.table(config, {name: value.shape for name, value in state.items()})
    if found := mapping.problems(table, state):
        raise ValueError("; ".join(found))
    tensors, _ = mapping.read(table, state)
    if isinstance(module, Timm):
        tensors |= {f"heads.image_codes.{name}": value for name, value in module.head.state_dict().items()}
    return config, tensors


def theirs_of(
    module: Transformers | Timm, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Our gradients under the names of the official module's parameters."""
    table = module.form.table(config, {name: value.shape for name, value in module.official().items()})
    found = {f"body.{name}": value for name, value in mapping.write(table, tensors, {}).items()}
    if isinstance(module, Timm):
        head = "heads.image_codes."
        found |= {f"head.{n.removeprefix(head)}": t for n, t in tensors.items() if n.startswith(head)}
    return found


def given_of(batch: Batch, config: ModelConfig) -> dict[str, Tensor]:
    """What an official module reads of a batch of pictures."""
    group = batch.groups["image"]
    places = torch.zeros(batch.plan.tokens, dtype=torch.bool)
    places[group.patch_rows] = True
    places = places.view(batch.plan.images, config.picture_tokens)
    return {
        "pixels": normalise(batch.pixels, PIXELS[config.pixels]),
        "mask": places[:, config.prefix :],
        "places": places,
        "targets": group.patch_targets,
    }
