"""The stage ``finetune``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from beitctl import registry
from beitctl.api import FinetuneTask, Job, Plugin, SourceField, TaskField, Tools
from beitctl.config import ModelConfig, TrainConfig
from beitctl.data.opening import opened
from beitctl.errors import UserError

if TYPE_CHECKING:
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
    image_px: int = Field(default=0, ge=0)
    """Side of the picture in pixels; 0: as pretrained. Positions are resampled."""
    drop_path: float | None = Field(default=None, ge=0, lt=1)
    """Stochastic depth while fine-tuning; by default that of the pretrained model."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """One training per seed; metrics are averaged, the weights are those of the first."""

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
        found = [
            self._once(stored, seed, first=index == 0, ranks=ranks, job=job)
            for index, seed in enumerate(self.seeds)
        ]
        averaged = {key: sum(metrics[key] for metrics in found) / len(found) for key in found[0]}
        return averaged | {"seeds": {str(s): m for s, m in zip(self.seeds, found, strict=True)}}

    def _measured(self) -> FinetuneTask:
        """The task, which must be one that can measure a model."""
        if not callable(getattr(self.task, "score", None)):
            raise UserError(
                f"{self._kind()} is for pretraining: it has no score() to measure a fine-tuned model "
                "with; use classification or retrieval"
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
    ) -> Mapping[str, float]:
        from beitctl.checkpoints.loading import changed
        from beitctl.data.labels import classes
        from beitctl.data.loader import Stream
        from beitctl.engine.learner import MultiwayLearner, Objective
        from beitctl.model.init import initial
        from beitctl.model.multiway import Multiway
        from beitctl_plugins.stages import shared

        config = self._config(stored.model)
        weights = {} if self.from_scratch else changed(stored, config)
        examples = shared.opened("source", self.source, job)
        tokenizer = shared.open_text(job, self.text_tokenizer) or stored.text_tokenizer()
        labels = classes(examples)
        tools = Tools(config, tokenizer, labels=labels, pictures=shared.pictures())

        def value(name: str, shape: Any) -> Any:
            known = shared.given(weights, name, shape) if name.startswith("model.") else None
            return initial(name, shape, config, seed) if known is None else known

        objectives = [Objective("task", self.task)]
        learner = shared.build(
            lambda: MultiwayLearner(Multiway(config), objectives, {"task": tools}),
            ranks,
            self.train,
            value,
            job,
        )
        stream = Stream("task", self.task, examples, self.samples, tools)
        folder = job.folder / f"seed-{seed}"
        shared.fit(
            learner, [stream], replace(self.train, seed=seed), ranks, job,
            folder=folder, name="" if first else f"seed-{seed}/",
        )  # fmt: skip
        if first:
            table = {
                "kind": registry.name_of("beitctl.tasks", type(self.task)),
                **self._measured().model_dump(mode="json"),
            }
            shared.write_weights(
                learner, job.folder / "weights", ranks, task=table, labels=labels, tokenizer=tokenizer
            )
        return self._score(learner, tools, first=first, ranks=ranks, job=job)

    def _score(
        self, learner: "MultiwayLearner", tools: Tools, *, first: bool, ranks: "Ranks", job: Job
    ) -> Mapping[str, float]:
        from beitctl.data.loader import Stream
        from beitctl_plugins.stages import shared

        task, fixed = self._measured(), replace(tools, train=False)
        stream = Stream("task", task, opened(self.held_out), 1, fixed)
        examples, outputs = shared.outputs(learner, stream, ranks)
        metrics = task.score(outputs, examples, fixed, opened(self.source))
        job.log.evaluation("held out", self.train.steps, metrics)
        if first:
            task.draw(outputs, examples, fixed, job.log)
        return metrics
