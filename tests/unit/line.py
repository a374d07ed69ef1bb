"""The smallest thing that the loop can train: a line through the origin, and its data."""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from small import ALONE, training
from torch import nn
from torch.distributed.fsdp import fully_shard

from beitctl.engine.loop import train
from beitctl.engine.session import Session


@dataclass(frozen=True)
class Points:
    """One forward pass: (n,) places x; y is 2 x."""

    x: torch.Tensor
    problems: tuple = ()
    index: int | None = None

    @property
    def samples(self):
        return tuple(map(str, self.x.tolist() if self.index is None else [self.index]))

    def to(self, device):
        return replace(self, x=self.x.to(device))


class Line(nn.Module):
    """y = w x with the squared error as its loss; a second term counts nothing."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.weights = {"fit": 0.5, "never": 3.0}

    def forward(self, batch):
        error = (self.w - 2) * batch.x
        zero = 0 * self.w.sum()
        return {"fit": ((error**2).sum(), (error.abs() < 1).sum()), "never": (zero, zero.detach())}

    def counts(self, batch):
        return {"fit": float(len(batch.x)), "never": 0.0}


class Steps:
    """``steps[number]``: passes of the given points in every step, with what was unreadable in some."""

    def __init__(self, *passes, special=None, problems=None):
        self.passes, self.special, self.problems = passes or ((1.0, 2.0),), special or {}, problems or {}

    def __getitem__(self, step):
        passes = self.special.get(step, self.passes)
        bad = tuple((f"x/{id}", f"{id} is broken") for id in self.problems.get(step, ()))
        return [Points(torch.tensor(points), bad if i == 0 else ()) for i, points in enumerate(passes)]


class Numbered:
    """One pass a step, of which the data index can be told; those of ``bad`` have no finite gradient."""

    def __init__(self, bad=(), high=()):
        self.bad, self.high = bad, high

    def __getitem__(self, index):
        worst = float("inf") if index in self.bad else 1000.0 if index in self.high else 1.0
        return [Points(torch.tensor([worst]), index=index)]


class Heard:
    """What a session warns of: (code, text)."""

    def __init__(self):
        self.said = []

    def __call__(self, code, text, fix):
        assert fix
        self.said.append((code, text))

    @property
    def texts(self):
        return [text for _, text in self.said]

    def codes(self):
        return [code for code, _ in self.said]


def alike(ranks, line=None, shard_ranks=0):
    """A line that is sharded over all ranks, or replicated, so that they learn from one another."""
    line = line or Line()
    fully_shard(line, mesh=ranks.mesh(shard_ranks))
    line.set_gradient_divide_factor(1.0)
    line.set_force_sum_reduction_for_comms(True)
    return line


def run(folder, data=None, *, session=None, learner=None, steps=3, **settings):
    """Train; returns the steps with the weight after each."""
    learner = learner or Line()
    given = {"ranks": ALONE, "folder": Path(folder), "identity": "line", "examples": {"x": 10}}
    given |= session or {}
    found = []
    with closing(train(learner, data or Steps(), training(steps, **settings), Session(**given))) as running:
        for step in running:
            found.append((step, whole(learner.w).sum().item()))
    return found


def whole(weight):
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def saved(folder):
    return sorted(path.name for path in (Path(folder) / "checkpoints").glob("step-*"))
