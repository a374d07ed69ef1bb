"""Replicas add up their gradients once a step, however many passes it has; and what cannot be sharded."""

import pytest
import torch
import torch.distributed as dist
from mixed import PAPER, batch, learner, settings, worst
from torch import nn

from beitctl.engine import shard
from beitctl.engine.dist import start
from beitctl.engine.shard import last_pass, sharded


def gradients(module, micro, tell):
    """Whole gradients of a step, and how often ranks added up theirs over the groups."""
    calls, real = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]
    try:
        for number, one in enumerate(micro, 1):
            if tell:
                last_pass(module, number == len(micro))
            torch.stack([loss for loss, _ in module(one).values()]).sum().backward()
    finally:
        dist.all_reduce = real
    found = {name: value.grad.full_tensor() for name, value in module.named_parameters()}
    module.zero_grad()
    return found, len(calls)


def as_replicas(folder):
    """Two steps of three passes on two ranks, each with a copy of its own."""
    ranks, found = start(), []
    module = learner(PAPER, ranks, settings(precision="fp32", shard_ranks=1))
    for step in range(2):
        first = 6 * step + 3 * ranks.rank
        micro = [
            batch({"image": [n], "text": [n], "pair": [n, n + 100]}, PAPER) for n in range(first, first + 3)
        ]
        expected, usual = gradients(module, micro, tell=False)
        got, calls = gradients(module, micro, tell=True)
        found.append({"error": worst(got, expected), "calls": calls, "usual": usual})
    ranks.stop()
    return found


def test_replicas_add_up_once_a_step_and_have_the_same_gradients(on_ranks, tmp_path):
    units = PAPER.layers + 1
    for steps in on_ranks(as_replicas, 2, tmp_path):
        for found in steps:
            assert found["error"] < 1e-6
            assert (found["calls"], found["usual"]) == (units, 3 * units)


def test_a_module_that_is_not_sharded_needs_not_be_told():
    last_pass(nn.Linear(2, 2), True)


def ones(name, shape):
    return torch.ones(shape)


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(()))


def test_a_parameter_without_a_dimension_is_refused_with_what_to_do():
    message = r"parameter inner.scale is 0-D, which FSDP2 cannot shard; give it the shape \(1,\)"
    with pytest.raises(ValueError, match=message):
        sharded(lambda: nn.ModuleDict({"inner": Temperature()}), start(), "fp32", ones)


def test_a_buffer_that_nothing_fills_is_refused_with_what_to_do():
    message = r"nothing gives running_mean, .* a value: BatchNorm1d needs a method reset_buffers\(\)"
    with pytest.raises(ValueError, match=message):
        sharded(lambda: nn.BatchNorm1d(3), start(), "fp32", ones)


def test_no_parameter_keeps_what_lay_in_memory(monkeypatch):
    real = nn.Module.to_empty

    def poisoned(module, **place):
        real(module, **place)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(float("nan"))

    monkeypatch.setattr(nn.Module, "to_empty", poisoned)
    found = shard.full_weights(learner(PAPER, start(), settings()))
    assert [name for name, value in found.items() if not value.isfinite().all()] == []
