"""Both sides of ``benchmarks.step``: an official model and ours, with the same weights and the same batch."""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beitctl.config import ModelConfig
from beitctl.data.batch import Batch
from beitctl.engine import dist
from beitctl.engine.compiling import rows_multiple
from benchmarks import mixed

Initial = Callable[[str, torch.Size], Tensor]


@dataclass(frozen=True)
class Side:
    """One of the two: a module, and its loss on the batch."""

    name: str
    module: Any
    loss: Callable[[], Tensor]
    after: Callable[[], object] = lambda: None
    """What the backward pass leaves to be done until gradients are in fp32."""

    def step(self) -> Tensor:
        """Forward and backward; gradients must be cleared before."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.after()
        return loss.detach()

    def clear(self) -> None:
        """Drop the gradients."""
        self.module.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Match:
    """What is compared: settings, batch, weights, and how our tensors lie in the official ones."""

    config: ModelConfig
    mix: mixed.Mix
    batch: Batch
    """Without fillers."""
    codes: int
    initial: Initial
    official: Callable[[], nn.Module]
    """The official module with our weights, fp32 on the CPU."""
    inputs: Callable[[Batch], list[Any]]
    """A batch as the arguments of the official forward passes."""
    renamed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """Our gradients under the official names."""

    @property
    def layouts(self) -> tuple[str, ...]:
        """Objectives of our learner."""
        return ("image", "text", "pair") if self.config.vocabulary else ("image",)


def beit3(size: str, mix: mixed.Mix, vocabulary: int, codes: int) -> Match:
    """Torchscale's BEiT-3, decoupled: it has no other form."""
    official: Any = importlib.import_module("benchmarks.official")  # torchscale is not needed elsewhere
    config = mixed.model_of(size, vocabulary=vocabulary)
    initial = mixed.starts(config)

    def made() -> nn.Module:
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in mixed.learner_of(config, codes=codes).named_parameters()}
        module: nn.Module = official.built(
            config, {name: initial(name, s) for name, s in shapes.items()}, codes
        )
        return module

    return Match(
        config, mix, mixed.batch_of(mix, config, codes=codes), codes, initial, made,
        lambda batch: official.passes_of(batch, config), functools.partial(official.theirs_of, config),
    )  # fmt: skip


def beit1(kind: str, size: str, mix: mixed.Mix, codes: int) -> Match:
    """BEiT-1 of transformers or timm."""
    official: Any = importlib.import_module("benchmarks.official_beit")  # needs transformers and timm
    torch.manual_seed(0)
    module = official.KINDS[kind](mixed.SIZES[size], codes)
    config, tensors = official.ours_of(module)
    return Match(
        config, mix, mixed.batch_of(mix, config, codes=codes), codes, lambda name, shape: tensors[name],
        lambda: module.train(), lambda batch: [official.given_of(batch, config)],
        functools.partial(official.theirs_of, module, config),
    )  # fmt: skip


def ours(match: Match, dtype: str, device: torch.device, compile: str = "auto") -> Side:
    """Our learner as the stage pretrain has it: sharded over the one rank, packed, all objectives at once."""
    build = functools.partial(mixed.learner_of, match.config, match.layouts, match.codes)
    settings = mixed.settings(precision=dtype, compile=compile)
    learner = mixed.prepared(build, dist.start(), settings, match.initial)
    learner.train()
    multiple = rows_multiple(settings, device)
    batch = mixed.batch_of(match.mix, match.config, codes=match.codes, multiple=multiple).to(device)
    return Side("ours", learner, lambda: mixed.loss_of(learner, batch))


def theirs(match: Match, dtype: str, device: torch.device, form: str = "autocast") -> Side:
    """The official module; in bf16 by autocast, or (``form = "cast"``) with a copy of the weights in bf16.

    Either way weights and gradients are in fp32 before and after, as on our side.
    """
    module = match.official().to(device)
    half = dtype == "bf16" and form == "cast"
    masters = [parameter.detach().clone() for parameter in module.parameters()] if half else []
    if half:
        module = module.to(torch.bfloat16)
    copies = list(module.parameters())
    passes = [mixed.moved(given, device, half) for given in match.inputs(match.batch)]

    def loss() -> Tensor:
        if half:
            torch._foreach_copy_([copy.detach() for copy in copies], masters)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16" and not half):
            return torch.stack([module(given) for given in passes]).sum()

    def after() -> list[Tensor]:
        return [copy.grad.float() for copy in copies if half and copy.grad is not None]

    return Side(form if dtype == "bf16" else "fp32", module, loss, after)


def differences(match: Match, side: Side, other: Side) -> tuple[float, float]:
    """Relative difference of the losses, and of the gradients of the parameter where it is largest.

    Frobenius norm of a parameter's difference over that of its official gradient, or over a millionth of the
    norm of all gradients where it is smaller: keys' biases have a gradient of zero but for rounding.
    """
    losses = []
    for each in (side, other):
        each.clear()
        losses.append(float(each.step()))
    mine = {name: _whole(p.grad) for name, p in side.module.named_parameters()}
    renamed = match.renamed({name: grad for name, grad in mine.items() if grad is not None})
    right = {name: _whole(p.grad) for name, p in other.module.named_parameters()}
    total = sum(float(grad.square().sum()) for grad in right.values() if grad is not None) ** 0.5
    worst = 0.0
    for name, grad in right.items():
        found = renamed[name].to(torch.float64)
        wanted = torch.zeros_like(found) if grad is None else grad.to(torch.float64)
        worst = max(worst, float((found - wanted).norm()) / max(float(wanted.norm()), 1e-6 * total))
    for each in (side, other):
        each.clear()
    return abs(losses[0] - losses[1]) / abs(losses[1]), worst


def _whole(grad: Any) -> Tensor | None:
    """A gradient on the CPU, in one piece."""
    if grad is None:
        return None
    whole: Tensor = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return whole.detach().cpu()
