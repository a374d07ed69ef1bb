"""The check of the environment behind ``beitctl doctor``."""

import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from beitctl import runs
from beitctl.examining.finding import Finding, guarded

PYTHON = (3, 11)
LOW_DISK_GIB = 5
GIB = 2**30
RECIPE = "recipe "
"""Before the name of a recipe in the finding of whether it fits."""
VARIABLES = {
    "BEITCTL_RUNS": "folder of all runs (default: ./runs)",
    "BEITCTL_RECIPES": "folders that are searched for recipes",
    "BEITCTL_CACHE": "folder of what can be computed again, such as indices (default: the user's cache)",
    "BEITCTL_DEBUG": "1 shows the traceback of every error",
}


def examine(measure: bool = False) -> list[Finding]:
    """Everything that is worth knowing about this machine before a run starts.

    Args:
        measure: whether to measure anew what the machine reaches, and to try the compiler; else what is
            remembered is told.
    """
    torch = list(_torch())
    usable = not any(finding.blocking for finding in torch)
    update = 'pip install --upgrade "torch>=2.11"'
    return [
        _python(),
        Finding("beitctl", "ok", metadata.version("beitctl")),
        *_requirements(),
        *torch,
        *_machine(),
        _disk(),
        *(guarded("checks", partial(_numbers, measure), update, "failed") if usable else ()),
        *_extras(),
        *_variables(),
    ]


def advice(findings: list[Finding]) -> str:
    """What to do next."""
    blocking = [finding for finding in findings if finding.blocking]
    if blocking:
        return "not ready: " + "; ".join(f"{f.name}: {f.fix or f.value}" for f in blocking)
    fitting = [f.name for f in findings if f.name.startswith(RECIPE) and f.state == "ok"]
    if fitting:
        name = fitting[-1].removeprefix(RECIPE)
        return f"ready. Next: beitctl run tiny, then beitctl plan --recipe {name}, the largest that fits"
    return "ready. Next: beitctl recipes ls, or beitctl run tiny"


def _python() -> Finding:
    fine = sys.version_info[:2] >= PYTHON
    needed = ".".join(map(str, PYTHON))
    return Finding(
        "python", "ok" if fine else "missing", platform.python_version(), f"install {needed} or newer"
    )


def _requirements() -> Iterator[Finding]:
    """Packages that beitctl needs and that are not there."""
    for requirement in metadata.requires("beitctl") or []:
        if "extra ==" not in requirement and not _installed(requirement):
            name = _name(requirement)
            yield Finding(name, "missing", "not installed", f'pip install "{requirement}"')


def _torch() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        yield Finding(
            "torch", "missing", f"cannot be imported: {error}", "pip install --force-reinstall torch"
        )
        return
    cuda = torch.version.cuda
    yield Finding("torch", "ok", torch.__version__ + (f" (CUDA {cuda})" if cuda else " (no CUDA)"))
    yield from guarded("GPUs", _devices, "run nvidia-smi; if it fails as well, mend the driver")


def _devices() -> Iterator[Finding]:
    """What computes here."""
    yield from importlib.import_module("beitctl.examining.devices").gpus()
    native = importlib.import_module("beitctl.engine.shard").cpu_has_bf16()
    yield Finding(
        "bf16 on the CPU", "ok", "native" if native else "no: precision 'auto' computes in fp32 there"
    )


def _numbers(measure: bool) -> Iterator[Finding]:
    """Whether this machine computes right, how fast, and what fits it."""
    torch = importlib.import_module("torch")
    devices, numerics, speeds = (
        importlib.import_module(f"beitctl.examining.{name}") for name in ("devices", "numerics", "speeds")
    )
    gpus: int = devices.count()
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    yield from numerics.checks(device)
    yield from guarded("compiler", lambda: [devices.compiler()], "")
    if gpus or measure:
        yield from numerics.compiled(device)
    yield from guarded("speeds", partial(speeds.speeds, device, measure), "end what else runs here")
    if gpus:
        yield from guarded("recipes", partial(_fitting, torch, gpus), "beitctl recipes check")


def _fitting(torch: Any, gpus: int) -> Iterator[Finding]:
    """Which of the large recipes fits the GPUs."""
    fitting = importlib.import_module("beitctl.examining.fitting")
    memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(gpus))
    yield from fitting.fitting(gpus, memory, shutil.disk_usage(_there(runs.root().absolute())).free)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU cores", "ok", str(cores))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("memory", "ok", f"{memory:.0f} GiB")


def _disk() -> Finding:
    folder = runs.root().absolute()
    there = _there(folder)
    free = shutil.disk_usage(there).free / GIB
    if not os.access(there, os.W_OK):
        return Finding(
            "runs", "missing", f"{folder}: cannot be written", "set BEITCTL_RUNS to a folder of yours"
        )
    low = free < LOW_DISK_GIB
    return Finding(
        "runs", "note" if low else "ok", f"{folder}, {free:.0f} GiB free", "free some space" if low else ""
    )


def _there(folder: Path) -> Path:
    """The folder, or the closest one above it that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _extras() -> Iterator[Finding]:
    """Optional groups of packages, and what of them is not there."""
    wanted: dict[str, list[str]] = {}
    for requirement in metadata.requires("beitctl") or []:
        if found := re.search(r"extra == ['\"]([\w-]+)['\"]", requirement):
            wanted.setdefault(found[1], []).append(requirement)
    for extra, requirements in wanted.items():
        absent = [_name(requirement) for requirement in requirements if not _installed(requirement)]
        if absent:
            fix = f'pip install "beitctl[{extra}]"'
            yield Finding(f"extra {extra}", "note", f"without {', '.join(absent)}", fix)
        else:
            yield Finding(f"extra {extra}", "ok", "installed")


def _variables() -> Iterator[Finding]:
    for name, meaning in VARIABLES.items():
        yield Finding(name, "ok", os.environ.get(name) or f"not set: {meaning}")
    for name in sorted(os.environ):
        if name.startswith("BEITCTL_") and name not in VARIABLES:
            known = ", ".join(VARIABLES)
            yield Finding(name, "note", "is not a variable of beitctl", f"unset it; there are {known}")


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    return found[0] if found else requirement


def _installed(requirement: str) -> bool:
    try:
        metadata.version(_name(requirement))
    except metadata.PackageNotFoundError:
        return False
    return True


def as_text(findings: list[Finding]) -> str:
    """One line per finding, and what to do next."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        fix = f"  -> {finding.fix}" if finding.fix and finding.state != "ok" else ""
        lines.append(f"{finding.name.ljust(width)}  {finding.state.ljust(7)}  {finding.value}{fix}\n")
    return "".join(lines)
