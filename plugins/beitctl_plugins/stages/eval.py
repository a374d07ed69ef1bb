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

    from beitctl.checkpoints.native import Stored
    from beitctl.engine.dist import Ranks


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
    """``knn``: labels by the nearest training pictures; ``zero-shot-retrieval``: how well a pretrained model
    predicts a caption's words from a picture; ``task``: the metrics of the fine-tuned task."""
    source: SourceField
    """Examples to measure on."""
    reference: SourceField | None = None
    """``knn``: the labelled pictures that neighbours are looked up in; ``task``: the training examples that
    baselines are read from, by default the measured ones."""
    neighbours: int = Field(default=5, ge=1)
    """``knn``: how many neighbours vote."""
    depth: int = Field(default=0, ge=0)
    """``knn``: the block whose output is the feature; 0 is two thirds up, where BEiT's features are best (the
    linear probes of arXiv:2106.08254 peak at block 9 of 12 and 14 of 24): the last ones serve prediction."""
    workers: int = Field(default=0, ge=0)
    """``task``: data-loading processes per rank; 0 loads in the main process."""
    limit: int = Field(default=0, ge=0)
    """Most examples that are measured; 0: all. Zero-shot retrieval scores every pair: limit² passes."""
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
            metrics = self._task(stored, job, ranks)
        else:
            measure = self._knn if self.protocol == "knn" else self._zero_shot
            metrics = measure(stored, job, ranks.device)
            ranks.barrier()
            job.log.evaluation(self.protocol, 0, metrics)
        check(metrics, self.require)
        return metrics

    def _tools(self, stored: "Stored", job: Job) -> Tools:
        from beitctl_plugins.stages.shared import open_text, pictures

        tokenizer = open_text(job, self.text_tokenizer) or stored.text_tokenizer()
        return Tools(stored.model, tokenizer, labels=stored.labels, train=False, pictures=pictures())

    def _knn(self, stored: "Stored", job: Job, device: "torch.device") -> dict[str, float]:
        """Share of right labels among the nearest neighbours, for the model and for random weights."""
        from beitctl.checkpoints.native import fit
        from beitctl.model.init import initial
        from beitctl.model.multiway import Multiway

        if self.depth > stored.model.layers:
            raise UserError(f"depth ({self.depth}) must not exceed the model's {stored.model.layers} blocks")
        model = Multiway(stored.model).to(device).eval()
        random = {
            f"model.{name}": initial(f"model.{name}", value.shape, stored.model, self.seed)
            for name, value in model.named_parameters()
        }
        found: dict[str, float] = {}
        for name, tensors in (("pretrained", stored.tensors), ("random_init", random)):
            fit(tensors, model, "model.", stored.folder)
            known, labels = self._features(model, self.reference, self._tools(stored, job))
            asked, truth = self._features(model, self.source, self._tools(stored, job))
            votes = _vote(asked, known, labels, self.neighbours)
            found[name] = sum(a == b for a, b in zip(votes, truth, strict=True)) / len(truth)
        return found | {"examples": float(len(truth)), "reference": float(len(labels))}

    def _features(self, model: Any, source: Any, tools: Tools) -> tuple["torch.Tensor", list[str]]:
        """Unit vectors (n, d) of the mean patch of every labelled picture, and the labels."""
        import numpy as np
        import torch

        from beitctl.engine.learner import PIXELS, normalise
        from beitctl.errors import DataError
        from beitctl_plugins.tasks.preparing import view_of

        examples = opened(source)
        rows, labels, found = [], [], []
        for index in range(len(examples)):
            example = examples[index]
            if not example.label:
                continue
            try:
                rows.append(view_of(example, np.random.default_rng(0), tools, (1.0, 1.0)))
            except DataError:
                continue
            labels.append(example.label)
        if not labels:
            raise DataError("no labelled picture to measure k-NN with")
        for start in range(0, len(rows), 64):
            pixels = torch.from_numpy(np.stack(rows[start : start + 64])).to(model.device)
            pixels = normalise(pixels, PIXELS[tools.model.pixels])
            with torch.no_grad():
                found.append(model.patches(pixels, self.depth or _middle(model)).mean(1))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1), labels

    def _zero_shot(self, stored: "Stored", job: Job, device: "torch.device") -> dict[str, float]:
        from beitctl_plugins.stages.zero_shot import pair_scores
        from beitctl_plugins.tasks.retrieval import recalls, retrieval_gallery, same_caption

        tools, examples = self._tools(stored, job), self._pairs()
        scores = pair_scores(stored, examples, tools, device)
        retrieval_gallery(scores, examples, tools, job.log)
        return recalls(scores, same_caption(examples))

    def _pairs(self) -> Sequence[Example]:
        examples = opened(self.source)
        found = [example for i in range(len(examples)) if (example := examples[i]).captions]
        if len(found) < 2:
            raise UserError(
                f"retrieval needs at least two pictures with captions, the source has {len(found)}"
            )
        step = max(1, len(found) // self.limit) if self.limit else 1
        return found[::step][: self.limit or None]

    @staticmethod
    def _check_heads(task: Any, tools: Tools, stored: "Stored") -> None:
        """Refuse a model whose heads are not those of the task."""
        import torch
        from torch import nn

        with torch.device("meta"):
            own = {f"heads.{k}": v.shape for k, v in nn.ModuleDict(task.heads(tools)).state_dict().items()}
        found = {name: value.shape for name, value in stored.tensors.items() if name.startswith("heads.")}
        wrong = [f"{name} {tuple(found[name]) if name in found else 'missing'}, expected {tuple(shape)}"
                 for name, shape in own.items() if found.get(name) != shape]  # fmt: skip
        wrong += [f"{name} is not of this task" for name in found if name not in own]
        if wrong:
            raise UserError(
                f"{stored.folder}: its heads are not those of the task with {len(tools.labels)} labels: "
                f"{'; '.join(wrong[:4])}"
            )

    def _task(self, stored: "Stored", job: Job, ranks: "Ranks") -> dict[str, Any]:
        import torch

        from beitctl.data.loader import Stream
        from beitctl.engine.learner import MultiwayLearner, Objective
        from beitctl.model.multiway import Multiway
        from beitctl_plugins.stages import measuring, shared

        task: Any = self.task or stored.open_task()
        if task is None:
            raise UserError(
                f"{stored.folder}: it does not say which task it was fine-tuned to; set task, such as "
                "task = { kind = \"classification\" }, fine-tune first, or use protocol 'knn'"
            )
        examples = shared.opened("source", self.source, job)
        train = opened(self.reference) if self.reference else examples
        labels = stored.labels or shared.vocabulary(task, train)
        tools = replace(self._tools(stored, job), labels=labels)
        self._check_heads(task, tools, stored)

        def make() -> MultiwayLearner:
            return MultiwayLearner(Multiway(stored.model), [Objective("task", task)], {"task": tools})

        learner = measuring.whole(make, stored.tensors, ranks, torch.float32)
        stream = Stream("task", task, examples, 1, tools)
        held = measuring.outputs(learner, stream, ranks, workers=self.workers)
        return measuring.measured(held, train, ranks, job, name=self.protocol)


def _middle(model: Any) -> int:
    return max(1, round(len(model.blocks) * 2 / 3))


def _vote(asked: "torch.Tensor", known: "torch.Tensor", labels: Sequence[str], neighbours: int) -> list[str]:
    """The label with the most similarity among the nearest neighbours of every row."""
    near = (asked @ known.T).topk(min(neighbours, len(labels)), dim=1)
    found = []
    for values, places in zip(near.values.tolist(), near.indices.tolist(), strict=True):
        votes: dict[str, float] = {}
        for value, place in zip(values, places, strict=True):
            votes[labels[place]] = votes.get(labels[place], 0.0) + value
        found.append(max(votes, key=lambda label: votes[label]))
    return found
