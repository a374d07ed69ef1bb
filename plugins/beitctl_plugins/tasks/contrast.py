"""VLMo's two losses beside masked words: image-text contrast, and matching with hard negatives.

Source: arXiv:2111.02358, section 3.2, and its code. Letters: n pairs of this rank, P tokens of a picture, d
width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import Example, Item, Plugin, Term, Tools
from beitctl.config import ModelConfig
from beitctl.data.batch import Group
from beitctl.engine.losses import gather_plain, gather_rows, info_nce
from beitctl.engine.measuring.operations import of_contrast
from beitctl.errors import UserError
from beitctl.model.flops import Flops, linear_weights, of_head, of_pass
from beitctl.model.heads import ContrastiveHead, Pooler
from beitctl.model.multiway import Encoded, Packed
from beitctl.model.plan import BatchPlan
from beitctl_plugins.tasks.preparing import caption_of, framed, loaded, longest, view_of

UNIMODAL, FUSED, POOLER, MATCHING = "contrastive", "contrastive_fused", "pooler", "matching"


class ContrastAndMatch(Plugin):
    """Bring pictures and their captions together (ITC), and tell right pairs from hard wrong ones (ITM).

    ITC compares class tokens of the unimodal experts, and those of a branch that leaves for the
    vision-language experts where they begin; both count half. ITM encodes each pair, each text with a wrong
    picture and each picture with a wrong text, drawn from the softmax of ITC's similarities over all ranks.
    """

    layout: ClassVar[Literal["dual"]] = "dual"

    match: bool = True
    """Whether ITM is trained as well."""
    match_weight: float = Field(default=1.0, gt=0)
    """Weight of ITM beside ITC."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the picture that a training crop shows."""
    text_tokens: int = Field(default=0, ge=0)
    """Longest caption in tokens, special tokens included; 0: the model's longest text."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task for short texts."""
        return {**table, "text_tokens": 0}

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("sample")} | ({"match": Term("sample", self.match_weight)} if self.match else {})

    def depths(self, config: ModelConfig) -> Sequence[int]:
        """Where the branch for the vision-language experts leaves."""
        return [config.first_fusion]

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        if not tools.model.fusion_layers:
            raise UserError("contrast-and-match needs vision-language experts: set fusion_layers above 0")
        width = tools.model.width
        found: dict[str, nn.Module] = {UNIMODAL: ContrastiveHead(width), FUSED: ContrastiveHead(width)}
        if self.match:
            found |= {POOLER: Pooler(width, norm=False), MATCHING: nn.Linear(width, 2)}
        return found

    def operations(
        self, config: ModelConfig, plan: BatchPlan, group: Group, heads: Mapping[str, Any]
    ) -> Flops:
        """Operations of the heads, the second branch and the three kinds of pairs, by their own texts."""
        samples = group.counts["sample"]
        total = of_pass(config, plan, blocks=config.fusion_layers, embedded=False)
        for name in (UNIMODAL, FUSED):
            total += of_contrast(samples, heads[name])
        if self.match:
            places = np.searchsorted(plan.text_starts, group.text_first.cpu().numpy())
            known = plan.pair_lengths + plan.text_lengths
            lengths = tuple(known[place] for place in places)
            total += of_pass(config, BatchPlan(plan.picture_tokens, 0, 3 * lengths))
            weights = linear_weights(heads[POOLER]) + linear_weights(heads[MATCHING])
            total += of_head(3 * samples, weights)
        return total

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        tokenizer = loaded(tools)
        ids = tokenizer.encode(caption_of(example, draw, tools))[: longest(self.text_tokens, tools) - 2]
        image = view_of(example, draw, tools, self.crop_scale)
        chance = (float(draw.random()), float(draw.random()))
        return Item(image=image, text=framed(ids, tokenizer), chance=chance)

    def output(
        self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of pictures and of texts, (n, d) each, and the scale of the logits."""
        return _vectors(heads[UNIMODAL], encoded.rows, group)

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        pictures, texts, scale = self.output(encoded, group, heads)
        total, hits, logits = info_nce(pictures, texts, scale)
        fused, _, _ = info_nce(*_vectors(heads[FUSED], encoded.fused(), group))
        found = {"": ((total + fused) / 2, hits)}
        if self.match:
            with torch.no_grad():
                backward = scale * texts @ gather_rows(pictures)[0].T
            found["match"] = _match(encoded, group, heads, logits.detach(), backward)
        return found


def _vectors(head: nn.Module, rows: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = head(rows[group.picture_rows[:, 0]], rows[group.text_first])
    return found


def _match(
    encoded: Encoded, group: Group, heads: Mapping[str, nn.Module], to_text: Tensor, to_picture: Tensor
) -> tuple[Tensor, Tensor]:
    """A third of the sum of the losses of right and wrong pairs, and of the number of right answers."""
    count = len(group.picture_rows)
    own = gather_rows(to_text[:, :0])[1] + torch.arange(count, device=to_text.device)
    wrong_text = _drawn(to_text, own, group.chance[:, 0])
    wrong_picture = _drawn(to_picture, own, group.chance[:, 1])
    packed = _triples(encoded, group, wrong_picture, wrong_text)
    rows = encoded.model.encoded(packed).rows
    first = torch.from_numpy(packed.layout.plan.text_starts.copy()).to(rows.device)
    logits = heads[MATCHING](heads[POOLER](rows[first])).float()
    labels = (torch.arange(len(logits), device=logits.device) < count).long()
    right = (logits.detach().argmax(-1) == labels).sum()
    return F.cross_entropy(logits, labels, reduction="sum") / 3, right / 3


def _drawn(logits: Tensor, own: Tensor, chance: Tensor) -> Tensor:
    """One index for each row (n, all) of similarities, drawn by the softmax of all but one's own."""
    others = logits.float().scatter(1, own[:, None], float("-inf"))
    ladder = others.softmax(-1).cumsum(-1)
    found = torch.searchsorted(ladder, chance[:, None] * ladder[:, -1:], right=True)
    found = found[:, 0].clamp(max=logits.shape[1] - 1)  # a chance may be rounded up to 1
    return torch.where(found == own, (own + 1) % logits.shape[1], found)


def _triples(encoded: Encoded, group: Group, wrong_picture: Tensor, wrong_text: Tensor) -> Packed:
    """Each text with its picture, each with a wrong picture, each picture with a wrong text: 3 n pairs."""
    packed, model = encoded.packed, encoded.model
    plan = packed.layout.plan
    pixels = packed.pixels[group.picture_rows[:, 0] // plan.picture_tokens]
    padded, lengths = _texts(packed, group, model.config.text_tokens)
    all_pixels, all_texts, all_lengths = gather_plain(pixels), gather_plain(padded), gather_plain(lengths)
    texts = torch.cat([padded, padded, all_texts[wrong_text]])
    counts = torch.cat([lengths, lengths, all_lengths[wrong_text]])
    real = torch.arange(texts.shape[1], device=texts.device)[None, :] < counts[:, None]
    keep = packed.keep
    if keep is not None:
        sequences = packed.layout.row_sequence
        of_picture, of_text = sequences[group.picture_rows[:, 0]], sequences[group.text_first]
        keep = keep[:, :, torch.cat([of_picture, of_text, of_text])]
    made = BatchPlan(plan.picture_tokens, 0, tuple(counts.tolist()))
    images = torch.cat([pixels, all_pixels[wrong_picture], pixels])
    return replace(
        packed, layout=model.layout(made), pixels=images, image_mask=None, ids=texts[real], keep=keep
    )


def _texts(packed: Packed, group: Group, longest: int) -> tuple[Tensor, Tensor]:
    """Ids (n, longest) of a group's texts, zeros at padding, and their lengths (n,)."""
    plan, ids = packed.layout.plan, packed.ids
    assert ids is not None
    places = np.searchsorted(plan.text_starts, group.text_first.cpu().numpy())
    lengths = torch.tensor((plan.pair_lengths + plan.text_lengths), device=ids.device)[
        torch.from_numpy(places).to(ids.device)
    ]
    at = (group.text_first - plan.cuts[1])[:, None] + torch.arange(longest, device=ids.device)[None, :]
    real = torch.arange(longest, device=ids.device)[None, :] < lengths[:, None]
    return torch.where(real, ids[at.clamp(max=len(ids) - 1)], 0), lengths
