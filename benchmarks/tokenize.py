"""How much of the bare encoder's speed ``tokenize-images`` keeps.

``python -m benchmarks.tokenize`` runs the stage's own work (decode, crop, encode, write a shard) and the bare
tokenizer on the same views, made beforehand, in the same batches; both in turn in one run, on the embedded
pictures and with a VQ-KD tokenizer of random weights. ``ratio`` is the stage's views per second over the
encoder's; it should be at least 0.85.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from beitctl.data.store import TokenStoreWriter
from beitctl.engine.shard import compute_dtype, fill
from beitctl.model.codebook import Codebook
from beitctl.model.init import initial
from beitctl.model.vqkd import VQKDModel
from beitctl_plugins.sources.embedded import Embedded
from beitctl_plugins.stages.tokenize_images import TokenizeImages
from beitctl_plugins.stages.tokenizing import Unusable, Work
from beitctl_plugins.tokenizers.vqkd import Shape
from beitctl_plugins.tokenizers.vqkd_tokenizer import VQKDTokenizer

CODES, CODE_WIDTH = 8192, 32
"""BEiT v2's."""


def tokenizer_of(shape: Shape) -> VQKDTokenizer:
    """A VQ-KD tokenizer with random weights."""
    encoder = shape.encoder()
    model = VQKDModel(encoder, 1, 8, Codebook(CODES, CODE_WIDTH))
    fill(model, lambda name, size: initial(f"model.{name}", size, encoder, 0))
    draw = torch.Generator().manual_seed(0)
    model.codebook.vectors.copy_(F.normalize(torch.randn(CODES, CODE_WIDTH, generator=draw), dim=-1))
    return VQKDTokenizer(model, "random")


def batches_of(work: Work, number: int) -> list[NDArray[np.uint8]]:
    """The views of a shard, in the batches in which the stage reads them."""
    views = [work.views(work.example(place)).pixels for place in work.places(number)]
    return [np.concatenate(views[i : i + work.batch]) for i in range(0, len(views), work.batch)]


def timed(action: Callable[[], Any]) -> float:
    """Seconds that an action takes, until the device is done with it."""
    begun = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(work: Work, meta: dict[str, Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the stage and of the bare encoder, shard by shard, in turn; the first one warms up."""
    stage_seconds, bare_seconds = [], []

    def fail(found: Unusable) -> None:
        raise SystemExit(f"an embedded picture cannot be read: {found}")

    with tempfile.TemporaryDirectory() as folder:
        writer = TokenStoreWriter(Path(folder), meta)
        work.encode(batches_of(work, 0)[0][:8])
        for number in range(rounds):
            ready = batches_of(work, number)

            def stage(number: int = number) -> None:
                work.write([number], writer, fail, lambda _: None)

            def bare(ready: list[NDArray[np.uint8]] = ready) -> None:
                torch.cat([work.encode(pixels) for pixels in ready]).cpu()

            pair = [(stage_seconds, stage), (bare_seconds, bare)]
            for seconds, action in pair if number % 2 == 0 else reversed(pair):
                seconds.append(timed(action))
    return stage_seconds, bare_seconds


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenize", description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=384, help="width of the encoder; heads of 64 channels")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--image-px", type=int, default=224, help="side of a view; patches of 16 px")
    parser.add_argument("--pictures", type=int, default=16, help="pictures of each round")
    parser.add_argument("--views", type=int, default=4, help="views of each picture")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="threads that decode; 0: one for each core")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="nothing but the JSON object")
    found = parser.parse_args(given)
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device")
    return found


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and give what the last line says."""
    asked = arguments(given)
    device = torch.device(asked.device)
    shape = Shape(
        layers=asked.layers, width=asked.width, heads=max(1, asked.width // 64), ffn=4 * asked.width,
        image_px=asked.image_px, patch_px=16, decoder_layers=1,
    )  # fmt: skip
    tokenizer = tokenizer_of(shape)
    tokenizer.model.to(device)
    stage = TokenizeImages(
        tokenizer=".", sources=[Embedded(limit=asked.pictures * asked.rounds)], views=asked.views,
        shard_pictures=asked.pictures, workers=asked.workers,
    )  # fmt: skip
    work = Work(
        stage, tokenizer, [source.open() for source in stage.sources], device,
        compute_dtype(asked.precision, device),
    )  # fmt: skip
    stage_seconds, bare_seconds = measure(work, stage.meta(work), asked.rounds)
    views = asked.pictures * asked.views
    found = {
        "benchmark": "tokenize",
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu",
        "precision": str(work.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "encoder": f"{asked.layers} layers, {asked.width} wide, {asked.image_px} px",
        "views": views * asked.rounds,
        "stage_views_per_s": views * asked.rounds / sum(stage_seconds),
        "encoder_views_per_s": views * asked.rounds / sum(bare_seconds),
        "stage_pictures_per_s": asked.pictures * asked.rounds / sum(stage_seconds),
        "ratio": statistics.median(b / s for s, b in zip(stage_seconds, bare_seconds, strict=True)),
        "ratio_of_sums": sum(bare_seconds) / sum(stage_seconds),
    }
    if not asked.json:
        for number, (ours, bare) in enumerate(zip(stage_seconds, bare_seconds, strict=True), 1):
            print(
                f"round {number}: {views} views, stage {ours:.2f} s, encoder {bare:.2f} s, {bare / ours:.3f}"
            )
        print(f"tokenize-images keeps {found['ratio']:.1%} of the bare encoder's speed")
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
