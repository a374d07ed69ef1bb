"""What must hold on every device: the same checks for a GPU and, as far as they can, for a CPU."""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mixed import MODELS, error, gradients, learner, loop, settings, varied
from torch import Tensor
from torch.distributed.tensor import DTensor

from beitctl.config import ModelConfig, OptimConfig, TrainConfig
from beitctl.data.batch import Batch
from beitctl.engine import optim
from beitctl.engine.compiling import compiled_graphs, rows_multiple
from beitctl.engine.dist import Ranks, start
from beitctl.engine.loop import train
from beitctl.engine.saving.checkpoint import Checkpoints
from beitctl.engine.session import Session
from beitctl.errors import Stopped

LARGE = 1000
"""Numbers of a parameter that counts as large."""
LEARN = OptimConfig(peak_lr=1e-3, clip_norm=1.0)


def wide(name: str) -> ModelConfig:
    """The model of that name with heads that all attention kernels read."""
    return dataclasses.replace(MODELS[name], layers=3, width=128, ffn=256)


def ranks_on(device: torch.device) -> Ranks:
    """This process alone, on a device."""
    return dataclasses.replace(start(), device=device)


def compared(
    device: torch.device, model: ModelConfig, one: TrainConfig, other: TrainConfig, folder: Path
) -> tuple[float, dict[str, float]]:
    """Largest relative difference of a loss, and relative errors of the gradients of large parameters.

    Both settings take the same step; the second is what the first is measured against.
    """
    ranks = ranks_on(device)
    (micro,) = varied([0], model, rows_multiple(one, device))
    found, right = (
        gradients(learner(model, ranks, config), micro, config, ranks, folder) for config in (one, other)
    )
    losses = max(abs(found[2][term] / value - 1) for term, value in right[2].items())
    large = {name for name, value in right[0].items() if value.numel() >= LARGE}
    return losses, {name: error(found[0][name], right[0][name]) for name in large}


def graphs_by_step(device: torch.device, model: ModelConfig, config: TrainConfig, folder: Path) -> list[int]:
    """Graphs that are compiled after each of 20 steps whose texts differ in length."""
    ranks, counts = ranks_on(device), []
    module = learner(model, ranks, config)
    made = loop(module, config, ranks, folder)
    for micro in varied(range(20), model, rows_multiple(config, device)):
        made.step(micro, made.counts(micro))
        counts.append(compiled_graphs())
    return counts


class Steps:
    """The batches of every step, and something that happens when one is asked for."""

    def __init__(self, model: ModelConfig, happens: Mapping[int, Callable[[], Any]] | None = None) -> None:
        self.model, self.happens = model, happens or {}

    def __getitem__(self, step: int) -> list[Batch]:
        self.happens.get(step, lambda: None)()
        (micro,) = varied([step], self.model)
        return micro


def state(module: Any, optimizer: Any) -> dict[str, Tensor]:
    """A copy on the CPU of everything that a checkpoint holds."""
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().clone()
        for name, value in optim.weights_and_state(module, optimizer).items()
    }


def trained(device: torch.device, model: ModelConfig, folder: Path, stop: int | None) -> dict[str, Tensor]:
    """Weights after eight steps of the loop; with ``stop`` it is stopped there and called again."""
    ranks = ranks_on(device)
    config = settings(8, precision="bf16", optim=LEARN)
    happens = {} if stop is None else {stop: lambda: signal.raise_signal(signal.SIGTERM)}
    for data in (Steps(model, happens), Steps(model)):
        module = learner(model, ranks, config)
        with contextlib.suppress(Stopped):
            for _ in train(module, data, config, Session(ranks, folder)):
                pass
            break
    return {name: value.detach().cpu() for name, value in whole(module).items()}


def whole(module: Any) -> dict[str, Tensor]:
    """Whole weights."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in module.state_dict().items()
    }


def saved_while_training(
    device: torch.device, model: ModelConfig, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The state when a background save began, what the checkpoint holds, and the state after more steps."""
    ranks, config = ranks_on(device), settings(50, precision="bf16", optim=LEARN)
    module = learner(model, ranks, config)
    made = loop(module, config, ranks, folder)
    optim.set_lr(made.optimizer, 1e-3)
    steps = varied(range(6), model)
    made.step(steps[0], made.counts(steps[0]))
    kept = Checkpoints(folder / "checkpoints", ranks, 3, print)
    tensors = optim.weights_and_state(module, made.optimizer)
    before = state(module, made.optimizer)
    kept.begin(1, tensors, {}, lambda step, path, seconds: None)
    for micro in steps[1:]:
        made.step(micro, made.counts(micro))
    kept.settle(wait=True)
    after = state(module, made.optimizer)
    found = kept.newest()
    assert found is not None
    kept.load(found, optim.weights_and_state(module, made.optimizer))
    return before, state(module, made.optimizer), after


def poisoned(
    device: torch.device, model: ModelConfig, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], float]:
    """The state before a step whose loss is infinite, after it, after a good one; and the bad norm."""
    ranks, config = ranks_on(device), settings(50, precision="bf16", optim=LEARN)
    module = learner(model, ranks, config)
    made = loop(module, config, ranks, folder)
    optim.set_lr(made.optimizer, 1e-3)
    first, second, third = varied(range(3), model)
    made.step(first, made.counts(first))
    before, weights = state(module, made.optimizer), made.weights
    made.weights = (float("inf"), *weights[1:])
    _, norm = made.step(second, made.counts(second))
    skipped, made.weights = state(module, made.optimizer), weights
    made.step(third, made.counts(third))
    return before, skipped, state(module, made.optimizer), float(norm)


def unlogged_step(
    device: torch.device,
    model: ModelConfig,
    config: TrainConfig,
    folder: Path,
    watched: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    """Two steps to warm up, then one inside ``watched``, from pinned memory as the loader gives it."""
    ranks = ranks_on(device)
    made = loop(learner(model, ranks, config), config, ranks, folder)
    for number, micro in enumerate(varied(range(3), model, rows_multiple(config, device))):
        ready = pinned(micro, device)
        counts = made.counts(ready)
        with watched() if number == 2 else contextlib.nullcontext():
            _, norm = made.step(ready, counts)
            made.guard.note(norm)
    assert torch.isfinite(norm)


def pinned(micro: Sequence[Batch], device: torch.device) -> list[Batch]:
    """Batches in memory from which copies to a GPU need not wait."""
    return [one.pin_memory() if device.type == "cuda" else one for one in micro]


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states are the same to the bit."""
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())
