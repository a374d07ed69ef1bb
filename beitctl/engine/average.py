"""The exponential moving average of the weights, sharded as they are."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from beitctl.engine.shard import local


class Average:
    """An average of the trained parameters of a module, which begins with their values.

    Its decay is min(decay, (1 + t) / (10 + t)) after t updates, so that it soon forgets the initial weights.

    Every rank averages its own shards, so it costs 4 bytes a parameter over the ranks of a copy and no
    communication.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """No average with ``decay`` 0."""
        self.decay = decay
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad and decay}
        self.weights: dict[str, Tensor] = {name: p.detach() for name, p in trained.items()}
        self.averages = {name: weight.clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights; after every step, by its number from 1."""
        if self.averages:
            decay = min(self.decay, step / (9 + step))  # step - 1 updates so far
            torch._foreach_lerp_(_local(self.averages), _local(self.weights), 1 - decay)

    @torch.no_grad()
    def give(self) -> None:
        """Put the average in the place of the weights; after the last step."""
        if self.averages:
            torch._foreach_copy_(_local(self.weights), _local(self.averages))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {f"average.{name}": tensor for name, tensor in self.averages.items()}


def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors.values()]
