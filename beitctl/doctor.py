"""The check of the environment behind ``beitctl doctor``."""

import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from beitctl import runs

PYTHON = (3, 11)
LOW_DISK_GIB = 5
GIB = 2**30
VARIABLES = {
    "BEITCTL_RUNS": "folder of all runs (default: ./runs)",
    "BEITCTL_RECIPES": "folders that are searched for recipes",
    "BEITCTL_CACHE": "folder of what can be computed again, such as indices (default: the user's cache)",
    "BEITCTL_DEBUG": "1 shows the traceback of every error",
}


@dataclass(frozen=True)
class Finding:
    """One line of the check."""

    name: str
    state: Literal["ok", "note", "missing"]
    """``missing`` is something that beitctl cannot work without."""
    value: str
    fix: str = ""


def examine() -> list[Finding]:
    """Everything that is worth knowing about this machine before a run starts."""
    return [
        _python(),
        Finding("beitctl", "ok", metadata.version("beitctl")),
        *_requirements(),
        *_torch(),
        *_machine(),
        _disk(),
        *_extras(),
        *_variables(),
    ]


def advice(findings: list[Finding]) -> str:
    """What to do next."""
    missing = [finding for finding in findings if finding.state == "missing"]
    if missing:
        return "not ready: " + "; ".join(f"{f.name}: {f.fix or f.value}" for f in missing)
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
    yield from _gpus(torch)
    native = importlib.import_module("beitctl.engine.shard").cpu_has_bf16()
    yield Finding(
        "bf16 on the CPU", "ok", "native" if native else "no: precision 'auto' computes in fp32 there"
    )


def _gpus(torch: Any) -> Iterator[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding(
            "GPUs", "note", "none: everything runs on the CPU, slowly", "tiny and demo are made for it"
        )
    for index in range(count):
        device = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if device.major >= 8 else "no bf16"
        yield Finding(f"GPU {index}", "ok", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {bf16}")


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("CPU cores", "ok", str(cores))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding("memory", "ok", f"{memory:.0f} GiB")


def _disk() -> Finding:
    folder = runs.root().absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free / GIB
    if not os.access(there, os.W_OK):
        return Finding(
            "runs", "missing", f"{folder}: cannot be written", "set BEITCTL_RUNS to a folder of yours"
        )
    low = free < LOW_DISK_GIB
    return Finding(
        "runs", "note" if low else "ok", f"{folder}, {free:.0f} GiB free", "free some space" if low else ""
    )


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
