"""A small image tokenizer, pictures for it, and the stage tokenize-images on both, for tests of all kinds."""

import io
import json

import numpy as np
import torch
from PIL import Image
from torch import nn

from beitctl.api import Example, Job, Plugin
from beitctl.checkpoints import native
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.stages.tokenize_images import TokenizeImages


class Tiny:
    """A network with random weights: 2 x 2 codes, 64 of them, of pictures of 16 px."""

    codes, grid, image_px = 64, 2, 16

    def __init__(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(nn.Conv2d(3, 48, 8, 8), nn.Tanh(), nn.Conv2d(48, self.codes, 1))
        self.model.eval().requires_grad_(False)
        self.fingerprint = f"tiny-{seed}"

    def encode(self, images):
        return self.closest(images)[0]

    @torch.no_grad()
    def closest(self, images):
        best = self.model(images.float() / 255).log_softmax(1).max(1)
        return best.indices.flatten(1), best.values.flatten(1)


class Noise(Plugin):
    """Pictures of noise of several sizes, some of which cannot be read."""

    count: int
    bad: tuple[int, ...] = ()
    start: int = 0

    def open(self):
        return Opened(range(self.start, self.start + self.count), self._example, f"noise-{self.count}")

    def _example(self, number):
        if number in self.bad:
            return Example(f"n{number}", b"no picture")
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3)).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return Example(f"n{number}", stream.getvalue())


class Quiet:
    """A log that nobody reads."""

    def __getattr__(self, name):
        return lambda *values: None


def stage(*sources, **settings):
    found = {"tokenizer": ".", "sources": list(sources) or [Noise(count=11, bad=(4,))], "views": 3}
    return TokenizeImages(**found | {"shard_pictures": 2, "seed": 7, "jitter": 0.2} | settings)


def tokenize(folder, made=None, *, tokenizer=None, resume=True):
    """Run the stage with a tokenizer that no file holds."""
    before = native.load_tokenizer
    native.load_tokenizer = lambda path: tokenizer or Tiny()
    try:
        return (made or stage()).run(Job(folder, Quiet(), resume=resume))
    finally:
        native.load_tokenizer = before


def files(folder):
    """What the store consists of, by name; without what says who made it."""
    found = {path.name: path.read_bytes() for path in (folder / "tokens").iterdir()}
    record = json.loads(found["store.json"])
    assert record.pop("made").keys() == {"host", "time", "ranks", "device", "versions"}
    return found | {"store.json": json.dumps(record).encode()}
