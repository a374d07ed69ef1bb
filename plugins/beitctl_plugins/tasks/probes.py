"""Probes: what classes a frozen model's features tell, block by block or by attending to its patches.

Letters: n pictures, P tokens of a picture, N patches, L blocks, d width, V classes.
"""

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
from beitctl.errors import UserError
from beitctl.model.heads import HEAD_EPS
from beitctl.model.multiway import Encoded
from beitctl_plugins.tasks.classification import Classification

LINEAR, ATTENTIVE = "linear_probe", "attentive_probe"


class _Probe(Plugin):
    """What both probes share: pictures, classes, and that nothing but the probe is trained."""

    layout: ClassVar[Literal["image"]] = "image"
    labelled: ClassVar[bool] = True
    """Whether examples need a label."""
    frozen: ClassVar[tuple[str, ...]] = ("model.",)
    """Parts of the names of parameters that are not trained."""

    class_names: str = ""
    """File with the names of the classes in their order, one a line; empty: the labels that occur."""
    crop_scale: CropScale = (0.08, 1.0)
    """Smallest and largest share of the picture that a training crop shows; half of them are flipped."""
    crop_pct: float = Field(default=1.0, gt=0, le=1)
    """In evaluation: side of the central square as a share of the resized shorter side."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The probe on its own classes, at a depth that a toy model has."""
        return {key: value for key, value in table.items() if key not in ("class_names", "depth")}

    @classmethod
    def smoke_data(cls, split: str) -> dict[str, Any]:
        """The embedded pictures."""
        return Classification.smoke_data(split)

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("sample")}

    def fitted(self, config: ModelConfig) -> ModelConfig:
        """The frozen model, as in evaluation."""
        return replace(config, drop_path=0.0)

    def vocabulary(self, examples: Examples) -> tuple[str, ...]:
        """Names of the classes."""
        return self._classes().vocabulary(examples)

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        return self._classes().prepare(example, draw, tools)

    def _classes(self) -> Classification:
        """The task that prepares pictures and measures one set of logits."""
        return Classification(
            class_names=self.class_names, crop_scale=self.crop_scale, crop_pct=self.crop_pct
        )

    def _count(self, tools: Tools) -> int:
        if len(tools.labels) < 2:
            raise UserError(f"a probe needs at least two classes, the source has {len(tools.labels)}")
        return len(tools.labels)


class LinearProbe(_Probe):
    """Tell the class of a picture by a linear layer on frozen features, one for every block at once.

    Each reads the class token beside the mean patch of its block (2 d), and they are trained together; which
    block is best is itself the result. Source: BEiT, arXiv:2106.08254, appendix, and its released code.
    """

    def depths(self, config: ModelConfig) -> Sequence[int]:
        """After every block."""
        return range(1, config.layers + 1)

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        classes = self._count(tools)
        model = tools.model
        return {LINEAR: nn.ModuleList(nn.Linear(2 * model.width, classes) for _ in range(model.layers))}

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, L, V) logits of every block's probe."""
        found = []
        for depth, head in enumerate(heads[LINEAR].children(), 1):
            tokens = encoded.inner[depth][group.picture_rows]
            patches = tokens[:, encoded.model.config.prefix :].mean(1)
            found.append(head(torch.cat([tokens[:, 0], patches], dim=-1)))
        return torch.stack(found, dim=1).float()

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Cross-entropies added up over the blocks; right answers averaged over them."""
        logits = self.output(encoded, group, heads)
        labels = group.labels[:, None].expand(-1, logits.shape[1])
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"": (total, (logits.detach().argmax(-1) == labels).float().mean(1).sum())}

    def score(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """Accuracy at the best block, which block that is, and the accuracy at every block."""
        logits, best, by_block = self._by_block(outputs, examples, tools)
        found = self._classes().score([logits[:, best]], examples, tools, train)
        blocks = {f"accuracy_block_{number}": value for number, value in enumerate(by_block, 1)}
        first = {"accuracy": found.metrics["accuracy"], "best_block": float(best + 1)}
        return replace(found, metrics={**first, **found.metrics, **blocks})

    def draw(self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """The figures of classification at the best block."""
        logits, best, _ = self._by_block(outputs, examples, tools)
        self._classes().draw([logits[:, best]], examples, tools, log)

    @staticmethod
    def _by_block(
        outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools
    ) -> tuple[Tensor, int, list[float]]:
        """Logits (n, L, V), index of the best block, and the accuracy of each."""
        logits = torch.cat(list(outputs))
        truth = torch.tensor([tools.labels.index(str(example.label)) for example in examples])
        right = (logits.argmax(-1) == truth[:, None]).double().mean(0)
        return logits, int(right.argmax()), right.tolist()


class Attention(nn.Module):
    """A learned query that attends to the patches of a picture, then a norm and a linear layer."""

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, HEAD_EPS)
        self.query = nn.Embedding(1, width)
        self.kv = nn.Linear(width, 2 * width)
        self.pooled_norm = nn.LayerNorm(width, HEAD_EPS)
        self.linear = nn.Linear(width, classes)

    def forward(self, patches: Tensor) -> Tensor:
        """(n, N, d) to (n, V) logits."""
        n, count, width = patches.shape
        k, v = self.kv(self.norm(patches)).view(n, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = self.query.weight.view(1, self.heads, 1, -1).expand(n, -1, -1, -1).to(k.dtype)
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(-1)
        pooled = (weights @ v).reshape(n, width)
        logits: Tensor = self.linear(self.pooled_norm(pooled))
        return logits


class AttentiveProbe(_Probe):
    """Tell the class of a picture by attending to the frozen patches of one block.

    A learned query attends once, with as many heads as the model has; a norm and a linear layer follow. Where
    the mean patch hides what single patches know, as after masked image modelling, it says more than a linear
    probe does.
    """

    depth: int = Field(default=0, ge=0)
    """The block whose output is read; 0: the last one."""

    def depths(self, config: ModelConfig) -> Sequence[int]:
        """After the block that is read."""
        if self.depth > config.layers:
            raise UserError(f"depth ({self.depth}) must not exceed the model's {config.layers} blocks")
        return [self.depth or config.layers]

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        return {ATTENTIVE: Attention(tools.model.width, tools.model.heads, self._count(tools))}

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, V) logits."""
        config = encoded.model.config
        tokens = encoded.inner[self.depths(config)[0]][group.picture_rows]
        logits: Tensor = heads[ATTENTIVE](tokens[:, config.prefix :])
        return logits.float()

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        logits = self.output(encoded, group, heads)
        total = F.cross_entropy(logits, group.labels, reduction="sum")
        return {"": (total, (logits.detach().argmax(-1) == group.labels).sum())}

    def score(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """As of classification."""
        return self._classes().score(outputs, examples, tools, train)

    def draw(self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """As of classification."""
        self._classes().draw(outputs, examples, tools, log)
