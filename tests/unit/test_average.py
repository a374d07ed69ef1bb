"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from beitctl.engine.average import Average
from beitctl.engine.dist import start
from beitctl.engine.shard import full_weights, sharded


def moved(module, decay, steps=3):
    """The average after some steps that add 1 to every weight."""
    average = Average(module, decay)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
        average.update(step)
    return average


def expected(decay, steps=3):
    """The same of a weight that begins with 0, by definition."""
    weight = found = 0.0
    for updates in range(steps):
        weight += 1
        now = min(decay, (1 + updates) / (10 + updates))
        found = now * found + (1 - now) * weight
    return found


def zeros(name, shape):
    return torch.zeros(shape)


def averaged_as_ranks():
    ranks = start()
    module = sharded(lambda: nn.Linear(5, 3), ranks, "fp32", zeros)
    moved(module, 0.75).give()
    found = {name: value.flatten().tolist() for name, value in full_weights(module).items()}
    ranks.stop()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_shards_are_averaged_as_the_whole_is(on_ranks, world):
    for found in on_ranks(averaged_as_ranks, world):
        assert found["weight"] == pytest.approx([expected(0.75)] * 15)
        assert found["bias"] == pytest.approx([expected(0.75)] * 3)


def test_the_weights_stay_until_the_average_is_given():
    module = nn.Linear(2, 2)
    nn.init.zeros_(module.weight)
    average = moved(module, 0.5)
    assert module.weight.unique().tolist() == [3]
    average.give()
    assert module.weight.unique().tolist() == pytest.approx([expected(0.5)])


def test_after_a_while_the_decay_is_that_of_the_settings():
    average = moved(nn.Linear(1, 1, bias=False), 0.2, steps=9)
    before = average.averages["weight"].item()
    weight = average.weights["weight"].item()
    average.update(10)
    assert average.averages["weight"].item() == pytest.approx(0.2 * before + 0.8 * weight)


def test_frozen_parameters_have_no_average():
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert list(Average(module, 0.9).tensors()) == ["average.weight"]


def test_without_a_decay_there_is_no_average_and_the_weights_are_left():
    module = nn.Linear(2, 2)
    average = moved(module, 0.0)
    before = module.weight.detach().clone()
    average.give()
    assert average.tensors() == {}
    assert torch.equal(module.weight, before)
