"""What is trained: the model with the heads of its objectives, one forward pass for all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from beitctl.model.attention import Layout
from beitctl.model.multiway import Multiway, Packed

if TYPE_CHECKING:
    from beitctl.api import Task, Tools
    from beitctl.data.batch import Batch

Sums = dict[str, tuple[Tensor, Tensor]]
"""Per term the sum of its losses and the number of right predictions, 0-d each."""

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Objective:
    """A task under the name that it has in the recipe."""

    name: str
    task: "Task"
    weight: float = 1.0

    def term(self, short: str) -> str:
        """Full name of one of the task's terms: ``pair``, ``pair.image``."""
        return f"{self.name}.{short}" if short else self.name


def normalise(pixels: Tensor, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """(n, 3, H, W) uint8 to fp32 with the given channel means and deviations."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] * 255 for x in mean_std)
    return (pixels.float() - mean) / std


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
        for objective in self.objectives:
            for name, head in objective.task.heads(tools[objective.name]).items():
                heads.setdefault(name, head)
        self.heads = nn.ModuleDict(heads)
        self.weights = {
            objective.term(short): objective.weight * term.weight
            for objective in self.objectives
            for short, term in objective.task.terms().items()
        }

    def encode(self, batch: "Batch") -> Tensor:
        """X [T, d], the encoded rows of a batch."""
        return self.model.encode(
            Packed(
                layout=Layout.of(batch.plan, batch.pixels.device),
                pixels=normalise(batch.pixels, HALF),
                image_mask=batch.image_mask,
                ids=batch.ids,
                keep=batch.keep if self.training else None,
            )
        )

    def forward(self, batch: "Batch") -> Sums:
        """Sums of the losses of every term of every objective."""
        rows, heads = self.encode(batch), dict(self.heads.items())
        sums: Sums = {}
        for objective in self.objectives:
            found = objective.task.loss(rows, batch.groups[objective.name], heads)
            sums |= {objective.term(short): pair for short, pair in found.items()}
        return sums

    def outputs(self, batch: "Batch") -> dict[str, Any]:
        """What every task says of its part of a batch, by objective."""
        rows, heads = self.encode(batch), dict(self.heads.items())
        return {o.name: o.task.output(rows, batch.groups[o.name], heads) for o in self.objectives}

    def counts(self, batch: "Batch") -> dict[str, float]:
        """Predictions of every term in a batch."""
        return {
            objective.term(short): float(batch.groups[objective.name].counts[term.unit])
            for objective in self.objectives
            for short, term in objective.task.terms().items()
        }
