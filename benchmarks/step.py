"""Our training step against an official one: same weights, same mixed batch, forward and backward, in turn.

``python -m benchmarks.step --model beit3-base`` compares with torchscale's BEiT-3; ``--model beit-base
--against transformers`` (or ``timm``) with a BEiT-1. First the losses and the gradients of every parameter
are compared in fp32; where they differ there is no ratio. Then both run in alternation.

Ours is the step of a training run: FSDP on one rank, packed rows, all objectives in one pass, pictures as
bytes, number of right predictions. Theirs is what its users run: eager, a pass for each kind, padded to the
longest, pixels normalised before, losses alone; in bf16 by autocast or with weights copied to bf16 and
gradients back, whichever is faster. The optimizer is on neither side, nor is clearing the gradients.
``ratio`` is official seconds over ours, median of the rounds. The last line on stdout is one JSON object.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from beitctl.engine.dist import leave
from beitctl.engine.measuring.meter import nominal
from beitctl.engine.shard import cpu_has_bf16
from benchmarks import captions, mixed, sides

CHECKED = 2
"""Samples of each kind whose gradients are compared where the timed steps are not in fp32."""
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-3
"""Largest relative differences in fp32 with which a ratio is reported."""
CPU_SAMPLES = {"tiny": 16, "base": 4, "large": 2, "giant": 1}
CUDA_SAMPLES = {"tiny": 128, "base": 64, "large": 32, "giant": 16}
"""Samples of each kind by default: what the official code fits."""
TINY_VOCABULARY = 8002
"""Ids of ``tiny``: those of the tokenizer that the captions are counted with; else the tables of 64,010 rows
would be most of the model."""
GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """Seconds of every round: by the clock, and of the processor."""

    wall: list[float]
    processor: list[float]


def synchronise(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(side: sides.Side, device: torch.device) -> tuple[float, float]:
    """Seconds of one forward and backward pass: by the clock, and of the processor."""
    side.clear()
    synchronise(device)
    begun, processor = time.perf_counter(), time.process_time()
    side.step()
    synchronise(device)
    return time.perf_counter() - begun, time.process_time() - processor


def alternate(pair: Sequence[sides.Side], rounds: int, device: torch.device) -> list[Timing]:
    """Seconds of both sides; who begins changes from round to round, and one round warms up."""
    found = [Timing([], []) for _ in pair]
    for number in range(rounds + 1):
        order = range(len(pair)) if number % 2 else reversed(range(len(pair)))
        for index in order:
            wall, processor = timed(pair[index], device)
            if number:
                found[index].wall.append(wall)
                found[index].processor.append(processor)
    return found


def median_ratio(official: Sequence[float], ours: Sequence[float]) -> float:
    """Official seconds over ours, median of the rounds."""
    return statistics.median(o / u for o, u in zip(official, ours, strict=True))


def profiled(side: sides.Side, device: torch.device) -> str:
    """Where the time of a step goes: the 15 operators with the most time of their own."""
    cuda = device.type == "cuda"
    side.clear()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as found:
        side.step()
        synchronise(device)
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return str(found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=45))


def match_of(asked: argparse.Namespace, samples: int) -> tuple[sides.Match, mixed.Mix, str]:
    """What is compared on so many samples of each kind, and where the lengths come from."""
    family, size = asked.model.split("-")
    known, prose, source = captions.known_lengths()
    mix = mixed.mix_of(samples, known, prose)
    if family == "beit":
        return sides.beit1(asked.against, size, mix, mixed.CODES), mix, source
    vocabulary = TINY_VOCABULARY if size == "tiny" else mixed.VOCABULARY
    return sides.beit3(size, mix, vocabulary, mixed.CODES), mix, source


def fastest(match: sides.Match, dtype: str, device: torch.device) -> sides.Side:
    """The official side in the form in which it is fastest."""
    first = sides.theirs(match, dtype, device)
    if dtype == "fp32":
        return first
    timed(first, device)
    by_autocast = timed(first, device)[0]
    second = sides.theirs(match, dtype, device, "cast")
    timed(second, device)
    return second if timed(second, device)[0] < by_autocast else first


def equality(asked: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Largest differences in fp32, on the whole batch of a run in fp32 and else on a small one."""
    samples = asked.samples if asked.dtype == "fp32" else min(CHECKED, asked.samples)
    match, _, _ = match_of(asked, samples)
    return sides.differences(
        match, sides.ours(match, "fp32", device, asked.compile), sides.theirs(match, "fp32", device)
    )


