"""Stages and tasks to test recipes with, and a recipe for them."""

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from beitctl import recipe, registry
from beitctl.api import Kind, Plugin
from beitctl.config import STRICT
from beitctl.errors import RecipeError


class Blur(Plugin):
    """A task."""

    share: float = Field(default=0.5, gt=0, le=1)


class Sharpen(Blur):
    """Another task, with a setting that the first has not."""

    radius: int
    inner: Annotated[Any, Kind("beitctl.tasks")] | None = None


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Settings inside settings."""

    __pydantic_config__ = STRICT

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Settings."""

    __pydantic_config__ = STRICT

    steps: int
    optim: Optim
    width: int = 4
    heads: int = 2
    precision: Literal["auto", "bf16"] = "auto"
    fused: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")


class Part(Plugin):
    task: Annotated[Any, Kind("beitctl.tasks")]
    samples: int = Field(ge=1)


class Pretrain(Plugin):
    """Train."""

    train: Loop
    parts: dict[str, Part] = Field(default={})
    tasks: list[Annotated[Any, Kind("beitctl.tasks")]] = Field(default=[])
    tokens: str = ""
    both: int | str = 0


class Finetune(Plugin):
    """Continue."""

    init: str = ""
    samples: int = 1
    task: Annotated[Any, Kind("beitctl.tasks")] | None = None
    seeds: list[int] = Field(default=[0])

    @model_validator(mode="after")
    def _odd(self):
        if self.samples == 13:
            raise ValueError("samples must not be 13")
        return self


PLUGINS = {
    "beitctl.stages": {"pretrain": "Pretrain", "finetune": "Finetune", "broken": "Nowhere"},
    "beitctl.tasks": {"blur": "Blur", "sharpen": "Sharpen"},
}
TEXT = """\
# what it is
[recipe]
summary = "Small"  # one line

[pretrain]
tokens = "none"
tasks = [
  { kind = "blur" },
  { kind = "sharpen", radius = 2 },
]

[pretrain.train]
steps = 3  # few
optim = { lr = 1e-3 }

[pretrain.parts.image]
task = { kind = "blur", share = 0.4 }
samples = 8

[finetune.first]
init = "@pretrain"

[finetune.second]
init = "@finetune.first"
seeds = [0, 1]

[summary]
loss = "@pretrain:parts.image"
all = "@pretrain"
tuned.samples = "@finetune.second:samples"
"""


@pytest.fixture(autouse=True)
def stubs(monkeypatch, tmp_path):
    """The plugins above instead of those installed, and an empty working folder."""
    monkeypatch.setitem(sys.modules, "plugins_of_test", sys.modules[__name__])
    entries = {
        group: tuple(
            EntryPoint(name, f"plugins_of_test:{target}", group) for name, target in sorted(named.items())
        )
        for group, named in PLUGINS.items()
    }
    monkeypatch.setattr(registry, "_entries", lambda group: entries.get(group, ()))
    for group in PLUGINS:
        monkeypatch.setitem(registry.GROUPS, group, ())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(recipe.FOLDERS, raising=False)


def load(text, *overrides, stage=None):
    Path("r.toml").write_text(text, encoding="utf-8")
    return recipe.load("r.toml", overrides, stage=stage)


def changed(old, new, *, text=TEXT):
    assert text.count(old) == 1
    return text.replace(old, new)


def problems(text, *overrides, stage=None):
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, stage=stage)
    return caught.value.problems
