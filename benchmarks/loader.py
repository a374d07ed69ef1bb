"""How much of bare decoding our loader keeps, and how it stands beside those of timm and webdataset.

``python -m benchmarks.loader`` writes JPEGs of 500x375 pixels (noise with the spectrum of photos, quality 90)
into a folder and into tar shards, and lets each loader decode, crop at random to 224 pixels, flip and stack
them to uint8 batches of 64: in turn, round by round, in one run. Speeds are pictures per second of processor
time on one core, so that other work on the machine weighs less; ``--workers N`` counts wall time with N
worker processes instead. ``bare`` is a loop over torchvision's ``decode_jpeg`` and ``RandomResizedCrop``
without any loader; ``ratio`` is ours over it, median of the rounds, and should be at least 0.85.
"""

import argparse
import functools
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import timm.data
import torch
import webdataset
from PIL import Image
from timm.data.loader import fast_collate
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, v2

from beitctl.api import Example, Item, Tools
from beitctl.config import ModelConfig
from beitctl.data.images import Pictures
from beitctl.data.loader import Place, StepData, Stream
from beitctl.data.workers import steps
from beitctl_plugins.sources.image_folder import ImageFolder
from beitctl_plugins.sources.webdataset import WebDataset
from beitctl_plugins.tasks.preparing import view_of

SIDE, BATCH, SCALE = 224, 64, (0.2, 1.0)

Epoch = Callable[[], Iterator[Any]]
"""Gives the batches of an epoch; what is done once, such as listing files, was done before."""


@dataclass(frozen=True)
class Crops:
    """A task that only looks: one random crop of every picture."""

    layout: ClassVar[str] = "image"

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        """The crop, (3, SIDE, SIDE) uint8."""
        return Item(image=view_of(example, draw, tools, SCALE))


def noise(rng: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    """A JPEG of noise with the spectrum of photos."""
    frequencies = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.fftfreq(width)[None] ** 2
    frequencies[0, 0] = 1
    spectrum = np.fft.fft2(rng.standard_normal((3, height, width))) / np.sqrt(frequencies)
    pixels = np.fft.ifft2(spectrum).real.transpose(1, 2, 0)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write(folder: Path, pictures: int, shards: int) -> None:
    """The same pictures as files below ``folder/files/class`` and as tars in ``folder/tars``."""
    rng = np.random.default_rng(0)
    (folder / "files" / "class").mkdir(parents=True)
    (folder / "tars").mkdir()
    for shard in range(shards):
        with tarfile.open(folder / "tars" / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * pictures // shards, (shard + 1) * pictures // shards):
                data = noise(rng)
                (folder / "files" / "class" / f"{number:06d}.jpg").write_bytes(data)
                member = tarfile.TarInfo(f"{number:06d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def bare(folder: Path, workers: int) -> Epoch:
    """Read, decode, crop, flip, stack, with nothing around it; always in this process."""
    crop = v2.RandomResizedCrop(SIDE, SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True)
    flip = v2.RandomHorizontalFlip()
    files = [str(file) for file in sorted((folder / "files" / "class").iterdir())]

    def epoch() -> Iterator[Any]:
        for first in range(0, len(files) - BATCH + 1, BATCH):
            some = files[first : first + BATCH]
            yield torch.stack(
                [flip(crop(decode_jpeg(read_file(file), mode=ImageReadMode.RGB))) for file in some]
            )

    return epoch


def ours(folder: Path, workers: int, source: Any) -> Epoch:
    """Our loader: order, source, crop, packed batch."""
    model = ModelConfig(layers=1, width=8, heads=1, ffn=8, image_px=SIDE, patch_px=16)
    task: Any = Crops()
    examples = source(path=folder / ("tars" if source is WebDataset else "files")).open()
    stream = Stream("image", task, examples, BATCH, Tools(model, pictures=Pictures()))
    data = StepData([stream], model, 0, Place())
    return lambda: steps(data, 0, len(examples) // BATCH, workers, lambda worker: None)


def timms(folder: Path, workers: int) -> Epoch:
    """The data set of timm, its plain transform for training, and collation to uint8."""
    transform = timm.data.create_transform(
        SIDE, is_training=True, use_prefetcher=True, scale=SCALE, color_jitter=None, interpolation="bicubic"
    )
    dataset = timm.data.create_dataset("", str(folder / "files"), transform=transform)
    loader: Any = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, collate_fn=fast_collate, drop_last=True
    )
    return lambda: iter(loader)


def webdatasets(folder: Path, workers: int) -> Epoch:
    """The pipeline of webdataset with its Pillow decoder and torchvision's transform."""
    crop = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    tars = [str(path) for path in sorted((folder / "tars").glob("*.tar"))]
    found = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(1000)
    found = found.decode("pil").to_tuple("jpg").map_tuple(crop).batched(BATCH, partial=False)
    loader: Any = DataLoader(found, None, num_workers=workers)
    return lambda: iter(loader)


LOADERS: dict[str, Callable[[Path, int], Epoch]] = {
    "bare": bare,
    "ours, folder": functools.partial(ours, source=ImageFolder),
    "ours, tar": functools.partial(ours, source=WebDataset),
    "timm, folder": timms,
    "webdataset, tar": webdatasets,
}


def speed(epoch: Epoch, workers: int) -> float:
    """Pictures per second of an epoch."""
    clock = time.perf_counter if workers else time.process_time
    begun = clock()
    batches = sum(1 for _ in epoch())
    return batches * BATCH / (clock() - begun)


def main() -> None:
    """Run it and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=640)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in LOADERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, given.pictures, given.shards)
        epochs = {name: loader(folder, given.workers) for name, loader in LOADERS.items()}
        for number in range(given.rounds + 1):
            for loader, epoch in epochs.items():
                rate = speed(epoch, given.workers)
                if number:  # the first round warms up
                    found[loader].append(rate)
    medians = {name: round(statistics.median(rates), 1) for name, rates in found.items()}

    def ratio(ours: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(found[ours], found[other], strict=True)), 3)

    print(
        json.dumps(
            {
                "benchmark": "loader",
                "unit": "pictures/s" if given.workers else "pictures per second of one core",
                "workers": given.workers,
                "pictures": given.pictures,
                "rounds": given.rounds,
                "speed": medians,
                "ratio": min(ratio("ours, folder", "bare"), ratio("ours, tar", "bare")),
                "to_timm": ratio("ours, folder", "timm, folder"),
                "to_webdataset": ratio("ours, tar", "webdataset, tar"),
                "torch": torch.__version__,
                "timm": timm.__version__,
                "webdataset": webdataset.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
