"""Batch norm and segmentation over ranks: what one process computes of the whole batch, shares of any size.

Tolerance 1e-5: fp32 sums in another order.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import run_on_ranks
from small import MODEL, Given, png, tools
from torch.distributed.tensor import DTensor

from beitctl.api import Example
from beitctl.data.loader import Place, StepData, Stream
from beitctl.engine.dist import start
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.shard import fill, sharded
from beitctl.model.dense import SyncedBatchNorm
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.dense_views import Numbers
from beitctl_plugins.tasks.segment_scores import as_png
from beitctl_plugins.tasks.segmentation import Segmentation

CHANNELS, SAMPLES = 4, 6
CONFIG = replace(
    MODEL, layers=2, vocabulary=0, text_tokens=0, final_norm=False, mask_token=False, drop_path=0.0
)
PARTS = {"even": [3, 3], "none on one": [6, 0], "uneven": [1, 5]}
TASK = Segmentation(background=True)


def norm_on(parts):
    """Outputs, gradients and statistics of this rank's samples, after one step on random numbers."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, CHANNELS, 3, 5, generator=generator) * 3 + 1
    wanted = torch.randn(SAMPLES, CHANNELS, 3, 5, generator=generator)
    norm = SyncedBatchNorm(CHANNELS)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
        norm.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    rank = dist.get_rank() if dist.is_initialized() else 0
    first = sum(parts[:rank])
    mine = slice(first, first + parts[rank])
    own = x[mine].clone().requires_grad_(True)
    y = norm(own)
    (y.tanh() * wanted[mine]).sum().backward()
    found = {
        "y": y.detach(), "x": own.grad, "weight": norm.weight.grad, "bias": norm.bias.grad,
        **dict(norm.named_buffers()),
    }  # fmt: skip
    return {name: value.tolist() for name, value in found.items()}


def source():
    """Six pictures whose classes lie in stripes."""
    examples = []
    for number in range(SAMPLES):
        classes = (np.arange(20)[:, None] // (4 + number) + np.arange(20) // 7) % 3
        mask = as_png(classes.astype(np.int16), Numbers(3, True, -1))
        examples.append(Example(f"e{number}", png((40 * number, 100, 200 - 30 * number)), segmentation=mask))
    return Given(examples=tuple(examples))


def learner_and_batch(place, shard):
    """The learner, made by ``shard`` from what builds it and its initial values, and this rank's batch."""
    given = tools(model=CONFIG, labels=("background", "one", "two"))

    def make():
        return MultiwayLearner(Multiway(CONFIG), [Objective("task", TASK)], {"task": given})

    learner = shard(make, lambda name, shape: initial(name, shape, CONFIG, 0)).train()
    stream = Stream("task", TASK, source().open(), SAMPLES, given)
    (batch,) = StepData([stream], CONFIG, 0, place)[0]
    return learner, batch


def one_step(learner, batch, total):
    """Sums of losses and shares over all ranks, gradients and buffers after one step."""
    sums = learner(batch)
    torch.stack([loss for loss, _ in sums.values()]).sum().backward()
    totals = total([float(value.detach()) for pair in sums.values() for value in pair])
    gradients = {}
    for name, parameter in learner.named_parameters():
        grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        gradients[name] = [float(grad.norm()), *grad.flatten()[:50].tolist()]
    buffers = {name: value.flatten().tolist() for name, value in learner.named_buffers()}
    return [totals, gradients, buffers]


def as_ranks():
    ranks = start()
    norms = [norm_on(parts) for parts in PARTS.values()]
    place = Place(ranks.rank, ranks.world)
    learner, batch = learner_and_batch(place, lambda make, value: sharded(make, ranks, "fp32", value))
    step = one_step(learner, batch, ranks.sum)
    ranks.stop()
    return [norms, step]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By rank what ``norm_on`` gives for every way to share out the samples, and a step of segmentation."""
    return run_on_ranks(tmp_path_factory.mktemp("ranks"), as_ranks, 2)


@pytest.fixture(scope="module")
def whole():
    """The same step of segmentation on this process alone, unsharded."""

    def filled(make, value):
        learner = make()
        fill(learner, value)
        return learner

    return one_step(*learner_and_batch(Place(), filled), list)


@pytest.mark.parametrize("case", range(3), ids=PARTS)
def test_a_norm_over_ranks_is_that_of_the_whole_batch(found, case):
    parts, expected = [norms[case] for norms, _ in found], norm_on([SAMPLES])
    for name in ("y", "x"):
        joined = torch.tensor([row for one in parts for row in one[name]])
        assert torch.allclose(joined, torch.tensor(expected[name]), atol=1e-5), name
    for name in ("weight", "bias"):
        total = sum(torch.tensor(one[name]) for one in parts)
        assert torch.allclose(total, torch.tensor(expected[name]), atol=1e-5), name
    for one in parts:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.allclose(torch.tensor(one[name]), torch.tensor(expected[name]), atol=1e-5), name


@pytest.mark.parametrize("rank", [0, 1])
def test_segmentation_on_two_ranks_is_that_on_one(found, whole, rank):
    totals, gradients, buffers = whole
    step = found[rank][1]
    assert step[0] == pytest.approx(totals, rel=1e-5)
    for name, values in gradients.items():
        assert step[1][name] == pytest.approx(values, abs=1e-5, rel=1e-4), name
    for name, values in buffers.items():
        assert step[2][name] == pytest.approx(values, abs=1e-5), name


def test_what_is_compared_is_not_nothing(whole):
    totals, gradients, buffers = whole
    assert all(total > 0 for total in totals[::2])
    assert [name for name, values in gradients.items() if not values[0]] == []
    moved = [any(values) for name, values in buffers.items() if name.endswith("running_mean")]
    assert len(moved) == 14
    assert all(moved)
