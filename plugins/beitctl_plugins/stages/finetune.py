"""The stage ``finetune``."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from beitctl import registry
from beitctl.api import FinetuneTask, Job, Plugin, SourceField, TaskField, Tools
from beitctl.config import ModelConfig, TrainConfig
from beitctl.data.opening import opened
from beitctl.errors import PluginError, UserError
from beitctl_plugins.stages.requiring import Require, check

if TYPE_CHECKING:
    from torch import Tensor

    from beitctl.checkpoints.native import Stored
    from beitctl.engine.dist import Ranks
    from beitctl.engine.learner import MultiwayLearner


class Finetune(Plugin):
    """Fine-tune a pretrained model on a task, and measure it on held-out examples."""

    init: str
    """The model to start from: ``@pretrain`` or a folder with model.safetensors."""
    task: TaskField
    """The task: its loss, its head, its metrics."""
    source: SourceField
    """Training examples."""
    held_out: SourceField
    """Examples to measure on."""
    samples: int = Field(ge=1)
    """Samples per step, over all ranks."""
    train: TrainConfig
    """The training loop."""
    from_scratch: bool = False
    """Take only the model's shape from ``init`` and begin with random weights: the control experiment."""
    init_settings: dict[str, Any] = Field(default_factory=dict)
    """What the file of ``init`` does not say, such as ``{ heads = 12 }``."""
    text_tokenizer: str = ""
    """Text tokenizer where ``init`` brings none, as official files do: a run or a .spm file."""
    keep_heads: bool = False
    """Whether heads begin with those of ``init`` where they fit (retrieval after contrastive tuning: BEiT-3's
    ``itc`` files); else at random."""
    image_px: int = Field(default=0, ge=0)
    """Side of the picture in pixels; 0: as pretrained. Positions are resampled."""
    drop_path: float | None = Field(default=None, ge=0, lt=1)
    """Stochastic depth while fine-tuning; by default that of the pretrained model."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """One training per seed; metrics are averaged, the weights are those of the first."""
    require: Require = Field(default=[])
    """Conditions on the metrics such as ``accuracy>=0.6``; a run that misses one ends with exit code 7."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The stage at toy size: the small pretrained model, a few steps, data that the task names."""
        kind = table.get("task", {}).get("kind", "")
        task = registry.get("beitctl.tasks", kind)
        own = {key: value for key, value in table["task"].items() if key != "kind"}
        shrink = getattr(task, "smoke", None)
        data = getattr(task, "smoke_data", None)
        if not callable(data):
            raise UserError(f"--smoke: the task {kind} does not say which data a toy size has (smoke_data)")
        optim = {
            key: value
            for key, value in table.get("train", {}).get("optim", {}).items()
            if key in ("schedule", "betas", "eps", "weight_decay", "clip_norm", "layer_decay", "head_factor")
        }
        kept = {key: table[key] for key in ("drop_path", "from_scratch") if key in table}
        return {
            "init": "@pretrain",
            "task": {"kind": kind, **(shrink(own) if callable(shrink) else own)},
            "source": {**data("train"), "limit": 96},
            "held_out": {**data("test"), "limit": 32},
            "samples": 16,
            "train": {"steps": 8, "log_every_steps": 2, "optim": {**optim, "peak_lr": 1e-3}},
            **kept,
        }

    def plan(self) -> Mapping[str, Any]:
        """How long it trains on how many examples."""
        examples, steps = len(opened(self.source)), self.train.steps
        return {
            "init": self.init + (" (shape only)" if self.from_scratch else ""),
            "examples": examples,
            "held out": len(opened(self.held_out)),
            "steps": steps,
            "epochs": steps * self.samples / examples,
            "trainings": len(self.seeds),
        }

    def inputs_fingerprint(self) -> str:
        """Hash of the data."""
        return f"{opened(self.source).fingerprint},{opened(self.held_out).fingerprint}"

    def run(self, job: Job) -> Mapping[str, Any]:
        """Train once per seed, write the weights of the first, average the metrics of all."""
        from beitctl.checkpoints.loading import read_model
        from beitctl.engine import dist
        from beitctl_plugins.stages import shared

        self._measured()
        ranks = dist.start()
        stored = read_model(job.path(self.init), self.init_settings)
        shared.check_share("samples", self.task, self.samples, self.train.micro_samples, ranks)
        passes = shared.passes(self.samples, self.train, ranks)
        shared.check_even("samples", self.task, self.samples, passes, ranks)
        found = [
            self._once(stored, seed, first=index == 0, ranks=ranks, job=job)
            for index, seed in enumerate(self.seeds)
        ]
        numbers = [key for key, value in found[0].items() if isinstance(value, float)]
        averaged = {key: sum(metrics[key] for metrics in found) / len(found) for key in numbers}
        check(averaged, self.require)
        return averaged | {"seeds": {str(s): m for s, m in zip(self.seeds, found, strict=True)}}

    def _measured(self) -> FinetuneTask:
        """The task, which must be one that can measure a model."""
        if not callable(getattr(self.task, "score", None)):
            raise UserError(
                f"{self._kind()} is for pretraining: it has no score() to measure a fine-tuned model "
                f"with; use {', '.join(_measuring())}"
            )
        return cast("FinetuneTask", self.task)

    def _kind(self) -> str:
        return registry.name_of("beitctl.tasks", type(self.task))

    def _config(self, model: ModelConfig) -> ModelConfig:
        """The model that is fine-tuned: each block its relative positions, and what the task asks for."""
        changed: dict[str, Any] = {} if self.drop_path is None else {"drop_path": self.drop_path}
        if self.image_px:
            changed["image_px"] = self.image_px
        if model.position == "relative-shared":
            changed["position"] = "relative-per-block"
        fitted = getattr(self.task, "fitted", None)
        try:
            model = replace(model, **changed)
            return cast("ModelConfig", fitted(model)) if callable(fitted) else model
        except ValueError as error:
            raise UserError(f"the model of {self.init} cannot be fine-tuned so: {error}") from error

    def _once(
        self, stored: "Stored", seed: int, *, first: bool, ranks: "Ranks", job: Job
    ) -> Mapping[str, Any]:
        from beitctl.checkpoints.loading import changed
        from beitctl.data.loader import Stream
        from beitctl.engine.learner import MultiwayLearner, Objective
        from beitctl.engine.shard import full_weights
        from beitctl.model.init import initial
        from beitctl.model.multiway import Multiway
        from beitctl_plugins.stages import shared

        config = self._config(stored.model)
        weights = {} if self.from_scratch else changed(stored, config)
        examples = shared.opened("source", self.source, job)
        tokenizer = shared.open_text(job, self.text_tokenizer) or stored.text_tokenizer()
        labels = shared.vocabulary(self.task, examples)
        tools = Tools(config, tokenizer, labels=labels, pictures=shared.pictures())

        known = self._begun(weights)

        def value(name: str, shape: Any) -> Any:
            found = shared.given(known, name, shape)
            return initial(name, shape, config, seed) if found is None else found

        def make() -> MultiwayLearner:
            return MultiwayLearner(Multiway(config), [Objective("task", self.task)], {"task": tools})

        learner = shared.build(make, ranks, self.train, value, job)
        learner = shared.frozen_in(learner, getattr(self.task, "frozen", ()))
        if known and first:
            shared.report_start(learner, known, job)
        stream = Stream(
            "task", self.task, shared.trained_on(self.task, examples, tools, job), self.samples, tools
        )
        shared.fit(
            learner, [stream], replace(self.train, seed=seed), ranks, job,
            folder=job.folder / f"seed-{seed}", name="" if first else f"seed-{seed}/",
        )  # fmt: skip
        if first:
            table = {"kind": self._kind(), **self._measured().model_dump(mode="json")}
            final = shared.write_weights(
                learner, job.folder / "weights", ranks, task=table, labels=labels, tokenizer=tokenizer
            )
        else:
            final = full_weights(learner)
        return self._score(make, final, tools, first=first, ranks=ranks, job=job)

    def _begun(self, weights: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """The weights of ``init`` that parameters begin with: the body, and heads as far as they are kept.

        A task's ``heads_from`` names heads of pretraining that its own begin as (captions: the words' head).
        """
        found = {
            name: value for name, value in weights.items() if name.startswith("model.") or self.keep_heads
        }
        for own, other in getattr(self.task, "heads_from", {}).items():
            for name, value in weights.items():
                if name.startswith(f"heads.{other}."):
                    found.setdefault(f"heads.{own}.{name.removeprefix(f'heads.{other}.')}", value)
        return found

    def _score(
        self, make: "Callable[[], MultiwayLearner]", weights: "Mapping[str, Tensor]", tools: Tools, *,
        first: bool, ranks: "Ranks", job: Job,
    ) -> Mapping[str, Any]:  # fmt: skip
        from beitctl.data.loader import Stream
        from beitctl.engine.shard import compute_dtype
        from beitctl_plugins.stages import measuring, shared

        task, fixed = self._measured(), replace(tools, train=False)
        learner = measuring.whole(make, weights, ranks, compute_dtype(self.train.precision, ranks.device))
        stream = Stream("task", task, shared.opened("held-out", self.held_out, job), 1, fixed)
        size = self.train.micro_samples or 64
        held = measuring.outputs(learner, stream, ranks, size, self.train.workers)
        train = opened(self.source)
        return measuring.measured(held, train, ranks, job, name="held out", step=self.train.steps, told=first)


def _measuring() -> list[str]:
    """Tasks that can measure a fine-tuned model."""
    found = []
    for name in registry.names("beitctl.tasks"):
        try:
            measures = callable(getattr(registry.get("beitctl.tasks", name), "score", None))
        except PluginError:
            continue
        found += [name] if measures else []
    return found
