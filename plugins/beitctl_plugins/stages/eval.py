"""The stage ``eval``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from beitctl.api import Example, Job, Plugin, SourceField, TaskField, Tools
from beitctl.data.opening import opened
from beitctl.errors import UserError
from beitctl_plugins.stages.requiring import Require, check

if TYPE_CHECKING:
    import torch

    from beitctl.api import Examples
    from beitctl.checkpoints.native import Stored
    from beitctl.engine.dist import Ranks

CONTRASTIVE = "heads.contrastive.vision.weight"
"""Name of a weight that models with a contrastive head have."""


class Eval(Plugin):
    """Measure a model: k-NN on its features, zero-shot retrieval, or the task that it was fine-tuned to."""

    model: str
    """The model: ``@pretrain``, ``@finetune.retrieval`` or a folder with model.safetensors."""
    model_settings: dict[str, Any] = Field(default_factory=dict)
    """What a file of another library does not say, such as ``{ heads = 12 }``."""
    text_tokenizer: str = ""
    """Text tokenizer where the model brings none, as official files do: a run or a .spm file."""
    task: TaskField | None = None
    """``task``: the task whose heads the model has, where its file does not say, as official files do not; or
    the same task with other settings of the evaluation, such as ``beam_size``."""
    protocol: Literal["knn", "zero-shot-retrieval", "task"]
    """``knn``: labels by the nearest training pictures; ``zero-shot-retrieval``: by the contrastive head if
    the model has one, else by how well it predicts a caption's words from a picture; ``task``: the metrics
    of the fine-tuned task."""
    source: SourceField
    """Examples to measure on."""
    reference: SourceField | None = None
    """``knn``: the labelled pictures that neighbours are looked up in; ``task``: the training examples that
    baselines are read from, by default the measured ones."""
    neighbours: int = Field(default=5, ge=1)
    """``knn``: how many neighbours vote."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """``knn``: 0: a vote weighs its cosine similarity; else exp(similarity / temperature). DINO's protocol is
    ``neighbours = 20``, ``temperature = 0.07``, ``feature = "class"``."""
    feature: Literal["patches", "class", "both"] = "patches"
    """``knn``: the mean of the patches, the class token, or both side by side."""
    depth: int = Field(default=0, ge=0)
    """``knn``: the block whose output is the feature; 0 is two thirds up, where BEiT's features are best (the
    linear probes of arXiv:2106.08254 peak at block 9 of 12 and 14 of 24): the last ones serve prediction."""
    workers: int = Field(default=0, ge=0)
    """``knn``, ``task``: data-loading processes per rank; 0 loads in the main process."""
    limit: int = Field(default=0, ge=0)
    """Most examples that are measured, spread evenly; 0: all. Zero-shot retrieval without a contrastive head
    scores every pair: limit² passes."""
    require: Require = Field(default=[])
    """Conditions such as ``pretrained>=0.3``; a run that misses one ends with exit code 7."""
    seed: int = Field(default=0, ge=0)
    """Seed of the random weights that ``knn`` compares with."""

    @model_validator(mode="after")
    def _complete(self) -> "Eval":
        if self.protocol == "knn" and self.reference is None:
            raise ValueError("protocol 'knn' needs reference: labelled training pictures")
        return self

    def plan(self) -> Mapping[str, Any]:
        """What is measured on how many examples."""
        return {"protocol": self.protocol, "model": self.model, "examples": len(opened(self.source))}

    def inputs_fingerprint(self) -> str:
        """Hash of the data."""
        other = opened(self.reference).fingerprint if self.reference else ""
        return f"{opened(self.source).fingerprint},{other}"

    def run(self, job: Job) -> Mapping[str, Any]:
        """Measure, then check what is required."""
        from beitctl.checkpoints.loading import read_model
        from beitctl.engine import dist

        ranks = dist.start()
        stored = read_model(job.path(self.model), self.model_settings)
        if self.protocol == "task":
            metrics = self._task(self.task or stored.open_task(), stored, job, ranks)
        elif self.protocol == "zero-shot-retrieval" and CONTRASTIVE in stored.tensors:
            metrics = self._by_vectors(stored, job, ranks)
        else:
            measure = self._knn if self.protocol == "knn" else self._zero_shot
            metrics = measure(stored, job, ranks)
            ranks.barrier()
            job.log.evaluation(self.protocol, 0, metrics)
        check(metrics, self.require)
        return metrics

    def _limited(self, examples: "Examples") -> "Examples":
        """As many of the examples as are measured, evenly spread."""
        if not self.limit or len(examples) <= self.limit:
            return examples
        from beitctl_plugins.stages.shared import Subset

        step = len(examples) // self.limit
        return Subset(examples, range(0, len(examples), step)[: self.limit])

    def _tools(self, stored: "Stored", job: Job) -> Tools:
        from beitctl_plugins.stages.shared import open_text, pictures

        tokenizer = open_text(job, self.text_tokenizer) or stored.text_tokenizer()
        return Tools(stored.model, tokenizer, labels=stored.labels, train=False, pictures=pictures())

    def _knn(self, stored: "Stored", job: Job, ranks: "Ranks") -> dict[str, Any]:
        """Share of right labels among the nearest neighbours, for the model and for random weights."""
        from beitctl_plugins.stages import shared
        from beitctl_plugins.stages.probing import knn
        from beitctl_plugins.stages.probing.features import Features, depth_of

        features = Features(depth_of(self.depth, stored.model), self.feature)
        sources = {
            "source": self._limited(shared.opened("source", self.source, job)),
            "reference": shared.opened("reference", self.reference, job),
        }
        return knn.measured(
            stored, knn.Protocol(features, self.neighbours, self.temperature, self.seed), sources,
            self._tools(stored, job), job, ranks, self.workers,
        )  # fmt: skip

    def _by_vectors(self, stored: "Stored", job: Job, ranks: "Ranks") -> dict[str, Any]:
        """Retrieval by the vectors of a model with a contrastive head."""
        from beitctl_plugins.tasks.retrieval import Retrieval

        task = self.task or stored.open_task()
        if self.task and not isinstance(self.task, Retrieval):
            raise UserError("zero-shot-retrieval: task must be of the kind retrieval, or left out")
        words = "contrastive head, cosine similarity, all captions of every picture"
        job.log.note(f"protocol: {words}")
        found = self._task(task if isinstance(task, Retrieval) else Retrieval(), stored, job, ranks)
        return found | {"protocol": words}

    def _zero_shot(self, stored: "Stored", job: Job, ranks: "Ranks") -> dict[str, Any]:
        """Retrieval by the words that a picture helps to predict."""
        from beitctl_plugins.stages.zero_shot import WORDS, pair_scores, table_recalls
        from beitctl_plugins.tasks.retrieval import retrieval_gallery

        tools, (examples, bare) = self._tools(stored, job), self._pairs()
        scores = pair_scores(stored, examples, tools, ranks.device)
        retrieval_gallery(lambda asked: scores[asked], examples, tools, job.log)
        if bare:
            job.log.warning(
                "W401",
                f"{len(bare)} of {len(bare) + len(examples)} pictures have no caption, such as {bare[0]}",
                "the metrics are of the others",
            )
        return table_recalls(scores, examples) | {"left_out": float(len(bare)), "protocol": WORDS}

    def _pairs(self) -> tuple[Sequence[Example], list[str]]:
        """The examples with captions that are measured, and the ids of those without."""
        from beitctl_plugins.tasks.retrieval import captions_of

        examples = opened(self.source)
        read = [examples[i] for i in range(len(examples))]
        found = [example for example in read if captions_of(example)]
        if len(found) < 2:
            raise UserError(
                f"retrieval needs at least two pictures with captions, the source has {len(found)}"
            )
        step = max(1, len(found) // self.limit) if self.limit else 1
        return found[::step][: self.limit or None], [e.id for e in read if not captions_of(e)]

    def _weights(self, task: Any, tools: Tools, stored: "Stored", job: Job) -> "dict[str, torch.Tensor]":
        """The model's weights with the heads of the task; others are left out if the recipe names the task.

        Raises:
            UserError: the heads are not those of the task.
        """
        import torch
        from torch import nn

        with torch.device("meta"):
            own = {f"heads.{k}": v.shape for k, v in nn.ModuleDict(task.heads(tools)).state_dict().items()}
        found = {name: value.shape for name, value in stored.tensors.items() if name.startswith("heads.")}
        wrong = [f"{name} {tuple(found[name]) if name in found else 'missing'}, expected {tuple(shape)}"
                 for name, shape in own.items() if found.get(name) != shape]  # fmt: skip
        others = sorted(name for name in found if name not in own)
        if self.task is None and self.protocol == "task":
            wrong += [f"{name} is not of this task" for name in others]
        if wrong:
            raise UserError(
                f"{stored.folder}: its heads are not those of the task with {len(tools.labels)} labels: "
                f"{'; '.join(wrong[:4])}"
            )
        if others:
            job.log.note(f"heads of other tasks are not used: {', '.join(others)}")
        return {name: value for name, value in stored.tensors.items() if name not in others}

    def _task(self, task: Any, stored: "Stored", job: Job, ranks: "Ranks") -> dict[str, Any]:
        """The metrics of a task whose heads the model has."""
        import torch

        from beitctl.data.loader import Stream
        from beitctl.engine.learner import MultiwayLearner, Objective
        from beitctl.model.multiway import Multiway
        from beitctl_plugins.stages import measuring, shared

        if task is None:
            raise UserError(
                f"{stored.folder}: it does not say which task it was fine-tuned to; set task, such as "
                "task = { kind = \"classification\" }, fine-tune first, or use protocol 'knn'"
            )
        examples = shared.opened("source", self.source, job)
        train = opened(self.reference) if self.reference else examples
        labels = stored.labels or shared.vocabulary(task, train)
        tools = replace(self._tools(stored, job), labels=labels)
        weights = self._weights(task, tools, stored, job)

        def make() -> MultiwayLearner:
            return MultiwayLearner(Multiway(stored.model), [Objective("task", task)], {"task": tools})

        learner = measuring.whole(make, weights, ranks, torch.float32)
        stream = Stream("task", task, self._limited(examples), 1, tools)
        held = measuring.outputs(learner, stream, ranks, workers=self.workers)
        return measuring.measured(held, train, ranks, job, name=self.protocol)
