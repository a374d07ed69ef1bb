"""Fault 10: a run that is resumed on another number of ranks sees the same samples and learns the same."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Heard, Line, Points, alike, run, whole

from beitctl.data.order import share
from beitctl.engine.dist import start
from beitctl.errors import Stopped

pytestmark = pytest.mark.fault(10)


class Polynomial(Line):
    """y = w1 x + ... + w5 x^5 with 2 x as its target."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(5))

    def forward(self, batch):
        powers = torch.stack([batch.x**k for k in range(1, 6)])
        error = (self.w[:, None] * powers).sum(0) - 2 * batch.x
        zero = 0 * self.w.sum()
        return {"fit": ((error**2).sum(), (error.abs() < 1).sum()), "never": (zero, zero.detach())}


class Shared:
    """Ten points a step, shared out over the ranks; asks for a stop at a step."""

    def __init__(self, ranks, stop):
        self.ranks, self.stop = ranks, stop

    def __getitem__(self, step):
        if step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.rand(10, generator=torch.Generator().manual_seed(step))
        mine = share(10, self.ranks.world, self.ranks.rank)
        return [Points(x[mine.start : mine.stop])]


def trained(folder, stop):
    """Samples of every step, and the weights at the end or at a stop."""
    ranks, told = start(), []
    learner = alike(ranks, Polynomial())
    session = {"ranks": ranks, "warn": Heard(), "sampled": lambda step, ids: told.append([step, ids])}
    try:
        run(folder, Shared(ranks, stop), steps=12, session=session, learner=learner, log_samples=True)
    except Stopped:
        assert stop > 0
    found = whole(learner.w).tolist()
    ranks.stop()
    return told, found


def test_one_then_two_then_four_ranks_equal_one(on_ranks, tmp_path):
    ((samples, weights),) = on_ranks(trained, 1, tmp_path / "whole", -1)
    told = []
    for world, stop in ((1, 4), (2, 8), (4, -1)):
        parts = on_ranks(trained, world, tmp_path / "cut", stop)
        told += parts[0][0]
        assert all(part == parts[0] for part in parts)
    assert told == samples
    assert parts[0][1] == pytest.approx(weights, rel=1e-6, abs=1e-6)
