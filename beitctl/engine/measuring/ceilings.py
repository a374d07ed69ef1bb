"""What a device reaches in matrix products and copies alone: measured once, remembered for this device.

The most that a training could reach, and what its share of it is counted against.
"""

import contextlib
import hashlib
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from beitctl.engine.shard import compute_dtype
from beitctl.replacing import replace_file

SHAPES = tuple((rows, 1408, out) for rows in (32_896, 9_728) for out in (4224, 1408, 6144))
"""(M, K, N) of the products of the giant's blocks: 128 pictures of 257 tokens, 76 texts of 128."""
CPU_SHAPES = tuple((514, 1408, out) for out in (1408, 4224))
"""The same in small: a processor takes seconds for one of those."""
COPY_BYTES, CPU_COPY_BYTES = 2**30, 2**26
ROUNDS = 20
"""Repetitions of which the median counts."""
CPU_SECONDS = 0.4
"""After so long a processor makes no further repetition."""
GEMM, COPY, WHEN = "gemm_tflops", "copy_gb_per_s", "measured"
"""Keys of what is remembered: TFLOP/s of one device, GB/s read and written, day."""

Figures = dict[str, float | str]


def measure(device: torch.device) -> Figures:
    """Measure a device: a second or two.

    Returns:
        ``gemm_tflops``: the best shape's TFLOP/s, median of its repetitions, in the type that ``precision =
        "auto"`` computes in; ``copy_gb_per_s``: GB/s read and written by copies; ``dtype``; ``measured``:
        today.
    """
    cuda = device.type == "cuda"
    dtype = compute_dtype("auto", device)
    return {
        GEMM: max(gemm(shape, dtype, device) for shape in (SHAPES if cuda else CPU_SHAPES)),
        COPY: _copy(COPY_BYTES if cuda else CPU_COPY_BYTES, device),
        "dtype": str(dtype).removeprefix("torch."),
        WHEN: time.strftime("%Y-%m-%d"),
    }


def gemm(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a product (M, K) x (K, N)."""
    m, k, n = shape
    left = torch.randn(m, k, device=device, dtype=dtype)
    right = torch.randn(k, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / _seconds(lambda: torch.mm(left, right, out=out), device) / 1e12


def _copy(size: int, device: torch.device) -> float:
    """GB/s of copies of so many bytes, reading and writing counted."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device) / 1e9


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of a repetition, after warming up."""
    cuda, found = device.type == "cuda", list[float]()
    for _ in range(3 if cuda else 1):
        work()
    begun = time.perf_counter()
    while len(found) < ROUNDS and (cuda or not found or time.perf_counter() - begun < CPU_SECONDS):
        found.append(_cuda_seconds(work) if cuda else _cpu_seconds(work))
    return statistics.median(found)


def _cpu_seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _cuda_seconds(work: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def remembered(device: torch.device, folder: Path | None = None) -> float | None:
    """TFLOP/s in matrix products that were measured on a device of this kind; None if they never were."""
    found = recalled(device, folder).get(GEMM)
    return found if isinstance(found, float) and found > 0 else None


def recalled(device: torch.device, folder: Path | None = None) -> Figures:
    """Everything that is remembered of a device of this kind with this torch and driver; empty if nothing is.

    Args:
        device: the device.
        folder: of what can be computed again; by default that of the data (``BEITCTL_CACHE``).
    """
    file = _file(device, folder)
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): value for key, value in found.items() if isinstance(value, float | str)}


def remember(device: torch.device, figures: Mapping[str, float | str], folder: Path | None = None) -> bool:
    """Remember figures of a device besides those that are known; returns whether they could be written."""
    file = _file(device, folder)
    if file is None:
        return False
    known = recalled(device, folder) | dict(figures) | {"device": " | ".join(identity(device))}
    try:
        replace_file(file, (json.dumps(known) + "\n").encode())
    except OSError:
        return False
    return True


def identity(device: torch.device) -> tuple[str, str, str]:
    """What figures hold for: name of the device (a processor's with its threads), torch, driver."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), torch.__version__, driver()
    return f"{_processor()}, {torch.get_num_threads()} threads", torch.__version__, platform.release()


def driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of the NVIDIA driver; empty where it cannot be known."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", file.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found[0] if found else ""


def _processor() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if found := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def _file(device: torch.device, folder: Path | None) -> Path | None:
    """Where figures of a device are; None where there is no cache folder."""
    if folder is None:
        try:
            from beitctl.data.arrays import cache_folder  # noqa: PLC0415 - needs more than torch and numpy
        except ImportError:
            return None
        folder = cache_folder()
    key = hashlib.sha256(json.dumps(identity(device)).encode()).hexdigest()[:16]
    return folder / "ceilings" / f"{key}.json"
