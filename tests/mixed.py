"""A small BEiT-3 and steps of pictures, texts and pairs of many lengths, from torch and numpy alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from beitctl.config import ModelConfig, OptimConfig, TrainConfig
from beitctl.data.batch import Batch, Portion, collate
from beitctl.engine.compiling import preparation
from beitctl.engine.dist import Ranks
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.loop import _Loop
from beitctl.engine.losses import masked_cross_entropy
from beitctl.engine.session import Session
from beitctl.engine.shard import sharded
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway

CODES = 24
PAPER = ModelConfig(
    layers=2, width=32, heads=2, ffn=64, image_px=16, patch_px=4, vocabulary=40, text_tokens=20,
    fusion_layers=1,
)  # fmt: skip
"""Shared attention, vision-language experts in the top block."""
DECOUPLED = replace(PAPER, attention="decoupled", fusion_layers=0)
"""Projections of both modalities apart, as in the released weights."""
MODELS = {"paper": PAPER, "decoupled": DECOUPLED}


@dataclass(frozen=True)
class Masked:
    """The tasks of masked data modelling without their data preparation."""

    layout: str

    def terms(self) -> dict[str, Any]:
        units = {"image": {"": "patch"}, "text": {"": "text"}, "pair": {"": "text", "image": "patch"}}
        return {short: SimpleNamespace(unit=unit, weight=1.0) for short, unit in units[self.layout].items()}

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        sizes = {"patch": ("image_codes", CODES), "text": ("text_tokens", config.vocabulary)}
        found = [sizes[term.unit] for term in self.terms().values()]
        return {name: nn.Linear(config.width, answers) for name, answers in found}

    def loss(self, encoded: Any, group: Any, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        read = {
            "patch": (group.patch_rows, group.patch_targets, "image_codes"),
            "text": (group.text_rows, group.text_targets, "text_tokens"),
        }
        found = {}
        for short, term in self.terms().items():
            rows, targets, head = read[term.unit]
            found[short] = masked_cross_entropy(encoded.rows[rows], targets, heads[head])
        return found


WEIGHTS = {"image": 1.0, "text": 2.0, "pair": 0.5}
OBJECTIVES = [Objective(name, Masked(name), weight) for name, weight in WEIGHTS.items()]  # type: ignore[arg-type]


def item(layout: str, number: int, config: ModelConfig) -> Any:
    """The item of that number of an objective: the same whoever asks for it."""
    draw = np.random.default_rng([number, len(layout)])
    pixels = draw.integers(0, 256, (3, *config.size), dtype=np.uint8)
    mask = draw.permutation(config.patches) < config.patches // 2
    length = int(draw.integers(2, config.text_tokens + 1))
    ids = draw.integers(4, config.vocabulary, length)
    hidden = draw.permutation(length) < 1 + length // 3
    pictured, written = layout != "text", layout != "image"
    return SimpleNamespace(
        image=pixels if pictured else None,
        image_mask=mask if pictured else None,
        patch_targets=np.where(mask, draw.integers(0, CODES, config.patches), -1) if pictured else None,
        text=np.where(hidden, 3, ids) if written else None,
        text_targets=np.where(hidden, ids, -1) if written else None,
        label=-1,
        chance=(),
        code_view=None,
        extra={},
    )


def batch(numbers: Mapping[str, Sequence[int]], config: ModelConfig, multiple: int = 1) -> Batch:
    """The items of these numbers, by objective."""
    portions = [
        Portion(name, name, [item(name, number, config) for number in numbers[name]]) for name in WEIGHTS
    ]
    return collate(portions, config, multiple)


def settings(steps: int = 1, **changes: Any) -> TrainConfig:
    """Settings of the loop: plain blocks, nothing saved or logged on the way."""
    usual = {
        "optim": OptimConfig(peak_lr=1e-3),
        "compile": "off",
        "log_every_steps": 1000,
        "async_save": False,
    }
    return TrainConfig(steps=steps, **usual | changes)  # type: ignore[arg-type]


def build(model: ModelConfig) -> MultiwayLearner:
    """The learner without values."""
    return MultiwayLearner(Multiway(model), OBJECTIVES, dict.fromkeys(WEIGHTS, model))  # type: ignore[arg-type]


def learner(model: ModelConfig, ranks: Ranks, config: TrainConfig) -> Any:
    """The learner with its initial values, sharded over the ranks."""

    def refuse(code: str, text: str, fix: str) -> None:
        raise AssertionError(text)

    return sharded(
        lambda: build(model),
        ranks,
        config.precision,
        lambda name, shape: initial(name, shape, model, 0),
        prepare=preparation(config, ranks, refuse),
        shard_ranks=config.shard_ranks,
    )


class Gradients:
    """Stands for an optimizer: keeps the gradients of a step, whole and in fp64, and moves nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.found = module, dict[str, torch.Tensor]()

    def step(self) -> None:
        for name, parameter in self.module.named_parameters():
            grad = parameter.grad
            assert grad is not None, name
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            self.found[name] = whole.detach().double().cpu().clone()

    def zero_grad(self, set_to_none: bool) -> None:
        self.module.zero_grad(set_to_none)


def loop(module: Any, config: TrainConfig, ranks: Ranks, folder: Path, data: Any = ()) -> _Loop:
    """The training loop around a learner, for single steps of it."""
    return _Loop(module, data, config, Session(ranks, folder))


def gradients(
    module: Any, micro: Sequence[Batch], config: TrainConfig, ranks: Ranks, folder: Path
) -> tuple[dict[str, torch.Tensor], float, dict[str, float]]:
    """Whole gradients, their norm and the losses of a step over all ranks, as the loop computes them."""
    made = loop(module, config, ranks, folder)
    keeper = Gradients(module)
    made.optimizer = keeper  # type: ignore[assignment]
    counts = ranks.sum(made.counts(micro))
    sums, norm = made.step(micro, counts)
    losses = ranks.sum(sums[:, 0].tolist())
    means = {t: loss / max(1.0, n) for t, loss, n in zip(made.terms, losses, counts, strict=True)}
    return keeper.found, float(norm), means


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def worst(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Largest relative Frobenius error of a parameter."""
    assert list(found) == list(expected)
    return max(error(found[name], expected[name]) for name in expected)


def whole(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Relative Frobenius error of all parameters together."""
    return error(*(torch.cat([values[name].flatten() for name in expected]) for values in (found, expected)))


def varied(steps: Iterable[int], model: ModelConfig, multiple: int = 1) -> list[list[Batch]]:
    """One batch of two pictures, three texts and three pairs a step; texts differ in length."""
    return [
        [
            batch(
                {
                    "image": range(2 * step, 2 * step + 2),
                    "text": range(3 * step, 3 * step + 3),
                    "pair": range(3 * step, 3 * step + 3),
                },
                model,
                multiple,
            )
        ]
        for step in steps
    ]
