"""Detection over ranks: what one process computes of the whole batch, also where a rank has no picture.

Tolerance 1e-5: fp32 sums in another order.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from processes import run_on_ranks
from small import MODEL, Given, png, tools
from torch.distributed.tensor import DTensor

from beitctl.api import Example, Object
from beitctl.data.loader import Place, StepData, Stream
from beitctl.engine.dist import start
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.shard import fill, sharded
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.sources.making.scenes import run_lengths
from beitctl_plugins.tasks.detection import Detection

CONFIG = replace(
    MODEL, layers=2, vocabulary=0, text_tokens=0, final_norm=False, mask_token=False, drop_path=0.0,
    image_px=32, patch_px=8,
)  # fmt: skip
TASK = Detection(channels=8, hidden=12, convolutions=1, regions=16, scale_jitter=(0.8, 1.5))
SAMPLES = (5, 1)
"""Samples of a step; of one, the second rank has none."""


def source():
    """Pictures with none, one or two things."""
    examples = []
    for number in range(5):
        things = []
        for k in range(number % 3):
            bits = np.zeros((20, 20), bool)
            bits[2 + 3 * k : 12 + 3 * k, 4:17] = True
            things.append(Object("ab"[k], (4, 2 + 3 * k, 13, 10), run_lengths(bits)))
        examples.append(Example(f"e{number}", png((40 * number, 100, 60)), objects=tuple(things)))
    return Given(examples=tuple(examples))


def one_step(place, shard, total, samples):
    """Sums of losses and shares over all ranks, and gradients, after one step."""
    given = tools(model=CONFIG, labels=("a", "b"))

    def make():
        return MultiwayLearner(Multiway(CONFIG), [Objective("task", TASK)], {"task": given})

    learner = shard(make, lambda name, shape: initial(name, shape, CONFIG, 0)).train()
    stream = Stream("task", TASK, source().open(), samples, given)
    (batch,) = StepData([stream], CONFIG, 0, place)[0]
    sums = learner(batch)
    torch.stack([loss for loss, _ in sums.values()]).sum().backward()
    totals = total([float(value.detach()) for pair in sums.values() for value in pair])
    gradients = {}
    for name, parameter in learner.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        gradients[name] = [float(grad.norm()), *grad.flatten()[:50].tolist()]
    return [list(totals), gradients]


def as_ranks():
    ranks = start()
    place = Place(ranks.rank, ranks.world)
    found = [
        one_step(place, lambda make, value: sharded(make, ranks, "fp32", value), ranks.sum, samples)
        for samples in SAMPLES
    ]
    ranks.stop()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By rank what ``one_step`` gives for every number of samples."""
    return run_on_ranks(tmp_path_factory.mktemp("ranks"), as_ranks, 2)


def whole(samples):
    """The same step on this process alone, unsharded."""

    def filled(make, value):
        learner = make()
        fill(learner, value)
        return learner

    return one_step(Place(), filled, list, samples)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", [0, 1], ids=["five", "one"])
def test_a_step_on_two_ranks_is_that_on_one(found, case, rank):
    totals, gradients = whole(SAMPLES[case])
    step = found[rank][case]
    assert step[0] == pytest.approx(totals, rel=1e-5, abs=1e-6)
    for name, values in gradients.items():
        assert step[1][name] == pytest.approx(values, abs=1e-5, rel=1e-4), name


def test_what_is_compared_is_not_nothing():
    totals, gradients = whole(SAMPLES[0])
    assert all(total > 0 for total in totals[::2])
    assert [name for name, values in gradients.items() if not values[0]] == []
