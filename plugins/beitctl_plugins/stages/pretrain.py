"""The stage ``pretrain``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from beitctl.api import Job, Plugin, SourceField, TaskField, Tools
from beitctl.config import ModelConfig, TrainConfig

if TYPE_CHECKING:
    from beitctl.data.loader import StepData, Stream
    from beitctl.engine.dist import Ranks
    from beitctl.engine.learner import MultiwayLearner

HELD_OUT_SAMPLES = 512
BASELINE_STEPS = 20


class ObjectiveTable(Plugin):
    """One objective: a task on a source, all of them in every step."""

    task: TaskField
    """The loss."""
    source: SourceField
    """Where its examples come from."""
    samples: int = Field(ge=1)
    """Samples per step, over all ranks."""
    weight: float = Field(default=1.0, gt=0)
    """Weight of its loss."""
    held_out: SourceField | None = None
    """Examples to measure on that training does not see."""


class Pretrain(Plugin):
    """Pretrain a Multiway Transformer by masked data modelling on pictures, texts and pairs at once."""

    model: ModelConfig
    """Shape of the model."""
    train: TrainConfig
    """The training loop."""
    objectives: dict[str, ObjectiveTable] = Field(min_length=1)
    """What is learnt, by name: BEiT-3 has image, text and pair."""
    text_tokenizer: str = ""
    """The text tokenizer: ``@train-tokenizer.text``, a run folder or a .spm file."""
    tokens: str = ""
    """The token store with the image codes: ``@tokenize-images`` or a folder."""
    expect_codes: int = Field(default=8192, ge=2)
    """Codes of the image tokenizer, for the plan of a run whose token store does not exist yet."""

    def plan(self) -> Mapping[str, Any]:
        """Parameters by part, the batch, and the data that the run reads."""
        import torch

        from beitctl.engine.learner import MultiwayLearner
        from beitctl.model.multiway import Multiway
        from beitctl.model.sizes import parameter_parts

        text: Any = _Planned(self.model.vocabulary)
        codes: Any = _PlannedTokens(self.expect_codes, self.model.grid)
        tools = Tools(self.model, text, codes)
        with torch.device("meta"):
            learner = MultiwayLearner(
                Multiway(self.model), self._objectives(), dict.fromkeys(self.objectives, tools)
            )
        steps = self.train.steps
        return {
            "parameters": parameter_parts(learner.model, dict(learner.heads.items())),
            "batch": {name: table.samples for name, table in self.objectives.items()}
            | {"total": sum(table.samples for table in self.objectives.values())},
            "tokens per picture": self.model.patches + 1,
            "steps": steps,
            "data": {name: self._need(table, steps) for name, table in self.objectives.items()},
        }

    @staticmethod
    def _need(table: ObjectiveTable, steps: int) -> Mapping[str, Any]:
        from beitctl.errors import DataError

        needed = table.samples * steps
        try:
            held = len(table.source.open())
        except DataError as error:
            return {"samples seen": needed, "source": f"not there: {error}"}
        return {"samples seen": needed, "examples": held, "epochs": needed / held}

    def inputs_fingerprint(self) -> str:
        """Hash of the data."""
        return ",".join(table.source.open().fingerprint for table in self.objectives.values())

    def run(self, job: Job) -> Mapping[str, Any]:
        """Train, write the weights, measure on what was held out, draw."""
        from beitctl.engine import dist
        from beitctl.model.init import initial
        from beitctl_plugins.stages import shared

        ranks = dist.start()
        tokenizer = shared.open_text(job, self.text_tokenizer)
        tools = Tools(self.model, tokenizer, shared.open_tokens(job, self.tokens), pictures=shared.pictures())
        streams = [self._stream(name, table, table.source, tools) for name, table in self.objectives.items()]
        config, seed = self.model, self.train.seed
        learner = shared.build(
            config,
            self._objectives(),
            dict.fromkeys(self.objectives, tools),
            ranks,
            self.train.precision,
            lambda name, shape: initial(name, shape, config, seed),
        )
        data = shared.fit(learner, streams, self.train, ranks, job)
        shared.write_weights(learner, job.folder / "weights", ranks, tokenizer=tokenizer)
        return self._measure(learner, tools, data, ranks, job)

    def _objectives(self) -> list[Any]:
        from beitctl.engine.learner import Objective

        return [Objective(name, table.task, table.weight) for name, table in self.objectives.items()]

    @staticmethod
    def _stream(name: str, table: ObjectiveTable, source: Any, tools: Tools) -> "Stream":
        from beitctl.data.loader import Stream

        return Stream(name, table.task, source.open(), table.samples, tools)

    def _measure(
        self, learner: "MultiwayLearner", tools: Tools, data: "StepData", ranks: "Ranks", job: Job
    ) -> Mapping[str, Any]:
        """Losses at both ends, accuracy on held-out examples, and that of the most frequent token."""
        from beitctl.data.loader import Place, batches, prepared
        from beitctl.engine.loop import evaluate
        from beitctl_plugins.stages import shared, showing

        fixed = replace(tools, train=False)
        held = {
            name: self._stream(name, table, table.held_out or table.source, fixed)
            for name, table in self.objectives.items()
        }
        items = {
            name: (stream.task, [item for _, item in prepared(stream, self.train.seed, HELD_OUT_SAMPLES)])
            for name, stream in held.items()
        }
        place = Place(ranks.rank, ranks.world)
        found = evaluate(learner, batches(items, self.model, 64, place), ranks)
        job.log.evaluation("held out", self.train.steps, found)
        guesses = _most_frequent(data, learner)
        result: dict[str, Any] = {}
        for term in learner.weights:
            if f"{term}/loss" not in found:
                continue
            first, last = shared.first_and_last(job, f"{term}/loss") if ranks.main else (0.0, 0.0)
            result[term.replace(".", "_")] = {
                "loss_first": first,
                "loss_last": last,
                "held_out_loss": found[f"{term}/loss"],
                "accuracy": found[f"{term}/accuracy"],
            }
            if term in guesses:
                result[term.replace(".", "_")]["baseline_accuracy"] = _share_of(guesses[term], term, items)
        showing.reconstructions(learner, held, job, ranks, job.path(self.tokens) if self.tokens else None)
        return result


def _most_frequent(data: "StepData", learner: "MultiwayLearner") -> dict[str, int]:
    """The most frequent target of every term in the first steps; terms without targets are left out."""
    import numpy as np

    targets: dict[str, list[np.ndarray[Any, Any]]] = {}
    for step in range(BASELINE_STEPS):
        for batch in data[step]:
            for objective in learner.objectives:
                group = batch.groups[objective.name]
                found = {"patch": group.patch_targets, "text": group.text_targets, "sample": group.labels}
                for short, term in objective.task.terms().items():
                    targets.setdefault(objective.term(short), []).append(found[term.unit].numpy())
    joined = {term: np.concatenate(parts) for term, parts in targets.items()}
    return {
        term: int(np.bincount(all_[all_ >= 0]).argmax()) for term, all_ in joined.items() if (all_ >= 0).any()
    }


def _share_of(guess: int, term: str, items: Mapping[str, tuple[Any, Any]]) -> float:
    """Share of the held-out targets of a term that equal one token."""
    import numpy as np

    name, _, short = term.partition(".")
    task, found = items[name]
    field = {"patch": "patch_targets", "text": "text_targets", "sample": "label"}[task.terms()[short].unit]
    targets = np.concatenate([np.atleast_1d(getattr(item, field)) for item in found])
    return float((targets[targets >= 0] == guess).mean())


class _Planned:
    """Stands for a text tokenizer that is not trained yet."""

    def __init__(self, size: int) -> None:
        self.size, self.fingerprint = size, ""


class _PlannedTokens:
    """Stands for a token store that is not written yet."""

    def __init__(self, codes: int, grid: int) -> None:
        self.codes, self.grid, self.views = codes, grid, 1
