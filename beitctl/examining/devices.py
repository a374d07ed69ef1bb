"""The GPUs: what they are, whether anybody else uses them, and what they talk and compile with."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator

import torch

from beitctl.engine.measuring.gpus import GIB
from beitctl.engine.measuring.meter import nominal
from beitctl.examining.finding import Finding

FREE_SHARE = 0.9
"""Of a GPU's memory; with less of it free somebody else uses the GPU."""
SECONDS = 5
"""How long nvidia-smi may take."""


def count() -> int:
    """Number of GPUs."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpus() -> Iterator[Finding]:
    """One finding for each GPU, and what they talk with."""
    if not count():
        yield Finding(
            "GPUs", "note", "none: everything runs on the CPU, slowly", "tiny and demo are made for it"
        )
        return
    for index in range(count()):
        yield _gpu(index)
    yield _nccl()


def _gpu(index: int) -> Finding:
    device = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    bf16 = "bf16" if device.major >= 8 else "no bf16"
    peak = nominal(device.name)
    known = f"{peak:g} TFLOP/s nominal" if peak else "nominal peak not known: runs report no mfu"
    value = (
        f"{device.name}, {total / GIB:.0f} GiB, {bf16}, {known}, {free / GIB:.0f} GiB free{_others(index)}"
    )
    if free < FREE_SHARE * total:
        return Finding(f"GPU {index}", "note", value, "end what else runs there, see nvidia-smi")
    return Finding(f"GPU {index}", "ok", value)


def _others(index: int) -> str:
    """Processes that compute on a GPU, where nvidia-smi tells; this one aside."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", "")
    command = [program, f"--id=GPU-{uuid}", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    pids = [line.strip() for line in done.stdout.splitlines() if line.strip().isdigit()]
    others = [pid for pid in pids if pid != str(os.getpid())] if done.returncode == 0 else []
    return f", used by process{'es' if len(others) > 1 else ''} {', '.join(others)}" if others else ""


def _nccl() -> Finding:
    if not torch.distributed.is_nccl_available():
        return Finding(
            "NCCL", "note", "not in this torch: one GPU at a time", "install torch from pytorch.org for CUDA"
        )
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return Finding("NCCL", "ok", ".".join(map(str, version)))


def compiler() -> Finding:
    """Whether torch.compile finds what it needs, without using it."""
    if count() and importlib.util.find_spec("triton") is None:
        return Finding(
            "compiler", "note", "Triton is not installed, and blocks are compiled on GPUs",
            'pip install triton, or set train.compile = "off"',
        )  # fmt: skip
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        return Finding(
            "compiler", "note", f"no {name}, which torch.compile needs",
            'install it (apt install g++), or leave train.compile as "auto" on a CPU and "off" on a GPU',
        )  # fmt: skip
    return Finding("compiler", "ok", found)