def alone(asked: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Peak memory of one side in this process: two steps of it, nothing else."""
    match, _, _ = match_of(asked, asked.samples)
    before = _memory("VmRSS")
    if asked.alone == "ours":
        side = sides.ours(match, asked.dtype, device, asked.compile)
    else:
        side = sides.theirs(match, asked.dtype, device, asked.form)
    for _ in range(2):
        timed(side, device)
    if device.type == "cuda":
        return {"gib": torch.cuda.max_memory_allocated(device) / GIB}
    return {"gib": _memory("VmHWM") - before}


def _memory(key: str) -> float:
    """A figure of /proc/self/status in GiB: ``VmRSS`` is resident now, ``VmHWM`` the most so far.

    Not ``getrusage``: its ``ru_maxrss`` outlives ``exec``, so that a child begins with what its parent held.
    """
    with open("/proc/self/status") as file:
        found = next(line for line in file if line.startswith(key))
    return int(found.split()[1]) * 1024 / GIB


def peak_memory(asked: argparse.Namespace, side: str, form: str) -> float | None:
    """Peak memory of one side, measured in a process of its own; None if that process fails."""
    options = {
        "--model": asked.model, "--device": asked.device, "--dtype": asked.dtype, "--against": asked.against,
        "--samples": asked.samples, "--threads": asked.threads,
        "--compile": asked.compile, "--alone": side, "--form": form,
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step"]
    command += [str(part) for option in options.items() for part in option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    with contextlib.suppress(ValueError, IndexError, KeyError):
        return float(json.loads(done.stdout.splitlines()[-1])["gib"])
    return None


def figures(timing: Timing, samples: int, tokens: int, flops: float, peak: float | None) -> dict[str, Any]:
    """What one side reaches, median of the rounds."""
    seconds = statistics.median(timing.wall)
    return {
        "seconds": seconds,
        "processor_seconds": statistics.median(timing.processor),
        "samples_per_s": samples / seconds,
        "tokens_per_s": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": None if peak is None else flops / seconds / 1e12 / peak,
    }


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    names = [f"{family}-{size}" for family in ("beit3", "beit") for size in mixed.SIZES]
    parser.add_argument("--model", choices=names, default="beit3-tiny")
    parser.add_argument("--against", choices=("torchscale", "transformers", "timm"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--samples", type=int, default=0, help="pictures, texts and pairs: so many of each")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: its default")
    parser.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto", help="our blocks; as in recipes"
    )
    parser.add_argument("--profile", action="store_true", help="show where the time of both sides goes")
    parser.add_argument("--no-memory", action="store_true", help="measure no peak memory")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    parser.add_argument("--alone", choices=("ours", "official"), help=argparse.SUPPRESS)
    parser.add_argument("--form", default="autocast", help=argparse.SUPPRESS)
    found = parser.parse_args(given)
    family, size = found.model.split("-")
    found.against = found.against or ("torchscale" if family == "beit3" else "transformers")
    if (family == "beit3") != (found.against == "torchscale"):
        parser.error(
            f"--against {found.against} has no {found.model}: beit3-* goes with torchscale, beit-* not"
        )
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    found.dtype = found.dtype or ("bf16" if found.device == "cuda" else "fp32")
    found.samples = found.samples or (CUDA_SAMPLES if found.device == "cuda" else CPU_SAMPLES)[size]
    return found


def measure(asked: argparse.Namespace, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """The two sides in figures."""
    loss, gradient = equality(asked, device)
    say(f"fp32: losses differ by {loss:.1e}, gradients by {gradient:.1e} at most (relative)")
    equal = loss <= LOSS_BOUND and gradient <= GRADIENT_BOUND
    found: dict[str, Any] = {"loss_difference": loss, "gradient_difference": gradient, "equal": equal}
    if not equal:
        return found | {"ratio": None}
    match, mix, lengths = match_of(asked, asked.samples)
    official, ours = (
        fastest(match, asked.dtype, device),
        sides.ours(match, asked.dtype, device, asked.compile),
    )
    pair = (official, ours)
    memory = {} if asked.no_memory else {
        name: peak_memory(asked, name, official.name) for name in ("official", "ours")
    }  # fmt: skip
    times = alternate(pair, asked.rounds, device)
    plan = match.batch.plan
    useful = ours.module.flops(match.batch)
    peak = nominal(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    samples = mix.samples if match.config.vocabulary else mix.images
    for name, timing in zip(("official", "ours"), times, strict=True):
        found[name] = figures(timing, samples, plan.real_tokens, useful, peak)
        found[name]["peak_memory_gib"] = memory.get(name)
        say(f"{name}: {found[name]['seconds']:.3f} s, {found[name]['tflops']:.3f} TFLOP/s")
    if asked.profile:
        for side in pair:
            say(f"{'ours' if side is ours else asked.against}:\n{profiled(side, device)}")
    return found | {
        "ratio": median_ratio(times[0].wall, times[1].wall),
        "ratio_of_processor_time": median_ratio(times[0].processor, times[1].processor),
        "official_form": official.name,
        "samples": samples,
        "tokens": plan.real_tokens,
        "text_lengths": list(plan.text_lengths),
        "pair_lengths": list(plan.pair_lengths),
        "lengths_from": lengths if match.config.vocabulary else None,
        "tflop_of_a_step": useful / 1e12,
    }


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and give what the last line says."""
    asked = arguments(given)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    device = torch.device(asked.device)
    try:
        if asked.alone:
            found: dict[str, Any] = alone(asked, device)
        else:
            say = (lambda text: None) if asked.json else print
            found = {
                "benchmark": "step", "model": asked.model, "against": asked.against, "rounds": asked.rounds,
                "dtype": asked.dtype, "compile": asked.compile,
                "bf16_is_native": device.type == "cuda" or cpu_has_bf16(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__,
            } | measure(asked, device, say)  # fmt: skip
    finally:
        leave()
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
