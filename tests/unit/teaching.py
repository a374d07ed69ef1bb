"""A teacher, pictures and a small VQ-KD for the tests of its training."""

import io
from unittest import mock

import numpy as np
import torch
from PIL import Image
from small import Given, Record
from torch import nn
from torch.nn import functional as F

from beitctl.api import Example, Job, Plugin
from beitctl_plugins.tokenizers.vqkd import VQKD


class Colours(nn.Module):
    """Features of a patch: its mean colour, turned into what ``what`` says."""

    def __init__(self, grid, what):
        super().__init__()
        self.grid, self.what, self.width = grid, what, 3
        self.register_buffer("one", torch.ones(()))

    def forward(self, images):
        found = F.adaptive_avg_pool2d(images, self.grid).flatten(2).transpose(1, 2)
        if self.what == "constant":
            return torch.full_like(found, 0.7)
        if self.what == "two clusters":
            bright = (found.mean(-1, keepdim=True) > 0.5).float()
            return bright * torch.tensor([1.0, 2.0, 3.0]) + 0.001 * found
        return found * float("nan") if self.what == "nan" else found


class Painter(Plugin):
    """A teacher that sees colours."""

    what: str = "colours"
    input_px: int = 16

    def open(self, grid):
        return Colours(grid, self.what)


def pictures(count=12):
    """A source of random pictures of coarse colours, with two labels."""
    draw = np.random.default_rng(0)
    examples = []
    for number in range(count):
        stream = io.BytesIO()
        coarse = draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 24), Image.Resampling.NEAREST).save(stream, "PNG")
        examples.append(Example(f"p{number}", stream.getvalue(), label="even" if number % 2 == 0 else "odd"))
    return Given(examples=tuple(examples))


def plugin(what="colours", steps=6, micro_samples=0, save_every=1000, **settings):
    """VQ-KD on a grid of 4 x 4 patches."""
    shape = {
        "layers": 1, "decoder_layers": 1, "width": 8, "heads": 2, "ffn": 16, "image_px": 16, "patch_px": 4,
        "init": "magneto",
    }  # fmt: skip
    train = {
        "steps": steps, "precision": "fp32", "micro_samples": micro_samples, "log_every_steps": 2,
        "save_every_steps": save_every,
        "optim": {"peak_lr": 1e-3},
    }  # fmt: skip
    table = {"codes": 16, "code_width": 4, "samples": 8, "crop_scale": (0.5, 1.0), "shape": shape}
    return VQKD.model_validate({"teacher": Painter(what=what), "train": train, **table, **settings})


def trained(folder, log=None, **settings):
    """The weights of the tokenizer that a training leaves in a folder; nothing is measured or drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    with mock.patch("beitctl_plugins.tokenizers.vqkd.measure", return_value={}):
        plugin(**settings).train([pictures()], Job(folder, log or Record()))
    return VQKD.load(folder / "tokenizer").model.state_dict()
