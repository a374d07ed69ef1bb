"""The stage ``pretrain``."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from beitctl.api import Job, Plugin, SourceField, TaskField, Tools
from beitctl.config import ModelConfig, TrainConfig
from beitctl.data.opening import opened

if TYPE_CHECKING:
    import torch

    from beitctl.data.loader import StepData, Stream
    from beitctl.engine.dist import Ranks
    from beitctl.engine.learner import MultiwayLearner
    from beitctl_plugins.stages.image_codes import Online

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
    packed: bool = False
    """Whether documents are cut between sentences and joined to sequences of the model's ``text_tokens``.
    Else a document is a sequence, of which a longer one shows a random stretch. Texts are counted once, then
    read from the cache (``BEITCTL_CACHE``)."""

    @model_validator(mode="after")
    def _texts_are_packed(self) -> "ObjectiveTable":
        if self.packed and self.task.layout != "text":
            raise ValueError(f"packed joins texts; this task reads {self.task.layout}, remove it")
        return self


class Pretrain(Plugin):
    """Pretrain a Multiway Transformer: masked data modelling and other objectives, all in every step."""

    model: ModelConfig
    """Shape of the model."""
    train: TrainConfig
    """The training loop."""
    objectives: dict[str, ObjectiveTable] = Field(min_length=1)
    """What is learnt, by name: BEiT-3 has image, text and pair."""
    text_tokenizer: str = ""
    """The text tokenizer: ``@train-tokenizer.text``, a run folder, a .spm file or BERT's ``vocab.txt``."""
    tokens: str = ""
    """The token store with the image codes: ``@tokenize-images`` or a folder."""
    tokens_from: str = ""
    """The tokenizer that the store must have been made with: a store of another one is refused."""
    image_tokenizer: str = ""
    """In place of ``tokens``: the image tokenizer that computes codes in every step, of crops drawn anew:
    ``@train-tokenizer.image``, a folder or a released file."""
    image_tokenizer_settings: dict[str, Any] = Field(default_factory=dict)
    """What its file does not say, such as ``{ heads = 12 }``."""
    expect_codes: int = Field(default=8192, ge=2)
    """Codes of the image tokenizer, for the plan of a run whose token store does not exist yet."""
    init: str = ""
    """Weights to begin with: ``@pretrain.vision``, a folder or a file; what they have not, and heads of
    another size, begin at random."""
    init_settings: dict[str, Any] = Field(default_factory=dict)
    """What the file of ``init`` does not say, such as ``{ heads = 12 }``."""
    frozen: list[str] = Field(default_factory=list)
    """Parts of names of parameters that are not trained, such as ``attention`` or ``ffn.vision``."""

    @model_validator(mode="after")
    def _one_origin_of_codes(self) -> "Pretrain":
        if self.tokens and self.image_tokenizer:
            raise ValueError("tokens and image_tokenizer: codes come from one of them, remove the other")
        if self.tokens_from and not self.tokens:
            raise ValueError("tokens_from says which tokenizer made tokens, which is not set")
        if self.image_tokenizer_settings and not (self.image_tokenizer or self.tokens_from):
            raise ValueError("image_tokenizer_settings belong to image_tokenizer, which is not set")
        return self

    @model_validator(mode="after")
    def _fitting(self) -> "Pretrain":
        for name, table in self.objectives.items():
            fitted = getattr(table.task, "fitted", None)
            wanted = asdict(fitted(self.model) if callable(fitted) else self.model)
            found = [key for key, value in asdict(self.model).items() if wanted[key] != value]
            if found:
                listed = ", ".join(f"{key} = {str(wanted[key]).lower()}" for key in found)
                raise ValueError(
                    f"objectives.{name}: its task reads a model with {listed}; set that in model, or change "
                    "the task (classification: pool)"
                )
        return self

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """A table of this stage at toy size, on the embedded data."""
        from beitctl_plugins.stages import toy

        return toy.pretraining(table)

    def plan(self) -> Mapping[str, Any]:
        """Parameters by part, the batch, and the data that the run reads."""
        import torch

        from beitctl.engine.learner import MultiwayLearner
        from beitctl.model.multiway import Multiway
        from beitctl.model.sizes import parameter_parts

        text: Any = _Planned(self.model.vocabulary)
        codes: Any = _PlannedTokens(self.expect_codes, self.model.grid[0])
        tools = Tools(self.model, text, codes, labels=self._planned_labels())
        with torch.device("meta"):
            learner = MultiwayLearner(
                Multiway(self.model), self._objectives(), dict.fromkeys(self.objectives, tools)
            )
        steps = self.train.steps
        return {
            "parameters": parameter_parts(learner.model, dict(learner.heads.items())),
            "batch": {name: table.samples for name, table in self.objectives.items()}
            | {"total": sum(table.samples for table in self.objectives.values())},
            "tokens per picture": self.model.picture_tokens,
            "steps": steps,
            **({"image codes": f"online, {self.image_tokenizer}"} if self.image_tokenizer else {}),
            "data": {name: self._need(table, steps) for name, table in self.objectives.items()},
        }

    def _planned_labels(self) -> tuple[str, ...]:
        """Stand-ins for the classes, as many as the source has, or two where it is not there yet."""
        from beitctl.errors import DataError

        try:
            return self._labels()
        except DataError:
            return ("first", "second")

    @staticmethod
    def _need(table: ObjectiveTable, steps: int) -> Mapping[str, Any]:
        from beitctl.errors import DataError

        needed = table.samples * steps
        try:
            held = len(opened(table.source))
        except DataError as error:
            return {"samples seen": needed, "source": f"not there: {error}"}
        return {"samples seen": needed, "examples": held, "epochs": needed / held}

    def inputs_fingerprint(self) -> str:
        """Hash of the data."""
        return ",".join(opened(table.source).fingerprint for table in self.objectives.values())

    def run(self, job: Job) -> Mapping[str, Any]:
        """Train, write the weights, measure on what was held out, draw."""
        from beitctl.engine import dist
        from beitctl.engine.learner import MultiwayLearner
        from beitctl.model.init import initial
        from beitctl.model.multiway import Multiway
        from beitctl_plugins.stages import shared

        ranks = dist.start()
        tokenizer, labels = shared.open_text(job, self.text_tokenizer), self._labels()
        tokens, online = shared.open_tokens(job, self.tokens), self._online(job, ranks)
        sizes = online.sizes if online else None
        tools = Tools(self.model, tokenizer, tokens, labels, pictures=shared.pictures(), online=sizes)
        passes = shared.passes(sum(t.samples for t in self.objectives.values()), self.train, ranks)
        for name, table in self.objectives.items():
            shared.check_share(name, table.task, table.samples, self.train.micro_samples, ranks)
            shared.check_even(name, table.task, table.samples, passes, ranks)
        streams = [
            self._stream(name, table, table.source, tools, ranks, job)
            for name, table in self.objectives.items()
        ]
        self._check_tokens(tokens, streams, job)
        config, seed, known = self.model, self.train.seed, self._start(job)

        def value(name: str, shape: Any) -> Any:
            begun = shared.given(known, name, shape)
            return initial(name, shape, config, seed) if begun is None else begun

        objectives, every = self._objectives(), dict.fromkeys(self.objectives, tools)

        def make() -> "MultiwayLearner":
            return shared.frozen_in(MultiwayLearner(Multiway(config), objectives, every), self.frozen)

        learner = shared.build(make, ranks, self.train, value, job)
        if online:
            learner.code_with(online)
        if self.init:
            shared.report_start(learner, known, job)
        data = shared.fit(learner, streams, self.train, ranks, job)
        shared.write_weights(
            learner,
            job.folder / "weights",
            ranks,
            task=self._task_table(),
            labels=labels,
            tokenizer=tokenizer,
        )
        found = self._measure(learner, tools, data, ranks, job, online)
        return {**found, "tokens": "online" if online else "store"} if self._coded() else found

    def _coded(self) -> bool:
        """Whether an objective predicts codes of patches."""
        from beitctl_plugins.stages.image_codes import predicts_codes

        return any(predicts_codes(table.task) for table in self.objectives.values())

    def _online(self, job: Job, ranks: "Ranks") -> "Online | None":
        """The tokenizer that computes codes in the training step, if the recipe names one."""
        from beitctl.engine.shard import compute_dtype
        from beitctl_plugins.stages.image_codes import Online, open_tokenizer

        if not self.image_tokenizer or not self._coded():
            return None
        path = job.path(self.image_tokenizer)
        found = open_tokenizer(path, self.image_tokenizer_settings, "image_tokenizer")
        return Online(found, ranks.device, compute_dtype(self.train.precision, ranks.device))

    def _check_tokens(self, tokens: Any, streams: "Sequence[Stream]", job: Job) -> None:
        """Refuse a store of another tokenizer or of other pictures."""
        from beitctl.data.store import TokenStore
        from beitctl_plugins.stages import image_codes

        if not isinstance(tokens, TokenStore):
            return
        if self.tokens_from:
            path, settings = job.path(self.tokens_from), self.image_tokenizer_settings
            tokenizer = image_codes.open_tokenizer(path, settings, "image_tokenizer")
            image_codes.check_tokenizer(tokens, tokenizer, f"tokens_from ({self.tokens_from})")
        for stream in streams:
            if image_codes.predicts_codes(stream.task):
                image_codes.check_pictures(tokens, stream.examples, self.train.seed)

    def _start(self, job: Job) -> "dict[str, torch.Tensor]":
        """The tensors of ``init``, adapted to this model; empty without one."""
        from beitctl.checkpoints.loading import changed, read_model

        if not self.init:
            return {}
        stored = read_model(job.path(self.init), self.init_settings)
        return changed(stored, self.model, grown=True)

    def _labels(self) -> tuple[str, ...]:
        """Classes of the sources of objectives that learn them; of one alone in the order of its task."""
        from beitctl.data.labels import classes

        found = [
            tuple(getattr(table.task, "vocabulary", classes)(opened(table.source)))
            for table in self.objectives.values()
            if getattr(table.task, "labelled", False)
        ]
        return found[0] if len(found) == 1 else tuple(sorted({label for names in found for label in names}))

    def _task_table(self) -> dict[str, Any] | None:
        """Table of the task whose heads the weights hold, if it is one that can be measured afterwards."""
        from beitctl import registry

        tasks = [table.task for table in self.objectives.values()]
        if len(tasks) != 1 or not callable(getattr(tasks[0], "score", None)):
            return None
        kind = registry.name_of("beitctl.tasks", type(tasks[0]))
        return {"kind": kind, **tasks[0].model_dump(mode="json")}  # type: ignore[attr-defined]

    def _objectives(self) -> list[Any]:
        from beitctl.engine.learner import Objective

        return [Objective(name, table.task, table.weight) for name, table in self.objectives.items()]

    @staticmethod
    def _stream(
        name: str, table: ObjectiveTable, source: Any, tools: Tools, ranks: "Ranks", job: Job
    ) -> "Stream":
        from beitctl.data.loader import Stream
        from beitctl_plugins.stages import shared

        examples = shared.opened(name if tools.train else f"{name}.held_out", source, job)
        if table.packed:
            examples = shared.packed(examples, tools, ranks, job)
        return Stream(name, table.task, examples, table.samples, tools)

    def _measure(
        self, learner: "MultiwayLearner", tools: Tools, data: "StepData", ranks: "Ranks", job: Job,
        online: "Online | None",
    ) -> Mapping[str, Any]:  # fmt: skip
        """Losses at both ends, accuracy on held-out examples, and that of the most frequent token."""
        from beitctl.data.loader import Place, batches, prepared
        from beitctl.engine.loop import evaluate
        from beitctl_plugins.stages import shared, showing

        fixed = replace(tools, train=False)
        held = {
            name: self._stream(name, table, table.held_out or table.source, fixed, ranks, job)
            for name, table in self.objectives.items()
        }
        items = {
            name: (
                stream.task,
                _even(stream, prepared(stream, self.train.seed, HELD_OUT_SAMPLES), ranks),
            )
            for name, stream in held.items()
        }
        if online:
            items = {name: (task, online.filled(found)) for name, (task, found) in items.items()}
        place, size = Place(ranks.rank, ranks.world), 64 + -64 % ranks.world
        found = evaluate(learner, batches(items, self.model, size, place), ranks)
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
        for batch in map(learner.coded, data[step]):
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


def _even(stream: "Stream", prepared: "Iterator[tuple[Any, Any]]", ranks: "Ranks") -> list[Any]:
    """Prepared items; of a contrastive task, which compares whole batches, as many as share out evenly."""
    items = [item for _, item in prepared]
    return items[: len(items) - len(items) % ranks.world] if stream.task.layout == "dual" else items


class _Planned:
    """Stands for a text tokenizer that is not trained yet."""

    def __init__(self, size: int) -> None:
        self.size, self.fingerprint = size, ""


class _PlannedTokens:
    """Stands for a token store that is not written yet."""

    def __init__(self, codes: int, grid: int) -> None:
        self.codes, self.grid, self.views = codes, grid, 1
