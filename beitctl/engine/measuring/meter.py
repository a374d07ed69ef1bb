"""How fast a run computes, against what the GPU is sold for and against what it was measured to reach."""

import torch

from beitctl.engine.measuring.gpus import CARDS, GIB, named

TERA = 1e12


class Meter:
    """Figures of a step from its operations and its seconds; nothing waits for the device.

    Args:
        device: where this rank computes.
        world: number of ranks, one GPU each.
        ceiling: TFLOP/s that one GPU reached in matrix products alone (``ceilings``); None if it was
            never measured.
    """

    def __init__(self, device: torch.device, world: int, ceiling: float | None = None) -> None:
        self.device, self.world = device, world
        cuda = device.type == "cuda"
        self.peak = nominal(torch.cuda.get_device_name(device)) if cuda else None
        self.ceiling = ceiling if cuda else None

    def figures(self, flops: float, seconds: float) -> dict[str, float]:
        """Figures of one step.

        ``tflops_per_gpu`` counts useful operations, of one rank on a CPU as well. ``mfu`` is its share of the
        nominal dense bf16 peak and is left out for a GPU whose peak is not known; ``mfu_of_measured`` is its
        share of the ceiling. ``memory_gib`` is the most that tensors took on this rank's GPU so far.

        Args:
            flops: operations of the step over all ranks, forward and backward.
            seconds: wall-clock time of the step, above 0.
        """
        reached = flops / seconds / self.world / TERA
        found = {"tflops_per_gpu": reached}
        if self.peak:
            found["mfu"] = reached / self.peak
        if self.ceiling:
            found["mfu_of_measured"] = reached / self.ceiling
        if self.device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        return found


def nominal(device_name: str) -> float | None:
    """Nominal dense bf16 TFLOP/s of the GPU that CUDA calls so; None if it is not known."""
    gpu = named(device_name)
    return CARDS[gpu].tflops if gpu else None
