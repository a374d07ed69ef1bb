"""Recipe tables at toy size, on the embedded data: what ``--smoke`` runs.

The functions take and give plain TOML data. Keys that they do not name stay as they are: what is tried out is
the structure that the recipe describes.
"""

from collections.abc import Mapping
from typing import Any

from beitctl import registry

Table = dict[str, Any]

MODEL = {"width": 64, "heads": 4, "ffn": 128, "image_px": 32, "patch_px": 8}
"""Sizes of every toy model; its grid is that of the tokenizer in the recipe tiny."""
MOST = {"layers": 4, "fusion_layers": 2, "text_tokens": 24}
"""Sizes that are kept if they are smaller."""
VOCABULARY = 402
"""400 pieces of the tokenizer in the recipe tiny, <pad> and <mask>."""
TRAIN = {
    "steps": 6,
    "save_every_steps": 3,
    "log_every_steps": 1,
    "workers": 0,
    "precision": "auto",
    "micro_samples": 0,
}
OPTIM = {"peak_lr": 1e-3, "min_lr": 0.0, "warmup_steps": 2}
SAMPLES = 8
CONTENT = {"pair": "pairs", "dual": "pairs", "text": "text"}
"""Layout of a task to the embedded examples that it can use; pictures with labels for all others."""


STAND_INS = {
    "text_tokenizer": "@train-tokenizer.text",
    "tokens": "@tokenize-images",
    "tokens_from": "@train-tokenizer.image",
    "image_tokenizer": "@train-tokenizer.image",
}
"""Settings that refer to other stages, and the tables of the recipe tiny that take their place."""


def pretraining(table: Mapping[str, Any]) -> Table:
    """A table ``[pretrain]`` at toy size."""
    small = {
        **table,
        "model": model(table["model"]),
        "train": train(table["train"]),
        "objectives": {name: objective(inner) for name, inner in table["objectives"].items()},
    }
    for name, stand_in in STAND_INS.items():
        if small.get(name):
            small[name] = stand_in
    small.pop("image_tokenizer_settings", None)  # of a released file
    if not str(small.get("init", "")).startswith("@"):
        small.pop("init", None)  # a file: weights of the full size
    return small


def model(table: Mapping[str, Any]) -> Table:
    """The settings of a model at toy size."""
    small = {**table, **MODEL}
    small |= {name: min(table[name], most) for name, most in MOST.items() if name in table}
    return small | ({"vocabulary": VOCABULARY} if table.get("vocabulary") else {})


def train(table: Mapping[str, Any]) -> Table:
    """The settings of a training loop that takes a few steps."""
    return {**table, **TRAIN, "optim": {**table["optim"], **OPTIM}}


def objective(table: Mapping[str, Any]) -> Table:
    """One objective on a few embedded examples."""
    task = registry.get("beitctl.tasks", table["task"]["kind"])
    source = {"kind": "embedded", "content": CONTENT.get(task.layout, "pictures")}
    return {
        **table,
        "task": _task(task, table["task"]),
        "source": {**source, "limit": 96},
        "held_out": {**source, "split": "test", "limit": 32},
        "samples": SAMPLES,
    }


def _task(task: Any, table: Mapping[str, Any]) -> Table:
    """A task's table, made small by its own class if that can."""
    settings = {name: value for name, value in table.items() if name != "kind"}
    smoke = getattr(task, "smoke", None)
    return {"kind": table["kind"], **(smoke(settings) if callable(smoke) else settings)}
