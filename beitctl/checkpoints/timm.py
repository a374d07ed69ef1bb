"""timm's picture encoders: ``Beit`` (beit_*, beitv2_*), BEiT-3's vision branch (beit3_*), ViT and DeiT.

Sources: huggingface/pytorch-image-models, timm/models/beit.py, vision_transformer.py and deit.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from beitctl.checkpoints.mapping import Table
from beitctl.checkpoints.unilm_beit import GAMMAS, body, classifier, is_vit, told_by_shapes
from beitctl.config import ModelConfig

MEANS = {0.5: "half", 0.485: "imagenet", 0.48145466: "clip"}
"""Normalisations by the mean of their first channel."""


@dataclass(frozen=True)
class Timm:
    """One of timm's classes; the mean patch is read with ``fc_norm``, the class token with ``norm``."""

    name: str
    mark: str
    """End of a name that none of the classes that are tried later has."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Settings that all its files have."""
    pixels: str = "half"
    """Normalisation where no ``config.json`` says it."""
    scales: tuple[str, str] = GAMMAS

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the names are those of this format."""
        return is_vit(state) and any(n.startswith("blocks.") and n.endswith(self.mark) for n in state)

    def config(
        self, state: Mapping[str, Tensor], note: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> ModelConfig:
        """The model's settings; timm's ``config.json`` may say the heads, a size and the normalisation.

        Without it beitv2_* pass for beit_*, which are normalised otherwise: give ``pixels="imagenet"``.

        Raises:
            ValueError: no positions, or they are not those of a square and nothing says what they are; a
                pooling or a normalisation that no model here has.
            UserError: nothing says the number of heads.
        """
        _check_pooling(state, note)
        arguments, published = _part(note, "model_args"), _part(note, "pretrained_cfg")
        sizes = [settings.get("image_px"), _listed(published, "input_size")[1:]]
        told = told_by_shapes(state, arguments.get("num_heads", settings.get("heads")), sizes, self.scales)
        default = "imagenet" if told["distill_token"] else self.pixels
        pixels: Any = settings.get("pixels") or _pixels(published, default)
        return ModelConfig(**told, **self.fixed, pixels=pixels, init="beit")

    def table(self, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Table:
        """The pairs for a model."""
        return Table([*body(config, self.scales), *classifier(config, shapes)])


def _part(note: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = note.get(name)
    return found if isinstance(found, dict) else {}


def _listed(part: Mapping[str, Any], name: str) -> list[Any]:
    found = part.get(name)
    return found if isinstance(found, list) else []


def _check_pooling(state: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Refuse a classifier that reads other tokens than its norm tells here."""
    pooling, norm = note.get("global_pool"), "fc_norm" if "fc_norm.weight" in state else "norm"
    if "head.weight" in state and pooling not in (None, "avg" if norm == "fc_norm" else "token"):
        raise ValueError(
            f'its config.json says global_pool "{pooling}" and it holds {norm}; '
            'what is read: fc_norm with "avg", norm with "token"'
        )


def _pixels(published: Mapping[str, Any], default: str) -> str:
    mean = _listed(published, "mean")
    if not mean:
        return default
    if mean[0] not in MEANS:
        raise ValueError(
            f"its config.json normalises pictures with the mean {mean}, which no model here does: "
            f"give pixels=, one of {', '.join(MEANS.values())}"
        )
    return MEANS[mean[0]]


BEIT = Timm("timm BEiT", ".attn.q_bias", {"norm": "pre", "key_bias": False, "norm_eps": 1e-6})
BEIT3 = Timm(
    "timm BEiT-3",
    ".attn.norm.weight",
    {"attention": "decoupled", "norm": "sub", "key_bias": True, "norm_eps": 1e-5},
    pixels="imagenet",
)
VIT = Timm(
    "timm ViT",
    ".attn.qkv.bias",
    {"norm": "pre", "key_bias": True, "norm_eps": 1e-6},
    scales=("ls1.gamma", "ls2.gamma"),
)
