"""Whether all ranks see the same numbers where there should be one: they do not once their weights differ."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from beitctl.engine.shard import whole
from beitctl.errors import DivergedError

TOLERANCE = 1e-6
"""Largest relative difference between ranks."""
NAMED = 8
"""Most ranks that the error names."""


def weight_norm(module: nn.Module) -> Tensor | None:
    """Norm of all parameters as this rank holds them, 0-d; None where no two ranks hold the same ones.

    The gradient is summed over the replicas of HSDP, so that it agrees though their weights do not.
    """
    parameters = [parameter.detach() for parameter in module.parameters()]
    if not any(_replicated(parameter) for parameter in parameters):
        return None
    return whole(torch.nn.utils.get_total_norm(parameters))


def _replicated(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return True
    mesh = parameter.device_mesh
    return any(
        placement.is_replicate() and mesh.size(axis) > 1
        for axis, placement in enumerate(parameter.placements)
    )


def check_same(step: int, seen: Sequence[Mapping[str, float]]) -> None:
    """Compare numbers by name, as every rank saw them at a step, in rank order.

    Raises:
        DivergedError: a rank saw another number than most; names the ranks.
    """
    for name in seen[0]:
        values = [float(one[name]) for one in seen]
        usual = max(values, key=lambda value: sum(_same(value, other) for other in values))
        odd = [rank for rank, value in enumerate(values) if not _same(value, usual)]
        if not odd:
            continue
        if 2 * len(odd) >= len(values):
            odd = list(range(len(values)))
        shown = ", ".join(f"rank {rank}: {values[rank]:.9g}" for rank in odd[:NAMED])
        more = f" and {len(odd) - NAMED} more ranks" if len(odd) > NAMED else ""
        most = f"; the others: {usual:.9g}" if len(odd) < len(values) else ""
        raise DivergedError(
            f"step {step}: the {name} should be one number, but it differs between ranks ({shown}{more}"
            f"{most}): their weights no longer agree. Run the same command again to go on from the last "
            "checkpoint; if it is always the same rank, look for a broken GPU or memory module in its machine"
        )


def _same(one: float, other: float) -> bool:
    if math.isfinite(one) and math.isfinite(other):
        return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))
    return math.isfinite(one) == math.isfinite(other)
