"""Measuring a model on held-out examples: shared out over ranks, with intervals, every prediction on disk.

Imported by stages inside ``run``, because it imports torch.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from beitctl.api import Example, Examples, FinetuneTask, Item, Job, Measured
from beitctl.data import order
from beitctl.data.loader import Place, Stream, batches, fixed
from beitctl.engine.agreement import as_told, everywhere
from beitctl.engine.dist import Ranks
from beitctl.engine.exchange import gathered, on_host
from beitctl.engine.learner import MultiwayLearner
from beitctl.errors import ChangedError, DataError
from beitctl.model.attention import chosen
from beitctl.replacing import replace_file
from beitctl.report.events import plain

PREDICTIONS = "predictions.jsonl"
DRAWS = 1000
"""Resamples of a bootstrap interval."""


@dataclass(frozen=True)
class Chosen(Sequence[Example]):
    """Some examples of a source; each is read when it is asked for."""

    examples: Examples
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Chosen": ...
    def __getitem__(self, index: int | slice) -> "Example | Chosen":
        if isinstance(index, slice):
            return Chosen(self.examples, self.indices[index])
        return self.examples[self.indices[index]]


@dataclass(frozen=True)
class Held:
    """What a model says of held-out examples."""

    stream: Stream
    examples: Chosen
    """Those that could be used, in order."""
    outputs: list[Any]
    """What the task says of them, batch by batch, on the host; on rank 0 alone."""
    left_out: list[str]
    """Why others could not be used; on rank 0 alone."""


class _Prepared(Dataset[tuple[int, Example | None, Item | None, str]]):
    """Prepared examples of a stream by position among some indices, or why they cannot be used."""

    def __init__(self, stream: Stream, indices: Sequence[int]) -> None:
        self.stream, self.indices = stream, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Example | None, Item | None, str]:
        index = self.indices[place]
        try:
            return index, *fixed(self.stream, 0, index), ""
        except ChangedError:
            raise
        except DataError as error:
            return index, None, None, str(error)


def whole(
    make: Callable[[], MultiwayLearner], weights: Mapping[str, Tensor], ranks: Ranks, dtype: torch.dtype
) -> MultiwayLearner:
    """A learner that is not sharded, in eval mode, so that every rank can use it by itself.

    Args:
        make: builds it.
        weights: whole parameters and buffers by name.
        ranks: this process among all.
        dtype: compute type; modules with ``compute_fp32`` and buffers stay as they are.
    """
    with torch.device("meta"):
        learner = make()
    learner.to_empty(device=ranks.device)
    learner.load_state_dict(dict(weights))
    exact = {id(p) for m in learner.modules() if getattr(m, "compute_fp32", False) for p in m.parameters()}
    for parameter in learner.parameters():
        parameter.requires_grad_(False)
        if id(parameter) not in exact:
            parameter.data = parameter.data.to(dtype)
    learner.model.attention_backend = chosen("auto", learner.model.config, ranks.device, dtype)
    return learner.eval()


def outputs(learner: MultiwayLearner, stream: Stream, ranks: Ranks, size: int = 64, workers: int = 0) -> Held:
    """What the learner's first task says of every example of a stream.

    Every rank answers for a contiguous share of the examples with a learner of its own (``whole``), so there
    is nothing to agree on until all are done, and the result does not depend on the number of ranks.

    Raises:
        DataError: not a single example can be used; the data changed.
    """
    mine = list(order.share(len(stream.examples), ranks.world, ranks.rank))
    found: dict[str, Any] = {}

    def answer() -> None:
        used: list[int] = []
        said: list[Any] = []
        problems: list[str] = []
        for chunk in _chunks(stream, mine, size, workers, problems):
            used += [index for index, _, _ in chunk]
            said.append(on_host(_said(learner, stream, [(e, item) for _, e, item in chunk], ranks)))
        found.update(used=used, said=said, problems=problems)

    everywhere(ranks, answer, as_told)
    shares = gathered(ranks, found)
    used = [index for share in ranks.gather_objects(found["used"]) for index in share]
    problems = [line for share in ranks.gather_objects(found["problems"]) for line in share]
    if not used:
        raise DataError(
            f"none of the {len(problems)} examples to measure on can be used: {'; '.join(problems[:3])}"
        )
    said = [output for share in shares for output in share["said"]]
    return Held(stream, Chosen(stream.examples, used), said, problems)


def _chunks(
    stream: Stream, indices: Sequence[int], size: int, workers: int, problems: list[str]
) -> Iterator[list[tuple[int, Example, Item]]]:
    """Usable examples in groups of ``size``, in order; why others are not goes to ``problems``."""
    loader: Iterable[Any] = DataLoader(
        _Prepared(stream, indices), batch_size=size, num_workers=workers, collate_fn=list
    )
    for group in loader if len(indices) else ():
        problems += [text for _, _, _, text in group if text]
        if good := [(index, example, item) for index, example, item, text in group if not text]:
            yield good


@torch.no_grad()
def _said(
    learner: MultiwayLearner, stream: Stream, chunk: Sequence[tuple[Example, Item]], ranks: Ranks
) -> Any:
    infer = getattr(stream.task, "infer", None)
    if callable(infer):
        return infer(learner, chunk, stream.tools)
    items = {stream.name: (stream.task, [item for _, item in chunk])}
    (batch,) = batches(items, learner.model.config, len(chunk), Place())
    return learner.outputs(batch.to(ranks.device))[stream.name]


def measured(
    held: Held, train: Examples, ranks: Ranks, job: Job, *, name: str, step: int = 0, told: bool = True
) -> dict[str, Any]:
    """Metrics of held-out examples on every rank; rank 0 writes predictions, figures and the log's record.

    Besides the task's own metrics there are ``left_out``, the number of examples that could not be used, and
    ``intervals_95``.

    Args:
        held: what the model says.
        train: training examples, for baselines.
        ranks: all processes.
        job: where to write.
        name: of the record in the log.
        step: of the record in the log.
        told: whether predictions and figures are written too.
    """
    task, tools = cast("FinetuneTask", held.stream.task), held.stream.tools

    def on_main() -> Any:
        if not ranks.main:
            return None
        found = task.score(held.outputs, held.examples, tools, train)
        metrics: dict[str, Any] = {**found.metrics, "left_out": float(len(held.left_out))}
        if bounds := intervals(found.each):
            metrics["intervals_95"] = bounds
        if told:
            write_predictions(found, job)
            task.draw(held.outputs, held.examples, tools, job.log)
        if bad := len(held.left_out):
            text = (
                f"{bad} of {bad + len(held.examples)} examples could not be measured on, such as "
                f"{held.left_out[0]}"
            )
            tell_left_out(held.left_out, "left-out-measured.txt", text, job)
        return metrics

    metrics: dict[str, Any] = everywhere(ranks, on_main, as_told)[0]
    job.log.evaluation(name, step, metrics)
    return metrics


def tell_left_out(lines: Sequence[str], file: str, text: str, job: Job) -> None:
    """Warn of what could not be used, and list it in a file of the run folder."""
    replace_file(
        job.folder / file, "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    )
    job.log.warning("W401", text, f"all of them are in {file}; the metrics are of the others")


def write_predictions(found: Measured, job: Job) -> None:
    """Write ``predictions.jsonl`` and the files that the task wants for outside tools."""
    if found.rows:
        lines = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in found.rows)
        replace_file(job.folder / PREDICTIONS, lines.encode("utf-8", "backslashreplace"))
    for name, content in found.files.items():
        text = json.dumps(plain(content), ensure_ascii=False)
        replace_file(job.folder / name, text.encode("utf-8", "backslashreplace"))


def intervals(each: Mapping[str, Any], seed: int = 0) -> dict[str, list[float]]:
    """Bounds of the 95 % percentile-bootstrap interval of every metric, over examples or queries."""
    found = {}
    for name, given in each.items():
        count, statistic = given if isinstance(given, tuple) else (len(given), None)
        if count < 2:
            continue
        values = None if statistic else np.asarray(given, np.float64)
        rng = np.random.default_rng(seed)
        draws = np.empty(DRAWS)
        for number in range(DRAWS):
            chosen_ones = rng.integers(0, count, count)
            draws[number] = statistic(chosen_ones) if values is None else values[chosen_ones].mean()
        found[name] = [float(bound) for bound in np.nanpercentile(draws, [2.5, 97.5])]
    return found
