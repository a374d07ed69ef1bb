"""What is trained: the model with the heads of its objectives, one forward pass for all of them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from beitctl.config import ModelConfig
from beitctl.engine.losses import Sums
from beitctl.engine.measuring import operations
from beitctl.model.flops import of_pass
from beitctl.model.multiway import Encoded, Multiway, Packed

if TYPE_CHECKING:
    from beitctl.api import Task, Tools
    from beitctl.data.batch import Batch

PIXELS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Channel means and deviations by their name in ``ModelConfig.pixels``."""
HALF = PIXELS["half"]


@dataclass(frozen=True)
class Objective:
    """A task under the name that it has in the recipe."""

    name: str
    task: "Task"
    weight: float = 1.0

    def term(self, short: str) -> str:
        """Full name of one of the task's terms: ``pair``, ``pair.image``."""
        return f"{self.name}.{short}" if short else self.name


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(c, 1, 1) one number a channel; copied to a device once, for a copy waits for its work."""
    return torch.tensor(values, device=device)[:, None, None]


def normalise(pixels: Tensor, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """(n, 3, H, W) uint8 to fp32 with the given channel means and deviations."""
    mean, std = (_channels(values, pixels.device) * 255 for values in mean_std)
    return (pixels.float() - mean) / std


def raw(pixels: Tensor, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """(n, 3, H, W) normalised pixels back to 0..1."""
    mean, std = (_channels(values, pixels.device) for values in mean_std)
    return pixels * std + mean


def depths_of(task: "Task", config: ModelConfig) -> Sequence[int]:
    """Numbers of blocks after which a task reads the rows, besides the last."""
    depths = getattr(task, "depths", None)
    return tuple(depths(config)) if callable(depths) else ()


class MultiwayLearner(nn.Module):
    """A Multiway Transformer with the heads of its objectives."""

    entry_points: ClassVar = ("outputs",)
    """Methods besides ``forward`` that FSDP gathers the weights for."""

    def __init__(
        self, model: Multiway, objectives: Sequence[Objective], tools: "Mapping[str, Tools]"
    ) -> None:
        super().__init__()
        self.model = model
        self.objectives = tuple(objectives)
        heads: dict[str, nn.Module] = {}
        self._heads_of: dict[str, tuple[str, ...]] = {}
        for objective in self.objectives:
            own = objective.task.heads(tools[objective.name])
            self._heads_of[objective.name] = tuple(own)
            for name, head in own.items():
                heads.setdefault(name, head)
        self.heads = nn.ModuleDict(heads)
        self._coder: list[Callable[[Tensor], Tensor]] = []
        self.weights = {
            objective.term(short): objective.weight * term.weight
            for objective in self.objectives
            for short, term in objective.task.terms().items()
        }

    def code_with(self, coder: Callable[[Tensor], Tensor]) -> None:
        """Give the frozen image tokenizer that computes codes in the step: views (v, 3, h, h) to (v, N).

        It stays whole on every rank, and out of the weights, the optimizer and the checkpoints.
        """
        self._coder = [coder]  # a list hides it from FSDP and from the checkpoint

    @torch.no_grad()
    def coded(self, batch: "Batch") -> "Batch":
        """The batch with the codes of its hidden patches as targets; the same if it has them already.

        Raises:
            ValueError: there is no tokenizer, or it gives another number of codes than there are patches.
        """
        if batch.code_views is None:
            return batch
        if not self._coder:
            raise ValueError("this batch needs codes, but the learner has no image tokenizer")
        codes, patches = self._coder[0](batch.code_views), self.model.config.patches
        if codes.shape != (len(batch.code_views), patches):
            raise ValueError(f"codes of shape {tuple(codes.shape)} for pictures of {patches} patches")
        groups = {
            name: replace(
                group, patch_targets=codes.flatten().to(group.code_places.device)[group.code_places]
            )
            if len(group.code_places)
            else group
            for name, group in batch.groups.items()
        }
        return replace(batch, groups=groups, code_views=None)

    def encode(self, batch: "Batch") -> Encoded:
        """The encoded batch, with the rows of every depth that a task reads."""
        depths = {depth for o in self.objectives for depth in depths_of(o.task, self.model.config)}
        pixels = normalise(batch.pixels, PIXELS[self.model.config.pixels])
        return self.model.encoded(
            Packed(
                layout=self.model.layout(batch.plan),
                pixels=self._augmented(pixels, batch) if self.training else pixels,
                image_mask=batch.image_mask,
                ids=batch.ids,
                keep=batch.keep if self.training else None,
                picture_types=batch.picture_types,
            ),
            sorted(depths),
        )

    def _augmented(self, pixels: Tensor, batch: "Batch") -> Tensor:
        """Normalised pictures (n, 3, H, W) as tasks change them for training."""
        for objective in self.objectives:
            change, group = getattr(objective.task, "augmented", None), batch.groups[objective.name]
            if callable(change) and len(group.picture_rows):
                mine = group.picture_rows[:, 0] // batch.plan.picture_tokens
                pixels = pixels.index_copy(0, mine, change(pixels[mine], group))
        return pixels

    def forward(self, batch: "Batch") -> Sums:
        """Sums of the losses of every term of every objective."""
        batch = self.coded(batch)
        encoded, heads = self.encode(batch), dict(self.heads.items())
        sums: Sums = {}
        for objective in self.objectives:
            found = objective.task.loss(encoded, batch.groups[objective.name], heads)
            sums |= {objective.term(short): pair for short, pair in found.items()}
        return sums

    def outputs(self, batch: "Batch") -> dict[str, Any]:
        """What every task says of its part of a batch, by objective."""
        encoded, heads = self.encode(batch), dict(self.heads.items())
        return {o.name: o.task.output(encoded, batch.groups[o.name], heads) for o in self.objectives}

    def counts(self, batch: "Batch") -> dict[str, float]:
        """Predictions of every term in a batch."""
        return {
            objective.term(short): float(batch.groups[objective.name].counts[term.unit])
            for objective in self.objectives
            for short, term in objective.task.terms().items()
        }

    def flops(self, batch: "Batch") -> float:
        """Useful operations of a forward and a backward pass over a batch, counted from its plan.

        Padding and what is computed twice are left out, and so are frozen teachers and image tokenizers;
        parameters that are frozen count as if they were trained.
        """
        config = self.model.config
        total = of_pass(config, batch.plan)
        for objective in self.objectives:
            heads = {name: self.heads[name] for name in self._heads_of[objective.name]}
            group = batch.groups[objective.name]
            total += operations.of_task(objective.task, config, batch.plan, group, heads)
        return float(total.training)
