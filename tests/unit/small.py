"""The smallest model, sources, tokenizer and token store that tasks and stages work on."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from beitctl import registry
from beitctl.api import Example, Plugin, Tools
from beitctl.checkpoints.native import save_model
from beitctl.config import ModelConfig, OptimConfig, TrainConfig
from beitctl.data.images import Crop, Pictures
from beitctl.engine.dist import Ranks
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.tokenizers.sentencepiece import SentencePiece

ALONE = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))
MODEL = ModelConfig(
    layers=1, width=8, heads=2, ffn=16, image_px=16, patch_px=4, vocabulary=52, text_tokens=10
)
COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0), "green": (0, 255, 0), "grey": (90, 90, 90)}


def png(colour=(255, 0, 0), px=20):
    stream = io.BytesIO()
    Image.new("RGB", (px, px), colour).save(stream, "PNG")
    return stream.getvalue()


class Given(Plugin):
    """A source that holds its examples."""

    examples: tuple[Example, ...]
    name: str = "given"

    def open(self):
        return Opened(self.examples, lambda example: example, self.name)


def coloured(*labels, captions=("a {} square",)):
    """A source with one picture per colour, with label and captions."""
    return Given(
        examples=tuple(
            Example(
                f"{i}-{label}", png(COLOURS[label]), tuple(c.format(label) for c in captions), label=label
            )
            for i, label in enumerate(labels)
        )
    )


class Letters:
    """A text tokenizer with one id a letter: <mask> is 51."""

    size = 52
    fingerprint = "letters"
    start_id, pad_id, end_id, unknown_id, mask_id = 0, 1, 2, 3, 51
    special_ids = (0, 1, 2, 3, 51)

    def encode(self, text):
        return [4 + ord(letter) % 40 for letter in text]

    def decode(self, ids):
        return " ".join(map(str, ids))


class Codes:
    """A token store with 2 views; the code of a patch tells view and place."""

    views, codes, grid = 2, 40, 4

    def view(self, id, number):
        return Crop(0, 0, 20, 20), np.arange(16) + 20 * number


def tools(**changes):
    return Tools(
        **{"model": MODEL, "tokenizer": Letters(), "tokens": Codes(), "pictures": Pictures()} | changes
    )


def rng(seed=0):
    return np.random.default_rng(seed)


def weights(module: nn.Module, prefix: str, model: ModelConfig = MODEL) -> dict[str, torch.Tensor]:
    """Initial values of the parameters of a module, under the names that they have below ``prefix``."""
    names = {f"{prefix}{name}": value.shape for name, value in module.named_parameters()}
    return {name: initial(name, shape, model, 0) for name, shape in names.items()}


def stored(folder: Path, kind: str = "", labels: tuple[str, ...] = (), tokenizer: Any = None) -> Path:
    """A model on disk, with the heads of a task if one is named."""
    tensors = weights(Multiway(MODEL), "model.")
    if kind:
        heads = registry.get("beitctl.tasks", kind)().heads(tools(labels=labels))
        tensors |= weights(nn.ModuleDict(heads), "heads.")
    task = {"kind": kind} if kind else None
    save_model(folder, tensors, MODEL, task=task, labels=labels, tokenizer=tokenizer)
    return folder


def pieces() -> Any:
    """A SentencePiece tokenizer with 32 ids."""
    lines = ["a small red boat on the calm blue sea", "two green dogs run over the grey field"] * 20
    source = Given(examples=tuple(Example(str(i), text=line) for i, line in enumerate(lines)))
    plugin = SentencePiece(pieces=30)
    return plugin.fit(plugin.sample([source], Record()))


class Record:
    """A log that remembers; every method of ``beitctl.api.Log`` appends its arguments."""

    def __init__(self):
        self.said = {}

    def __getattr__(self, name):
        return lambda *values: self.said.setdefault(name, []).append(values)


def training(steps=2, **changes):
    settings = {"optim": OptimConfig(peak_lr=0.01), "log_every_steps": 1, "save_every_steps": 1000}
    return TrainConfig(steps=steps, **settings | changes)
