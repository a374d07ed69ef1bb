"""What is known of GPUs; one that is not here has no figures, rather than those of another."""

from dataclasses import dataclass
from enum import StrEnum

GIB = 2**30


class Gpu(StrEnum):
    """GPUs with known figures."""

    h200 = "h200"
    h100 = "h100"
    a100 = "a100"
    l40s = "l40s"


@dataclass(frozen=True)
class Card:
    """One GPU."""

    title: str
    tflops: float
    """Nominal dense bf16 TFLOP/s, without sparsity."""
    gib: float
    """Memory in GiB, as the driver reports it."""
    bandwidth: float
    """Memory bandwidth in TB/s."""
    device_names: tuple[str, ...]
    """What CUDA calls it; other variants (PCIe, NVL, 40 GB) have other figures."""


CARDS = {
    # nvidia.com/en-us/data-center/h200, SXM column: 1,979 TFLOP/s bf16 with sparsity, half of it dense;
    # 141 GB, of which nvidia-smi shows 143,771 MiB; 4.8 TB/s
    Gpu.h200: Card("NVIDIA H200 SXM", 989.0, 140.4, 4.8, ("NVIDIA H200",)),
    # nvidia.com/en-us/data-center/h100, SXM column: 1,979 with sparsity; 80 GB (81,559 MiB); 3.35 TB/s
    Gpu.h100: Card("NVIDIA H100 SXM", 989.0, 79.6, 3.35, ("NVIDIA H100 80GB HBM3",)),
    # nvidia.com/en-us/data-center/a100, 80GB SXM column: 312 dense; 80 GB (81,920 MiB); 2,039 GB/s
    Gpu.a100: Card("NVIDIA A100 SXM 80 GB", 312.0, 80.0, 2.04, ("NVIDIA A100-SXM4-80GB",)),
    # nvidia.com/en-us/data-center/l40s: 733 with sparsity, 362 dense; 48 GB (46,068 MiB with ECC); 864 GB/s
    Gpu.l40s: Card("NVIDIA L40S", 362.0, 45.0, 0.864, ("NVIDIA L40S",)),
}


def named(device_name: str) -> Gpu | None:
    """The GPU that CUDA gives a name to, if its figures are known."""
    return next((gpu for gpu, card in CARDS.items() if device_name in card.device_names), None)
