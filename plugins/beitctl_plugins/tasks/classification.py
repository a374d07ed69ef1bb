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

from beitctl.api import (
    CropScale,
    Example,
    Examples,
    Item,
    Log,
    Measured,
    Plugin,
    TeacherField,
    Term,
    Tools,
)
from beitctl.config import ModelConfig
from beitctl.data.batch import Group
from beitctl.data.labels import classes, labels
from beitctl.engine.learner import PIXELS, raw
from beitctl.errors import DataError, UserError
from beitctl.model.heads import Classifier
from beitctl.model.multiway import Encoded
from beitctl_plugins.tasks import mixing
from beitctl_plugins.tasks.augmenting import Augment
from beitctl_plugins.tasks.classes import check_labels, draw_answers, draw_confusions, listed, names_in
from beitctl_plugins.tasks.preparing import view_of

HEAD = "classifier"
OCCURRING = "occurring"


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
    class_names: str = ""
    """A text file with the name of one class a line, which fixes the classes and their order; empty: the
    labels of the training examples, sorted."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Probability that the target spreads over all classes."""
    crop_scale: CropScale = (0.3, 1.0)
    """Smallest and largest share of the picture that a training crop shows."""
    augment: Augment = ""
    """RandAugment of training crops: ``beit3`` (N 2, M 7), or a policy of timm such as
    ``rand-m9-mstd0.5-inc1`` (BEiT and BEiT-3 on ImageNet); empty: none."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that a box of a training picture is replaced by noise (BEiT: 0.25)."""
    mixup: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Alpha of mixup, which mixes two pictures and their labels (BEiT: 0.8); 0: off."""
    cutmix: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Alpha of CutMix, which puts a box of one picture into another (BEiT: 1.0); 0: off."""
    mixup_prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that two samples are mixed at all."""
    mixup_switch: float = Field(default=0.5, ge=0, le=1)
    """Probability of CutMix where mixup is on as well."""
    crop_pct: float = Field(default=1.0, gt=0, le=1)
    """Share of the shorter side that is seen in evaluation (BEiT-1, BEiT v2: 0.875 below 384 pixels)."""
    restrict_to: str = ""
    """Classes that answers are limited to in evaluation: ``occurring``: the labels of the measured examples
    (ImageNet-A and -R hold 200 classes of 1,000); or a file with one name a line; empty: all."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task with a small random teacher, if any, on its own classes, unsmoothed and unmixed.

        Losses with smoothed or mixed labels have a floor.
        """
        small = {"kind": "timm", "model": "test_efficientnet", "weights": "random", "input_px": 32}
        left_out = ("mixup", "cutmix", "class_names", "restrict_to")
        kept = {name: value for name, value in table.items() if name not in left_out}
        return {**kept, "label_smoothing": 0.0, **({"distil": small} if "distil" in table else {})}

    @classmethod
    def smoke_data(cls, split: str) -> dict[str, Any]:
        """The embedded pictures."""
        return {"kind": "embedded", "split": split}

    @property
    def even_passes(self) -> bool:
        """Whether every forward pass must hold an even number of samples: they are mixed in twos."""
        return bool(self.mixup or self.cutmix)

    def terms(self) -> Mapping[str, Term]:
        return (
            {"": Term("sample")}
            if self.distil is None
            else {"": Term("sample", 0.5), "teacher": Term("sample", 0.5)}
        )

    def vocabulary(self, examples: Examples) -> tuple[str, ...]:
        """Names of the classes: those of the file, or the labels that occur.

        Raises:
            DataError: the file cannot be used, or lacks the label of an example.
        """
        if not self.class_names:
            return classes(examples)
        names = names_in(self.class_names, "class_names")
        check_labels(examples, names, f"class_names ({self.class_names})")
        return names

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
            raise DataError(f"{example.id}: label {example.label!r} is none of {listed(tools.labels)}")
        image = view_of(example, draw, tools, self.crop_scale, crop_pct=self.crop_pct, augment=self.augment)
        return Item(image=image, label=tools.labels.index(example.label), chance=self._chance(draw, tools))

    def _chance(self, draw: np.random.Generator, tools: Tools) -> tuple[float, ...]:
        if not tools.train or not (self.even_passes or self.erase):
            return ()
        px = tools.model.side_px
        return (
            *mixing.mix_draws(draw, px, (self.mixup, self.cutmix), self.mixup_prob, self.mixup_switch),
            *mixing.erase_draws(draw, px, self.erase),
        )

    def augmented(self, pixels: Tensor, group: Group) -> Tensor:
        """Normalised pictures (n, 3, H, W) of training with boxes erased, then mixed in twos.

        Raises:
            ValueError: they are to be mixed and n is odd.
        """
        if self.erase and group.chance.shape[1]:
            pixels = mixing.erased(pixels, group.chance[:, mixing.ERASE])
        if self.even_passes and group.chance.shape[1]:
            pixels = mixing.mixed(pixels, group.chance[:, mixing.MIX])
        return pixels

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, classes) logits."""
        logits: Tensor = heads[HEAD](encoded.rows[group.picture_rows])
        return logits.float()

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        head = cast("Classifier", heads[HEAD])
        by_class, by_teacher = head.both(encoded.rows[group.picture_rows])
        if self.distil is None or by_teacher is None:
            return {"": self._labels(self.output(encoded, group, heads), encoded, group)}
        tokens, config = group.picture_rows.shape[1], encoded.model.config
        pixels = encoded.packed.pixels[group.picture_rows[:, 0] // tokens]
        teacher = _teacher(cast("Hashable", self.distil), by_class.shape[1]).to(pixels.device)
        said = teacher(raw(pixels, PIXELS[config.pixels])).argmax(-1)
        return {
            "": self._labels(by_class, encoded, group),
            "teacher": self._entropy(by_teacher, said, 0.0),
        }

    def _labels(self, logits: Tensor, encoded: Encoded, group: Group) -> tuple[Tensor, Tensor]:
        """Loss and hits of the labels; of mixed samples a hit is the class with the larger share."""
        if not (self.even_passes and group.chance.shape[1] and encoded.model.training):
            return self._entropy(logits, group.labels, self.label_smoothing)
        draws = group.chance[:, mixing.MIX]
        targets = mixing.soft_targets(group.labels, draws, logits.shape[1], self.label_smoothing)
        hits = logits.detach().argmax(-1) == mixing.dominating(group.labels, draws)
        return mixing.soft_entropy(logits.float(), targets), hits.sum()

    @staticmethod
    def _entropy(logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        return total, (logits.detach().argmax(-1) == labels).sum()

    def score(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """Accuracy, that among the first five, the loss, and what the most frequent training class gives."""
        ids, true = zip(*((example.id, str(example.label)) for example in examples), strict=True)
        logits, allowed = self._answers(outputs, true, tools)
        truth = _numbers(true, tools)
        best = logits.topk(min(5, allowed)).indices
        found = best == truth[:, None]
        frequent = Counter(label for label in labels(train) if label).most_common(1)[0][0]
        each = {"accuracy": found[:, 0].double().numpy()}
        each |= {"accuracy_top5": found.any(1).double().numpy()} if allowed > 5 else {}
        metrics = {name: float(values.mean()) for name, values in each.items()}
        metrics |= {
            "majority": true.count(frequent) / len(true),
            "loss": float(F.cross_entropy(logits, truth)),
            "examples": float(len(true)),
        }
        sure = logits.softmax(-1).max(-1).values.tolist()
        rows = []
        for id, name, probability, five in zip(ids, true, sure, best.tolist(), strict=True):
            top = [tools.labels[number] for number in five]
            rows.append(
                {"id": id, "label": name, "predicted": top[0], "probability": probability, "top5": top}
            )
        return Measured(metrics, each, rows)

    def _answers(self, outputs: Sequence[Tensor], true: Sequence[str], tools: Tools) -> tuple[Tensor, int]:
        """(n, classes) logits, -inf at classes that are no answer, and how many are.

        Raises:
            DataError: ``restrict_to`` names a class that the model does not know, or lacks a true one.
        """
        logits = torch.cat(list(outputs)).float().cpu()
        if not self.restrict_to:
            return logits, len(tools.labels)
        if self.restrict_to == OCCURRING:
            names: set[str] = set(true)
        else:
            names = set(names_in(self.restrict_to, "restrict_to"))
            for missing, what in (
                (names - set(tools.labels), "names classes that the model does not know"),
                (set(true) - names, "lacks classes of the measured examples"),
            ):
                if missing:
                    raise DataError(f"restrict_to: {self.restrict_to} {what}: {listed(sorted(missing))}")
        allowed = torch.tensor([name in names for name in tools.labels])
        return logits.masked_fill(~allowed, -torch.inf), int(allowed.sum())

    def draw(self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """Confusion matrix, table of the classes, the surest right answers and mistakes."""
        true = [str(example.label) for example in examples]
        logits, _ = self._answers(outputs, true, tools)
        truth = _numbers(true, tools).numpy()
        draw_confusions(truth, logits.argmax(-1).numpy(), tools.labels, log)
        draw_answers(truth, logits.softmax(-1).numpy(), examples, tools, log)


def _numbers(names: Sequence[str], tools: Tools) -> Tensor:
    """(n,) numbers of classes by their names."""
    known = {name: number for number, name in enumerate(tools.labels)}
    return torch.tensor([known[name] for name in names])


@cache
def _teacher(plugin: Any, classes: int) -> Any:
    """The frozen classifier, opened once."""
    return plugin.classifier(classes)
