"""What several stages do alike: open tokenizers and stores, train a learner, write its weights.

Imported by stages inside ``run``, because it imports torch.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beitctl.api import Example, Examples, Job, Tools
from beitctl.checkpoints.native import load_tokenizer, save_model
from beitctl.config import TrainConfig
from beitctl.data import opening
from beitctl.data.images import Pictures
from beitctl.data.labels import classes, label, words
from beitctl.data.loader import Place, StepData, Stream
from beitctl.data.order import digest
from beitctl.data.packing import Packed
from beitctl.data.store import TokenStore
from beitctl.engine.compiling import compiled, preparation, rows_multiple
from beitctl.engine.dist import Ranks
from beitctl.engine.learner import MultiwayLearner
from beitctl.engine.loop import train
from beitctl.engine.session import Session
from beitctl.engine.shard import Initial, full_weights, sharded
from beitctl.errors import DataError, UserError
from beitctl.report.events import read
from beitctl_plugins.sources.mixture import Mixed

CACHE_MIB = 512
"""Memory for decoded pictures, per process."""


def open_text(job: Job, value: str) -> Any:
    """The text tokenizer that a setting names, or None when it is empty."""
    return load_tokenizer(job.path(value)) if value else None


def open_tokens(job: Job, value: str) -> TokenStore | None:
    """The token store that a setting names, or None when it is empty."""
    if not value:
        return None
    path = job.path(value)
    return TokenStore.open(path / "tokens" if (path / "tokens").is_dir() else path)


def pictures() -> Pictures:
    """A decoder with a cache."""
    return Pictures(cache_mib=CACHE_MIB)


def opened(name: str, source: Any, job: Job) -> Examples:
    """The examples of a source; says in the log, and in a file of the run folder, what it left out."""
    examples: Examples = opening.opened(source)
    problems = list(getattr(examples, "problems", []))
    if problems:
        file = job.folder / f"left-out-{name}.txt"
        shown = "".join(f"\n  {line}" for line in problems[:3])
        job.log.note(f"{name}: {len(problems):,} left out by the source, all in {file.name}:{shown}")
        if int(os.environ.get("RANK", "0")) == 0:
            file.write_text("\n".join(problems) + "\n", encoding="utf-8", errors="backslashreplace")
    return examples


def packed(documents: Examples, tools: Tools, ranks: Ranks, job: Job) -> Examples:
    """Documents as sequences that fill the model's longest text; of a mixture each part for itself.

    Raises:
        UserError: there is no text tokenizer.
    """
    if tools.tokenizer is None:
        raise UserError('packed: set text_tokenizer, for example to "@train-tokenizer.text"')
    parts = getattr(documents, "parts", None)
    if parts:
        found = [packed(part, tools, ranks, job) for _, part in parts]
        return Mixed(found, [weight for weight, _ in parts])
    room = tools.model.text_tokens - 2
    made = Packed(documents, tools.tokenizer, room, rank=ranks.rank, world=ranks.world, told=job.log.note)
    job.log.note(f"{len(documents):,} documents packed into {len(made):,} sequences of up to {room} ids")
    return made


def build(
    make: Callable[[], MultiwayLearner], ranks: Ranks, config: TrainConfig, initial: Initial, job: Job
) -> MultiwayLearner:
    """A sharded learner with its initial weights, on the hardware as the settings say.

    Raises:
        UserError: a setting of the engine cannot hold here.
        SetupError: the compiler or an attention backend fails here.
    """
    if compiled(config, ranks.device):
        job.log.note(
            "blocks are compiled in the first steps, which takes minutes (train.compile); then they are fast"
        )
    learner: MultiwayLearner = sharded(
        make, ranks, config.precision, initial,
        prepare=preparation(config, ranks, job.log.warning), shard_ranks=config.shard_ranks,
    )  # fmt: skip
    return learner


def frozen_in(learner: MultiwayLearner, frozen: Sequence[str]) -> MultiwayLearner:
    """The learner, with training switched off for the parameters that have one of some parts in their name.

    Raises:
        UserError: a part of a name that no parameter has, or that leaves nothing to train.
    """
    names = dict(learner.named_parameters())
    strange = [part for part in frozen if not any(part in name for name in names)]
    if strange:
        raise UserError(f"frozen: no parameter has {', '.join(map(repr, strange))} in its name")
    for name, parameter in names.items():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise UserError("frozen: nothing is left to train")
    return learner


def given(known: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor | None:
    """The weight that a parameter begins with; None if there is none, or if it is a head of another size.

    Raises:
        DataError: it belongs to the model's body and has another shape.
    """
    value = known.get(name)
    if value is None or value.shape == shape:
        return value
    if name.startswith("heads."):
        return None
    raise DataError(f"init: {name} is {tuple(value.shape)}, this model needs {tuple(shape)}")


def report_start(learner: MultiwayLearner, known: Mapping[str, Tensor], job: Job) -> None:
    """Say which parameters begin with given weights, which anew, and which weights found no place.

    Raises:
        UserError: not one of the weights fits.
    """
    shapes = {name: value.shape for name, value in learner.named_parameters()}
    used = {name for name, shape in shapes.items() if given(known, name, shape) is not None}
    new, left = sorted(set(shapes) - used), sorted(set(known) - used)
    if len(new) == len(shapes):
        raise UserError(f"init: none of its {len(known)} tensors belongs to this model")
    parts = [f"{len(shapes) - len(new)} parameters begin with the weights of init"]
    parts += [f"{len(names)} {text}: {_listed(names)}" for names, text in (
        (new, "begin at random"), (left, "of its tensors are not used"),
    ) if names]  # fmt: skip
    job.log.note("; ".join(parts))


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def vocabulary(task: Any, examples: Examples) -> tuple[str, ...]:
    """Names of the classes or answers that a task tells apart; by default the labels that occur, sorted."""
    own = getattr(task, "vocabulary", None)
    return tuple(own(examples)) if callable(own) else classes(examples)


def trained_on(task: Any, examples: Examples, tools: Tools, job: Job) -> Examples:
    """The examples that a task can learn from: all, unless it has a method ``usable(examples, labels)``.

    Raises:
        DataError: it can learn from none.
    """
    usable = getattr(task, "usable", None)
    indices = list(usable(examples, tools.labels)) if callable(usable) else []
    if not callable(usable) or len(indices) == len(examples):
        return examples
    if not indices:
        raise DataError(f"source: not one of {len(examples):,} examples can be learnt from by this task")
    job.log.note(f"{len(examples) - len(indices):,} of {len(examples):,} examples have nothing to learn from")
    return Subset(examples, indices)


class Subset:
    """Some examples of a source, as examples."""

    def __init__(self, examples: Examples, indices: Sequence[int]) -> None:
        self.examples, self.indices = examples, indices
        self.fingerprint = digest(examples.fingerprint, np.asarray(indices, np.int64).tobytes()).hex()
        lengths = getattr(examples, "lengths", None)
        self.lengths = None if lengths is None else np.asarray(lengths)[list(indices)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.examples[self.indices[index]]

    def label(self, index: int) -> str | None:
        """Class of an example."""
        return label(self.examples, self.indices[index])

    def words(self, index: int) -> tuple[str, ...]:
        """Captions and text of an example."""
        return words(self.examples, self.indices[index])


def check_share(name: str, task: Any, samples: int, micro_samples: int, ranks: Ranks) -> None:
    """Contrastive losses compare all samples of a forward pass, on equal shares.

    Raises:
        UserError: shares are not equal, a step has several passes, or there is nothing to compare.
    """
    if task.layout == "dual" and samples < 2:
        raise UserError(f"{name}: a contrastive task compares samples; it needs at least 2, found {samples}")
    if task.layout == "dual" and (samples % ranks.world or micro_samples):
        raise UserError(
            f"{name}: a contrastive task needs samples ({samples}) to be a multiple of the {ranks.world} "
            "ranks and no accumulation (micro_samples = 0): it compares all samples of one pass"
        )


def check_even(name: str, task: Any, samples: int, passes: int, ranks: Ranks) -> None:
    """Mixup mixes the samples of a forward pass in twos; a step has so many ``passes`` on each rank.

    Raises:
        UserError: some pass of some rank would have an odd number of samples.
    """
    if getattr(task, "even_passes", False) and samples % (2 * passes * ranks.world):
        raise UserError(
            f"{name}: mixup and cutmix mix samples in twos, so samples ({samples}) must be a multiple of "
            f"{2 * passes * ranks.world}: twice the {ranks.world} ranks times {passes} passes"
        )


def passes(samples: int, config: TrainConfig, ranks: Ranks) -> int:
    """Forward passes of a step on every rank, for samples of all objectives."""
    return Place(ranks.rank, ranks.world, config.micro_samples).passes(samples)


def fit(
    learner: MultiwayLearner, streams: Sequence[Stream], config: TrainConfig, ranks: Ranks, job: Job,
    *, folder: Path | None = None, name: str = "",
) -> StepData:  # fmt: skip
    """Train to the end, logging as the settings say; ``name`` goes before the names of the metrics."""
    model = learner.model.config
    place = Place(ranks.rank, ranks.world, config.micro_samples)
    data = StepData(streams, model, config.seed, place, rows_multiple(config, ranks.device))
    session = Session(
        ranks, folder or job.folder, identity="/".join(learner.weights), resume=job.resume,
        layers=model.layers, examples={stream.name: len(stream.examples) for stream in streams},
        saved=job.log.checkpoint,
        started=lambda step: job.log.note(f"resuming from step {step}") if step else None,
        warn=job.log.warning, sampled=job.log.samples, memory_hint=job.memory_hint,
    )  # fmt: skip
    with closing(train(learner, data, config, session)) as steps:
        for step in steps:
            if step.number == 1 or step.number % config.log_every_steps == 0 or step.number == config.steps:
                metrics = step.metrics()
                job.log.step(step.number, config.steps, {f"{name}{k}": v for k, v in metrics.items()})
    if config.ema_decay:
        job.log.note(
            f"the weights are the moving average of those of all steps (ema_decay = {config.ema_decay:g})"
        )
    if config.profile and (traces := session.folder / "profile").is_dir():
        job.log.note(
            f"profile of steps {config.profile[0]} to {config.profile[1]}: {traces}/rank-*.json.gz, "
            "to be opened in ui.perfetto.dev, and tables in rank-*.txt"
        )
    return data


def write_weights(
    learner: MultiwayLearner, folder: Path, ranks: Ranks, *, task: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (), tokenizer: Any = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gather the whole weights and write them with their configuration; returns them on rank 0."""
    weights = full_weights(learner)
    if ranks.main:
        save_model(folder, weights, learner.model.config, task=task, labels=labels, tokenizer=tokenizer)
    ranks.barrier()
    return weights


def logged(job: Job, key: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in the log of this run, those before a resume included."""
    records = [r for r in read(job.folder) if r["event"] == "step" and key in r["metrics"]]
    return [(r["step"], float(r["metrics"][key])) for r in records]


def first_and_last(job: Job, key: str) -> tuple[float, float]:
    """Value of a logged metric at the first step, and its mean over the last twentieth of the records."""
    values = [value for _, value in logged(job, key)]
    if not values:
        raise UserError(f"{job.folder}: nothing was logged for {key}")
    tail = values[-max(1, len(values) // 20) :]
    return values[0], sum(tail) / len(tail)
