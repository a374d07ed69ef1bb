"""What a run diverged on, on disk: the batch, its losses, and where numbers stop being finite."""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beitctl.engine.dist import Ranks
from beitctl.engine.guarding.guard import Verdict
from beitctl.engine.losses import weighted
from beitctl.engine.shard import local

FOLDER = "captures"
MOST = 3
"""Captures of one run."""


@dataclass(frozen=True)
class Suspect:
    """The step to look at again."""

    verdict: Verdict
    index: int
    """Its data index."""
    micro: Sequence[Any]
    """The batches of its passes on this rank, on the host."""
    counts: Mapping[str, float]
    """Global number of predictions per term."""


def capture(learner: Any, suspect: Suspect, folder: Path, ranks: Ranks, warn: Callable[[str], None]) -> None:
    """Run a step again and write down what is found; every rank must call it. Leaves no gradients.

    ``captures/step-N/rank-R/`` of the run folder gets ``about.json`` and ``batch.npz``. The learner's buffers
    may change. What cannot be written is a warning.
    """
    place = folder / FOLDER / f"step-{suspect.verdict.step:08d}"
    if ranks.broadcast_object(len(list(place.parent.glob("step-*"))) >= MOST):
        return
    about = _about(learner, suspect, ranks)
    problem = ""
    try:
        own = place / f"rank-{ranks.rank}"
        own.mkdir(parents=True, exist_ok=True)
        (own / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        np.savez(own / "batch.npz", **dict(_arrays(suspect.micro)))
    except OSError as error:
        problem = f"rank {ranks.rank}: {error}"
    problems = [text for text in ranks.gather_objects(problem) if text]
    if problems:
        warn(f"{place}: the batch of step {suspect.verdict.step} could not be written: {'; '.join(problems)}")
    else:
        warn(f"{place} holds the batch of step {suspect.verdict.step} and where it stops being finite")


def _about(learner: Any, suspect: Suspect, ranks: Ranks) -> dict[str, Any]:
    """Run the passes twice, with the collectives of a step: for the blocks, then for the gradients.

    Blocks can be watched in eager mode alone, which fits into memory without gradients; those come from what
    the step itself ran.
    """
    blocks: list[tuple[str, Tensor]] = []
    losses = dict.fromkeys(learner.weights, 0.0)
    learner.train()
    with torch.compiler.set_stance("force_eager"), torch.no_grad(), _watched(learner, blocks):
        for batch in suspect.micro:
            sums = learner(batch.to(ranks.device))
            for term, count in suspect.counts.items():
                losses[term] += float(sums[term][0]) / max(1.0, count)
    for batch in suspect.micro:
        sums = learner(batch.to(ranks.device))
        loss = weighted(sums, learner.weights, suspect.counts)
        loss.backward()  # type: ignore[no-untyped-call]
    bad = [name for name, parameter in learner.named_parameters() if not _finite_gradient(parameter)]
    learner.zero_grad(set_to_none=True)
    found = ranks.gather_objects(bad)
    return {
        "step": suspect.verdict.step,
        "data_index": suspect.index,
        "reason": suspect.verdict.reason,
        "grad_norm": _number(suspect.verdict.norm),
        "samples": [id for batch in suspect.micro for id in batch.samples],
        "losses_of_this_rank": {term: _number(loss) for term, loss in losses.items()},
        "first_block_not_finite": next((name for name, fine in blocks if not bool(fine)), None),
        "gradients_not_finite": sorted({name for part in found for name in part}),
        "rank": ranks.rank,
        "world": ranks.world,
        "torch": str(torch.__version__),
    }


@contextlib.contextmanager
def _watched(learner: nn.Module, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Note for every block, or every leaf where there are none, as they run, if its output is finite."""
    modules = dict(learner.named_modules())
    chosen = [name for name in modules if re.search(r"(?:^|\.)blocks\.\d+$", name)]
    chosen = chosen or [name for name, module in modules.items() if not any(module.children())]

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, given: Any, output: Any) -> None:
            for _, tensor in _tensors("", output):
                if tensor.is_floating_point():
                    seen.append((name or "the learner", torch.isfinite(tensor.detach()).all()))

        return note

    handles = [modules[name].register_forward_hook(hook(name)) for name in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is None or bool(torch.isfinite(local(parameter.grad)).all())


def _arrays(micro: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Every tensor of the batches under a name that says where it stood."""
    for number, batch in enumerate(micro):
        for name, tensor in _tensors(f"pass{number}", batch):
            host = tensor.detach().cpu()
            yield name, (host.float() if host.dtype == torch.bfloat16 else host).numpy()


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        yield name, torch.from_numpy(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from _tensors(f"{name}.{place}", item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(name, vars(value))


def _number(value: float) -> float | str:
    """JSON has no number for what is not finite."""
    return value if math.isfinite(value) else str(value)
