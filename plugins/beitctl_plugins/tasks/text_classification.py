"""Text classification on the language branch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import Example, Examples, Item, Log, Measured, Plugin, Term, Tools
from beitctl.config import ModelConfig
from beitctl.data.batch import Group
from beitctl.data.labels import labels
from beitctl.errors import DataError, UserError
from beitctl.model.multiway import Encoded
from beitctl.report import figures
from beitctl_plugins.tasks.asking import Choices, need_language, text_ids, text_of
from beitctl_plugins.tasks.classes import draw_confusions

HEAD = "text_classifier"
SHOWN = 6
LETTERS = 160
"""Of a text that is drawn."""


class TextClassification(Plugin):
    """Tell the class of a text, from its first token after the final norm.

    No paper of the family has this task. The head is a single linear layer, as for pictures.
    """

    layout: ClassVar[Literal["text"]] = "text"
    labelled: ClassVar[bool] = True
    """Whether examples need a label."""

    text_tokens: int = Field(default=0, ge=0)
    """Longest text in tokens, start and end included; the rest is cut off and counted. 0: the model's."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Probability that the target spreads over all classes."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task with texts as long as the toy model's, unsmoothed: that loss has no floor."""
        kept = {key: value for key, value in table.items() if key != "text_tokens"}
        return {**kept, "label_smoothing": 0.0}

    @classmethod
    def smoke_data(cls, split: str) -> dict[str, Any]:
        """The embedded prose, labelled by its book."""
        return {"kind": "embedded", "content": "text", "split": split}

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("sample")}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        need_language("text-classification", tools)
        if len(tools.labels) < 2:
            raise UserError(
                f"text-classification needs at least two classes, the source has {len(tools.labels)}: give "
                "texts with a label each"
            )
        return {HEAD: nn.Linear(tools.model.width, len(tools.labels))}

    def fitted(self, config: ModelConfig) -> ModelConfig:
        """The model with its final norm."""
        return replace(config, final_norm=True)

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        if example.label not in tools.labels:
            raise DataError(f"{example.id}: label {example.label!r} is none of {', '.join(tools.labels)}")
        text, _ = text_ids(example, tools, self.text_tokens)
        return Item(text=text, label=tools.labels.index(example.label))

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, classes) logits."""
        logits: Tensor = heads[HEAD](encoded.rows[group.text_first])
        return logits.float()

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        logits = self.output(encoded, group, heads)
        total = F.cross_entropy(logits, group.labels, reduction="sum", label_smoothing=self.label_smoothing)
        return {"": (total, (logits.detach().argmax(-1) == group.labels).sum())}

    def score(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """Accuracy, and that of always saying the most frequent class of the training examples."""
        chosen, frequent = Choices.of(outputs), Counter(label for label in labels(train) if label)
        rows: list[dict[str, Any]] = []
        cut = 0
        for i, (place, sure) in enumerate(zip(chosen.places, chosen.sure, strict=True)):
            example = examples[i]
            cut += text_ids(example, tools, self.text_tokens)[1]
            rows.append(
                {
                    "id": example.id, "predicted": tools.labels[place], "probability": float(sure),
                    "label": example.label,
                }
            )  # fmt: skip
        right = np.array([row["predicted"] == row["label"] for row in rows])
        metrics = {"accuracy": float(right.mean())}
        for usual, _ in frequent.most_common(1):
            metrics["majority"] = sum(row["label"] == usual for row in rows) / len(rows)
        metrics |= {"examples": float(len(rows)), "truncated_texts": float(cut)}
        return Measured(metrics, {"accuracy": right}, rows)

    def draw(self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """Confusion matrix, and texts: the surest right answers and mistakes."""
        chosen = Choices.of(outputs)
        truth = [tools.labels.index(example.label or "") for example in examples]
        draw_confusions(np.array(truth, np.int64), chosen.places, tools.labels, log)
        tiles: dict[bool, list[figures.Tile]] = {True: [], False: []}
        for place in chosen.spread():
            example, said = examples[place], tools.labels[chosen.places[place]]
            row = tiles[example.label == said]
            if len(row) < SHOWN:
                row.append(_tile(example, said, float(chosen.sure[place]), tools))
        titles = {True: "surest right answers", False: "surest mistakes"}
        log.figure(
            "texts",
            figures.gallery(
                [figures.Row(row, titles[right]) for right, row in tiles.items() if row], tile_px=180
            ),
            "Texts",
            "Class given, its probability, and how the text begins.",
        )


def _tile(example: Example, said: str, sure: float, tools: Tools) -> figures.Tile:
    text = text_of(example, tools)
    begins = text[:LETTERS] + ("…" if len(text) > LETTERS else "")
    right = example.label == said
    truth = "" if right else f" (true: {example.label})"
    return figures.Tile(caption=f"{said} {sure:.0%}{truth}: {begins}", frame="right" if right else "wrong")
