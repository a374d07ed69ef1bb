"""torchscale's BEiT-3 on the batch of ``benchmarks.mixed``, with the weights of ours.

It runs as its users run it: one forward pass for the pictures, one for the texts, one for the pairs, the
latter two padded to their longest text. One pass for all is not possible: a call has one border between the
modalities for all its samples.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchscale.architecture.config import EncoderConfig
from torchscale.model.BEiT3 import BEiT3

from beitctl.checkpoints import mapping
from beitctl.checkpoints.unilm_beit3 import LEADING, UnilmBeit3
from beitctl.config import ModelConfig
from beitctl.data.batch import Batch
from beitctl.engine.learner import PIXELS, normalise

PAD = 1
"""Id at padding, as in BEiT-3's tokenizer."""


Pass = Mapping[str, Any]
"""One forward pass. ``inputs``: what the model is given; ``predicted``: for each head the sample, the place
in the sample and the target of every prediction, (m,) each."""


class Torchscale(nn.Module):
    """torchscale's BEiT-3 with the two heads of pretraining beside it, named as in unilm's files."""

    def __init__(self, config: ModelConfig, codes: int) -> None:
        super().__init__()
        self.beit3 = BEiT3(
            EncoderConfig(
                multiway=True, no_output_layer=True, drop_path_rate=0.0, img_size=config.side_px,
                patch_size=config.patch_px, vocab_size=config.vocabulary,
                max_source_positions=config.text_tokens + LEADING, encoder_layers=config.layers,
                encoder_embed_dim=config.width, encoder_attention_heads=config.heads,
                encoder_ffn_embed_dim=config.ffn,
            )
        )  # fmt: skip
        self.mim_head = nn.Linear(config.width, codes)
        self.mlm_head = nn.Linear(config.width, config.vocabulary)

    def forward(self, given: Pass) -> Tensor:
        """Sum of the mean losses of one pass."""
        rows = self.beit3(**given["inputs"])["encoder_out"]
        losses = [
            F.cross_entropy(getattr(self, head)(rows[at, place]).float(), targets)
            for head, (at, place, targets) in given["predicted"].items()
        ]
        return torch.stack(losses).sum()


def table_of(config: ModelConfig, tensors: Mapping[str, Tensor]) -> mapping.Table:
    """How our tensors (``model.*``, ``heads.*``) lie in torchscale's."""
    return UnilmBeit3().table(config, {name: value.shape for name, value in tensors.items()})


def theirs_of(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights, or gradients, under torchscale's names."""
    table = table_of(config, tensors)
    if left := mapping.untold(table, tensors):
        raise ValueError(f"torchscale has no place for {left}")
    return mapping.write(table, tensors, {})


def built(config: ModelConfig, tensors: Mapping[str, Tensor], codes: int) -> Torchscale:
    """The official model with our weights, fp32 on the CPU."""
    with torch.device("meta"):
        module = Torchscale(config, codes)
    module.load_state_dict(theirs_of(config, tensors), assign=True)
    return module.train()


def passes_of(batch: Batch, config: ModelConfig) -> list[Pass]:
    """The same batch as passes of pictures, of texts and of pairs; kinds without samples are left out."""
    plan, (b0, nv, b1, total) = batch.plan, batch.plan.cuts
    pixels, mask = normalise(batch.pixels, PIXELS[config.pixels]), batch.image_mask
    assert mask is not None
    found: list[Pass] = []
    if plan.images:
        group = batch.groups["image"]
        rows = _place(group.patch_rows, 0, config)
        found.append(
            {
                "inputs": {
                    "visual_tokens": pixels[: plan.images],
                    "vision_masked_position": mask[: plan.images],
                },
                "predicted": {"mim_head": (*rows, group.patch_targets)},
            }
        )
    if plan.text_lengths:
        group, lengths = batch.groups["text"], plan.text_lengths
        ids, pad = _padded(batch.ids[b1 - nv : total - nv], lengths)
        at, place = _text_place(group.text_rows.numpy(), plan.text_starts[plan.pairs :])
        found.append(
            {
                "inputs": {"textual_tokens": ids, "text_padding_position": pad},
                "predicted": {"mlm_head": (at, place, group.text_targets)},
            }
        )
    if plan.pairs:
        group = batch.groups["pair"]
        ids, pad = _padded(batch.ids[: b1 - nv], plan.pair_lengths)
        at, place = _text_place(group.text_rows.numpy(), plan.text_starts[: plan.pairs])
        inputs = {
            "visual_tokens": pixels[plan.images :], "vision_masked_position": mask[plan.images :],
            "textual_tokens": ids, "text_padding_position": pad,
        }  # fmt: skip
        rows = _place(group.patch_rows, b0, config)
        words = (at, place + config.picture_tokens, group.text_targets)
        predicted = {"mlm_head": words, "mim_head": (*rows, group.patch_targets)}
        found.append({"inputs": inputs, "predicted": predicted})
    return found


def _place(rows: Tensor, first: int, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Picture and place in it of packed rows that begin at ``first``."""
    return (rows - first) // config.picture_tokens, (rows - first) % config.picture_tokens


def _text_place(rows: NDArray[np.int64], starts: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Text and place in it of packed rows."""
    at = np.searchsorted(starts, rows, side="right") - 1
    return torch.from_numpy(at), torch.from_numpy(rows - starts[at])


def _padded(ids: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(S, longest) ids, and True where they are padding."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    grid = torch.full(real.shape, PAD)
    grid[real] = ids
    return grid, ~real
