"""Image classification on the vision branch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import Example, Examples, Item, Log, Plugin, Term, Tools
from beitctl.data.batch import Group
from beitctl.data.images import centre_crop
from beitctl.errors import DataError, UserError
from beitctl.report import figures
from beitctl_plugins.tasks.preparing import view_of

HEAD = "classifier"


class PooledClassifier(nn.Module):
    """Mean of the patches, LayerNorm, linear: BEiT's head for ImageNet."""

    def __init__(self, width: int, classes: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps)
        self.linear = nn.Linear(width, classes)

    def forward(self, patches: Tensor) -> Tensor:
        """(n, N, d) encoded patches to (n, classes) logits."""
        logits: Tensor = self.linear(self.norm(patches.mean(1)))
        return logits


class Classification(Plugin):
    """Tell the class of a picture from the mean of its patches."""

    layout: ClassVar[Literal["image"]] = "image"

    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Probability that the target spreads over all classes."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Smallest and largest share of the picture that a training crop shows."""

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("sample")}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        if len(tools.labels) < 2:
            raise UserError(
                f"classification needs at least two classes, the source has {len(tools.labels)}: "
                'give an image-folder with labels = "folders", or pairs with a label column'
            )
        return {HEAD: PooledClassifier(tools.model.width, len(tools.labels), tools.model.norm_eps)}

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        if example.label not in tools.labels:
            raise DataError(f"{example.id}: label {example.label!r} is none of {', '.join(tools.labels)}")
        image = view_of(example, draw, tools, self.crop_scale)
        return Item(image=image, label=tools.labels.index(example.label))

    def output(self, rows: Tensor, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, classes) logits."""
        logits: Tensor = heads[HEAD](rows[group.picture_rows[:, 1:]])
        return logits.float()

    def loss(self, rows: Tensor, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        logits = self.output(rows, group, heads)
        total = F.cross_entropy(logits, group.labels, reduction="sum", label_smoothing=self.label_smoothing)
        return {"": (total, (logits.detach().argmax(-1) == group.labels).sum())}

    def score(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> dict[str, float]:
        """Accuracy, and that of always saying the most frequent class of the training examples."""
        truth = torch.tensor([tools.labels.index(example.label or "") for example in examples])
        said = torch.cat(list(outputs)).argmax(-1).cpu()
        frequent = Counter(train[index].label for index in range(len(train))).most_common(1)[0][0]
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
