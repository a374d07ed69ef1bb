"""What is worth measuring on a GPU, in one run of less than nine minutes; needs torch and numpy alone.

``python -m benchmarks.gpu --out results`` measures matrix products, attention, one block, training steps of
base, large and giant, the official step where torchscale is installed, the stall of a checkpoint, and the
image tokenizer. After every part ``gpu.json`` holds all that is known by then. A part that fails says why,
and the next one begins. ``--device cpu --tiny`` takes the same way at toy sizes, where the numbers mean
nothing. The last line on stdout is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from beitctl.engine import dist
from benchmarks import gpu_kernels, gpu_steps
from benchmarks.timing import Bench, attempt

Part = Callable[[Bench, dict[str, Any]], dict[str, Any]]


def ceiling_of(found: dict[str, Any]) -> float | None:
    """TFLOP/s of plain products, if they were measured."""
    ceiling: float | None = found["parts"].get("gemm", {}).get("ceiling_tflops")
    return ceiling


def step_part(size: str) -> Part:
    """Training steps of a size."""
    return lambda bench, found: gpu_steps.steps(bench, size, ceiling_of(found))


def official_part(size: str) -> Part:
    """The official step on the batch that ours fits, or on what follows from it."""

    def part(bench: Bench, found: dict[str, Any]) -> dict[str, Any]:
        triples = found["parts"].get(f"step {size}", {}).get("triples", gpu_steps.TRIPLES[size][-1])
        made = gpu_steps.official(bench, size, triples, ceiling_of(found))
        ours = found["parts"].get(f"step {size}", {}).get("tried", {}).get(triples, {}).get("seconds")
        if ours and "seconds_per_triple" in made:
            made["ratio"] = made["seconds_per_triple"] / (ours / triples)
        return made

    return part


PARTS: dict[str, tuple[float, Part]] = {
    "gemm": (20, lambda bench, found: gpu_kernels.gemm(bench)),
    "attention": (60, lambda bench, found: gpu_kernels.attention(bench)),
    "block": (90, lambda bench, found: gpu_kernels.blocks(bench)),
    "step giant": (110, step_part("giant")),
    "step base": (50, step_part("base")),
    "step large": (60, step_part("large")),
    "official base": (20, official_part("base")),
    "official large": (25, official_part("large")),
    "official giant": (30, official_part("giant")),
    "tokenizer": (30, lambda bench, found: gpu_steps.tokenizer(bench)),
    "saving": (60, lambda bench, found: gpu_steps.saving(bench, "large")),
}
"""Seconds after which a part begins nothing more, and the part; the order is that of their worth."""


def environment(device: torch.device) -> dict[str, Any]:
    """Date, commit, GPU, driver and versions."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": commit(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cores": os.cpu_count(),
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gib": properties.total_memory / 2**30,
            "capability": list(torch.cuda.get_device_capability(device)),
            "driver": driver(Path("/proc/driver/nvidia/version")),
        }
    return found


def driver(file: Path) -> str | None:
    """First line of what the NVIDIA driver says of itself."""
    return file.read_text().splitlines()[0] if file.is_file() else None


def commit(root: Path) -> str | None:
    """The commit that is checked out, read from files: there may be no git."""
    head = root / ".git" / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text().strip()
    name = text.removeprefix("ref: ")
    if name == text:
        return text
    loose, packed = root / ".git" / name, root / ".git" / "packed-refs"
    if loose.is_file():
        return loose.read_text().strip()
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)


def write(folder: Path, found: dict[str, Any]) -> None:
    """Replace ``gpu.json`` by what is known."""
    part = folder / "gpu.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(folder / "gpu.json")


def measure(
    asked: argparse.Namespace, folder: Path, scratch: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run the parts one after the other, and write after each."""
    device = torch.device(asked.device)
    end = time.monotonic() + 60 * asked.minutes
    found: dict[str, Any] = {
        "benchmark": "gpu", "tiny": asked.tiny, "environment": environment(device), "parts": {},
    }  # fmt: skip
    plain = Bench(device, asked.tiny, scratch)
    for name in asked.parts or PARTS:
        budget, part = PARTS[name]
        begun = time.monotonic()
        bench = dataclasses.replace(plain, until=min(end, begun + budget), notes=[])
        if bench.late(name, 0 if asked.tiny else 5):
            found["parts"][name] = {"error": "no time left"}
            continue
        bench.forget()
        made = attempt(lambda b=bench, p=part: p(b, found))  # type: ignore[misc]
        found["parts"][name] = made | {"part_seconds": time.monotonic() - begun, "left_out": bench.notes}
        write(folder, found)
        say(f"{name}: {time.monotonic() - begun:.1f} s {made.get('error', '')}")
    write(folder, found)
    return found


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder of gpu.json"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing more begins")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--parts", nargs="*", choices=tuple(PARTS), help="these alone")
    found = parser.parse_args(given)
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    if found.device == "cpu" and not found.tiny:
        parser.error("--device cpu takes days at full size: add --tiny")
    return found


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and give what the last line says."""
    asked = arguments(given)
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=asked.out) as scratch:
            found = measure(asked, asked.out, Path(scratch), lambda text: print(text, flush=True))
    finally:
        dist.leave()
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
