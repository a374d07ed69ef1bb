"""Statements about two pictures: true or false (NLVR2, arXiv:1811.00491)."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import CropScale, Example, Examples, Item, Log, Measured, Plugin, Term, Tools
from beitctl.config import ModelConfig
from beitctl.data.batch import Group
from beitctl.data.images import Crop
from beitctl.data.labels import labels
from beitctl.errors import DataError
from beitctl.model.flops import Flops, linear_weights, of_head
from beitctl.model.heads import MlpHead, Pooler
from beitctl.model.multiway import Encoded
from beitctl.model.plan import BatchPlan
from beitctl.report import figures
from beitctl_plugins.tasks.asking import Choices, need_language, text_ids, text_of
from beitctl_plugins.tasks.augmenting import Augment
from beitctl_plugins.tasks.preparing import view_of

POOLER, HEAD = "pooler", "reasoning"
CLASSES = ("False", "True")
IDENTIFIER = re.compile(r"(.+)-(\d+)-(\d+)-(\d+)")
"""Split, set of pictures, pair of the set, statement of the set."""
SHOWN = 4
TILE_PX = 96
"""Side of each picture of a pair that is drawn."""


class NLVR2Task(Plugin):
    """Tell whether a statement about two pictures is true (NLVR2).

    Each picture is encoded together with the statement. The model's form follows from its ``text_first``:
    BEiT-3 joins the first tokens of picture and text of both; VLMo joins the pooled first tokens of the
    texts, and has a token type for the second picture. Sources: arXiv:2208.10442, arXiv:2111.02358, and the
    code of both.
    """

    layout: ClassVar[Literal["two-pairs"]] = "two-pairs"
    labelled: ClassVar[bool] = True
    """Whether examples need a label."""

    text_tokens: int = Field(default=0, ge=0)
    """Longest statement in tokens, start and end included; the rest is cut off, and counted. 0: the
    model's."""
    crop_scale: CropScale = (0.5, 1.0)
    """Smallest and largest share of each picture that a training crop shows."""
    augment: Augment = ""
    """RandAugment behind the crops: "beit3" for VLMo's runs."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task with texts as long as the toy model's."""
        return {key: value for key, value in table.items() if key != "text_tokens"}

    @classmethod
    def smoke_data(cls, split: str) -> dict[str, Any]:
        """Statements made from the labels of the embedded pictures."""
        return {"kind": "embedded", "content": "statements", "split": split}

    def vocabulary(self, examples: Examples) -> tuple[str, ...]:
        """False is class 0 and True class 1, whatever occurs."""
        return CLASSES

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("sample")}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        need_language("nlvr2", tools)
        width = tools.model.width
        if tools.model.text_first:
            return {
                POOLER: Pooler(width, norm=False),
                HEAD: MlpHead(2 * width, 2 * width, len(CLASSES)),
            }
        return {HEAD: MlpHead(4 * width, 2 * width, len(CLASSES), norm=True)}

    def fitted(self, config: ModelConfig) -> ModelConfig:
        """The model with its final norm; VLMo's gets a token type for second pictures."""
        return replace(config, final_norm=True, token_types=3 if config.token_types else 0)

    def operations(
        self, config: ModelConfig, plan: BatchPlan, group: Group, heads: Mapping[str, nn.Module]
    ) -> Flops:
        """Operations of the heads: VLMo's pooler reads both pairs of a sample."""
        count = group.counts["sample"]
        total = of_head(count, linear_weights(heads[HEAD]))
        return total + of_head(2 * count, linear_weights(heads[POOLER])) if POOLER in heads else total

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        """Both pictures get a crop of their own; only training needs a label."""
        if example.label not in CLASSES and (tools.train or example.label is not None):
            raise DataError(f"{example.id}: label {example.label!r} is neither True nor False")
        if example.second is None:
            raise DataError(f"{example.id}: no second picture")
        text, _ = text_ids(example, tools, self.text_tokens)
        pictures = [
            view_of(one, draw, tools, self.crop_scale, test="squash", augment=self.augment)
            for one in (example, replace(example, image=example.second))
        ]
        return Item(image=pictures[0], second=pictures[1], text=text, label=_class_of(example))

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, 2) logits: false, true."""
        rows, samples = encoded.rows, len(group.picture_rows) // 2
        if POOLER in heads:
            read = heads[POOLER](rows[group.text_first])
        else:
            read = torch.cat([rows[group.picture_rows[:, 0]], rows[group.text_first]], dim=-1)
        logits: Tensor = heads[HEAD](torch.cat([read[:samples], read[samples:]], dim=-1))
        return logits.float()

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        logits = self.output(encoded, group, heads)
        total = F.cross_entropy(logits, group.labels, reduction="sum")
        return {"": (total, (logits.detach().argmax(-1) == group.labels).sum())}

    def score(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """Accuracy, the share of statements right for all their pictures, that of the more frequent class.

        Statements without a label have predictions alone.
        """
        chosen, frequent = Choices.of(outputs), Counter(label for label in labels(train) if label in CLASSES)
        rows: list[dict[str, Any]] = []
        cut = 0
        for i, (place, sure) in enumerate(zip(chosen.places, chosen.sure, strict=True)):
            example = examples[i]
            cut += text_ids(example, tools, self.text_tokens)[1]
            rows.append(
                {
                    "id": example.id, "statement": text_of(example, tools), "predicted": CLASSES[place],
                    "probability": float(sure), "label": example.label,
                }
            )  # fmt: skip
        known = [row for row in rows if row["label"] is not None]
        right = np.array([row["predicted"] == row["label"] for row in known])
        metrics: dict[str, float] = {}
        if known:
            metrics["accuracy"] = float(right.mean())
            for usual, _ in frequent.most_common(1):
                metrics["majority"] = sum(row["label"] == usual for row in known) / len(known)
            metrics |= consistency([row["id"] for row in known], right.tolist())
        metrics |= {
            "examples": float(len(rows)),
            "without_label": float(len(rows) - len(known)),
            "truncated_statements": float(cut),
        }
        return Measured(metrics, {"accuracy": right} if known else {}, rows)

    def draw(self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """Pairs of pictures with their statement: the surest right answers, and the surest mistakes."""
        chosen = Choices.of(outputs)
        titles = ("surest right answers", "surest mistakes", "no label to compare with")
        tiles: dict[str, list[figures.Tile]] = {title: [] for title in titles}
        for place in chosen.spread():
            example, said = examples[place], CLASSES[chosen.places[place]]
            row = tiles[titles[2] if example.label is None else titles[int(example.label != said)]]
            if len(row) < SHOWN:
                row.append(_tile(example, said, float(chosen.sure[place]), tools))
        log.figure(
            "statements",
            figures.gallery(
                [figures.Row(row, title) for title, row in tiles.items() if row], tile_px=2 * TILE_PX
            ),
            "Statements about two pictures",
            "Held-out pairs with their statement and what the model says of it, the surest first: right "
            "answers have green frames. The surest of up to 1,000 statements, evenly spread.",
        )


def consistency(ids: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """Share of statements that are right for all their pictures; nothing where ids do not tell them.

    NLVR2's identifiers are split-set-pair-statement, and a statement of a set is asked of up to four pairs.
    """
    parts = [IDENTIFIER.fullmatch(id) for id in ids]
    groups: dict[tuple[str, ...], bool] = {}
    for part, good in zip(parts, right, strict=True):
        if part is None:
            return {}
        key = part.group(1, 2, 4)
        groups[key] = groups.get(key, True) and good
    return {"consistency": sum(groups.values()) / len(groups)} if groups else {}


def _class_of(example: Example) -> int:
    return CLASSES.index(example.label) if example.label in CLASSES else -1


def _tile(example: Example, said: str, sure: float, tools: Tools) -> figures.Tile:
    """Both pictures side by side, as square as the model sees them."""
    gap = np.full((TILE_PX, TILE_PX // 16, 3), 255, np.uint8)
    seen = [
        tools.pictures.crop(picture, Crop(0, 0, picture.height, picture.width), TILE_PX).transpose(1, 2, 0)
        for picture in (tools.pictures.open(image, example.id) for image in (example.image, example.second))
    ]
    frame: Literal["right", "wrong"] | None = None
    if example.label is not None:
        frame = "right" if example.label == said else "wrong"
    caption = f"{text_of(example, tools)} – {said}, {sure:.0%}"
    return figures.Tile(np.concatenate([seen[0], gap, seen[1]], 1), caption, frame)
