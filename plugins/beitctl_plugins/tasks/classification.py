"""Image classification on the vision branch."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import Example, Examples, Item, Log, Plugin, TeacherField, Term, Tools
from beitctl.config import ModelConfig
from beitctl.data.batch import Group
from beitctl.data.images import centre_crop
from beitctl.data.labels import labels
from beitctl.engine.learner import PIXELS, raw
from beitctl.errors import DataError, UserError
from beitctl.model.heads import Classifier
from beitctl.model.multiway import Encoded
from beitctl.report import figures
from beitctl_plugins.tasks.preparing import view_of

HEAD = "classifier"


class Classification(Plugin):
    """Tell the class of a picture."""

    layout: ClassVar[Literal["image"]] = "image"
    labelled: ClassVar[bool] = True
    """Whether examples need a label."""

    pool: Literal["mean", "cls"] = "mean"
    """What is read: ``mean``: the mean patch under a norm of its own, in place of the model's last norm
    (BEiT, BEiT-3); ``cls``: the class token after the model's last norm (ViT), DeiT's distillation token as
    well."""

    distil: TeacherField | None = None
    """Frozen classifier whose answers the distillation token learns beside the labels, at equal weight
    (DeiT)."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Probability that the target spreads over all classes."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest share of the picture that a training crop shows."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task with a small random teacher, if any, and unsmoothed: that loss has no floor."""
        small = {"kind": "timm", "model": "test_efficientnet", "weights": "random", "input_px": 32}
        return {**table, "label_smoothing": 0.0, **({"distil": small} if "distil" in table else {})}

    def terms(self) -> Mapping[str, Term]:
        return (
            {"": Term("sample")}
            if self.distil is None
            else {"": Term("sample", 0.5), "teacher": Term("sample", 0.5)}
        )

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        if len(tools.labels) < 2:
            raise UserError(
                f"classification needs at least two classes, the source has {len(tools.labels)}: "
                'give an image-folder with labels = "folders", or pairs with a label column'
            )
        if self.distil is not None and (self.pool != "cls" or not tools.model.distill_token):
            raise UserError('distil needs a token that learns it: set distill_token = true and pool = "cls"')
        return {HEAD: Classifier(tools.model, len(tools.labels))}

    def fitted(self, config: ModelConfig) -> ModelConfig:
        """The model that is fine-tuned: pooling decides on the final norm."""
        return replace(config, final_norm=self.pool == "cls")

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        if example.label not in tools.labels:
            raise DataError(f"{example.id}: label {example.label!r} is none of {', '.join(tools.labels)}")
        image = view_of(example, draw, tools, self.crop_scale)
        return Item(image=image, label=tools.labels.index(example.label))

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, classes) logits."""
        logits: Tensor = heads[HEAD](encoded.rows[group.picture_rows])
        return logits.float()

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        head = cast("Classifier", heads[HEAD])
        by_class, by_teacher = head.both(encoded.rows[group.picture_rows])
        if self.distil is None or by_teacher is None:
            return {"": self._entropy(self.output(encoded, group, heads), group.labels, self.label_smoothing)}
        tokens, config = group.picture_rows.shape[1], encoded.model.config
        pixels = encoded.packed.pixels[group.picture_rows[:, 0] // tokens]
        teacher = _teacher(cast("Hashable", self.distil), by_class.shape[1]).to(pixels.device)
        said = teacher(raw(pixels, PIXELS[config.pixels])).argmax(-1)
        return {
            "": self._entropy(by_class, group.labels, self.label_smoothing),
            "teacher": self._entropy(by_teacher, said, 0.0),
        }

    @staticmethod
    def _entropy(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        return total, (logits.detach().argmax(-1) == labels).sum()

    def score(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> dict[str, float]:
        """Accuracy, and that of always saying the most frequent class of the training examples."""
        truth = torch.tensor([tools.labels.index(example.label or "") for example in examples])
        said = torch.cat(list(outputs)).argmax(-1).cpu()
        frequent = Counter(label for label in labels(train) if label).most_common(1)[0][0]
        return {
            "accuracy": float((said == truth).float().mean()),
            "majority": sum(example.label == frequent for example in examples) / len(examples),
            "examples": float(len(examples)),
        }

    def draw(self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """Confusion matrix, and the surest mistakes."""
        logits = torch.cat(list(outputs)).cpu()
        said, truth = logits.argmax(-1), [tools.labels.index(example.label or "") for example in examples]
        table = np.zeros((len(tools.labels), len(tools.labels)), np.int64)
        np.add.at(table, (np.array(truth, np.int64), said.numpy()), 1)
        log.figure(
            "confusion",
            figures.matrix(table, tools.labels, "True class (rows) and predicted class (columns)"),
            "Confusion matrix",
            "How many held-out pictures of each true class were given each class; a perfect model fills the "
            "diagonal only.",
        )
        sure = logits.softmax(-1).max(-1).values
        order = [int(i) for i in sure.argsort(descending=True)]
        wrong = [i for i in order if int(said[i]) != truth[i]][:8]
        right = [i for i in order if int(said[i]) == truth[i]][:8]
        rows = [
            figures.Row(
                [self._tile(i, examples[i], int(said[i]), float(sure[i]), tools) for i in chosen], title
            )
            for chosen, title in ((right, "surest right answers"), (wrong, "surest mistakes"))
            if chosen
        ]
        log.figure(
            "answers",
            figures.gallery(rows, tile_px=96),
            "Answers",
            "Class given and its probability; true class below.",
        )

    @staticmethod
    def _tile(index: int, example: Example, said: int, sure: float, tools: Tools) -> figures.Tile:
        picture = tools.pictures.open(example.image, example.id)
        image = tools.pictures.crop(picture, centre_crop(*picture.size), 96).transpose(1, 2, 0)
        right = tools.labels[said] == example.label
        caption = f"{tools.labels[said]} {sure:.0%}" + ("" if right else f" (true: {example.label})")
        return figures.Tile(image, caption, "right" if right else "wrong")


@cache
def _teacher(plugin: Any, classes: int) -> Any:
    """The frozen classifier, opened once."""
    return plugin.classifier(classes)
