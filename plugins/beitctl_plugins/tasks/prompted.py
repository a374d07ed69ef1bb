"""Zero-shot classification: the class whose name, put into sentences, lies nearest to the picture.

Source of the protocol: CLIP, arXiv:2103.00020, section 3.1. BEiT-3's paper (arXiv:2208.10442) fine-tunes
ImageNet as retrieval of class names: that is the task ``retrieval`` with names as captions.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import Example, Examples, Item, Log, Measured, Plugin, Task, Term, Tools
from beitctl.data.batch import Group
from beitctl.data.loader import Place, batches
from beitctl.engine.learner import MultiwayLearner
from beitctl.errors import DataError, UserError
from beitctl.model.heads import ContrastiveHead
from beitctl.model.multiway import Encoded
from beitctl_plugins.tasks.classes import names_in
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.tasks.preparing import framed, loaded

HEAD = "contrastive"
CHUNK = 256
"""Sentences in one forward pass."""

_vectors: "WeakKeyDictionary[MultiwayLearner, Tensor]" = WeakKeyDictionary()


class ZeroShotClassification(Plugin):
    """Measure how well a contrastive model names pictures that it was never shown labels of.

    For ``eval`` with ``protocol = "task"`` on a model with a contrastive head; nothing is trained.
    """

    layout: ClassVar[Literal["image"]] = "image"

    templates: list[str] = Field(default=["a photo of a {}."], min_length=1)
    """Sentences with ``{}`` in the place of the name; their vectors are averaged."""
    template_file: str = ""
    """File with such sentences, one a line, in place of ``templates``."""
    class_names: str = ""
    """File with the names of the classes in their order, one a line; empty: the labels that occur."""
    readable_names: str = ""
    """File with what each class is called in a sentence, one a line in the order of the classes; empty: its
    name, with spaces for ``_`` and ``-``."""
    crop_pct: float = Field(default=1.0, gt=0, le=1)
    """Side of the central square as a share of the resized shorter side."""

    @field_validator("templates")
    @classmethod
    def _with_places(cls, value: list[str]) -> list[str]:
        wrong = [template for template in value if template.count("{}") != 1]
        if wrong:
            raise ValueError(f"each must hold {{}} once, in the place of the name; found {wrong[0]!r}")
        return value

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("sample")}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        if len(tools.labels) < 2:
            raise UserError(f"zero-shot-classification needs two classes, the source has {len(tools.labels)}")
        return {HEAD: ContrastiveHead(tools.model.width)}

    def vocabulary(self, examples: Examples) -> tuple[str, ...]:
        """Names of the classes."""
        return self._classes().vocabulary(examples)

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        return self._classes().prepare(example, draw, tools)

    def _classes(self) -> Classification:
        """The task that prepares pictures and measures their likeness to classes as logits."""
        return Classification(class_names=self.class_names, crop_pct=self.crop_pct)

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, d) unit vectors of pictures."""
        vectors: Tensor = heads[HEAD].pictures(encoded.rows[group.picture_rows[:, 0]])  # type: ignore[operator]
        return vectors

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        raise UserError(
            'zero-shot-classification trains nothing: use it in [eval] with protocol = "task"; to train on '
            "names of classes use the task retrieval with them as captions"
        )

    def infer(self, learner: MultiwayLearner, chunk: Sequence[tuple[Example, Item]], tools: Tools) -> Tensor:
        """(n, V) likeness of pictures to classes, scaled as the model learnt it."""
        if learner not in _vectors:
            _vectors[learner] = self._class_vectors(learner, tools)
        items = (cast("Task", self), [item for _, item in chunk])
        (batch,) = batches({"task": items}, tools.model, len(chunk), Place())
        pictures = learner.outputs(batch.to(learner.model.device))["task"]
        scale = learner.heads[HEAD].logit_scale.float().exp()  # type: ignore[operator]
        found: Tensor = scale * pictures @ _vectors[learner].T
        return found

    def _class_vectors(self, learner: MultiwayLearner, tools: Tools) -> Tensor:
        """(V, d) unit vectors of the classes: the mean over all sentences, normalised again."""
        tokenizer, most = loaded(tools), tools.model.text_tokens - 2
        templates, names = self._templates(), self._names(tools)
        texts = [
            framed(tokenizer.encode(t.replace("{}", n))[:most], tokenizer) for n in names for t in templates
        ]
        found = []
        for start in range(0, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            longest = max(map(len, part))
            ids = np.stack([np.pad(text, (0, longest - len(text))) for text in part])
            pad = np.arange(longest)[None, :] >= np.array([len(text) for text in part])[:, None]
            on = learner.model.device
            packed, _ = learner.model.pack(
                text=torch.from_numpy(ids).to(on), text_pad=torch.from_numpy(pad).to(on)
            )
            first = torch.from_numpy(packed.layout.plan.text_starts.copy()).to(on)
            found.append(learner.heads[HEAD].texts(learner.model.encode(packed)[first]))  # type: ignore[operator]
        vectors = torch.cat(found).view(len(names), len(templates), -1)
        return F.normalize(vectors.mean(1), dim=-1)

    def _templates(self) -> Sequence[str]:
        if not self.template_file:
            return self.templates
        found = names_in(self.template_file, "template_file")
        for template in found:
            if template.count("{}") != 1:
                raise DataError(f"template_file: {self.template_file}: no {{}}, or several, in {template!r}")
        return found

    def _names(self, tools: Tools) -> Sequence[str]:
        if not self.readable_names:
            return [name.replace("_", " ").replace("-", " ") for name in tools.labels]
        found = names_in(self.readable_names, "readable_names")
        if len(found) != len(tools.labels):
            raise DataError(
                f"readable_names: {self.readable_names} has {len(found)} names, there are "
                f"{len(tools.labels)} classes; give one a line for each"
            )
        return found

    def score(
        self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """As of classification."""
        return self._classes().score(outputs, examples, tools, train)

    def draw(self, outputs: Sequence[Tensor], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """As of classification."""
        self._classes().draw(outputs, examples, tools, log)
