"""The smallest thing that the loop can train: a line through the origin, and its data."""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from small import ALONE, training
from torch import nn

from beitctl.engine.loop import Session, train


@dataclass(frozen=True)
class Points:
    """One forward pass: (n,) places x; y is 2 x."""

    x: torch.Tensor
    problems: tuple = ()

    @property
    def samples(self):
        return tuple(map(str, self.x.tolist()))

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


def run(folder, data=None, *, session=None, learner=None, steps=3, **settings):
    """Train; returns the steps with the weight after each."""
    learner = learner or Line()
    given = {"ranks": ALONE, "folder": Path(folder), "identity": "line", "examples": {"x": 10}}
    given |= session or {}
    found = []
    with closing(train(learner, data or Steps(), training(steps, **settings), Session(**given))) as running:
        for step in running:
            found.append((step, learner.w.item()))
    return found


def saved(folder):
    return sorted(path.name for path in (Path(folder) / "checkpoints").glob("step-*"))
