"""Contrast and matching, sharded: losses, counts and gradients do not depend on the number of processes.

Pairs, their words and their pictures come from all processes, and every block runs several times a step.
Tolerance 1e-5: fp32 sums in another order.
"""

from dataclasses import replace

import pytest
import torch
from processes import run_on_ranks
from small import MODEL, coloured, tools
from torch.distributed.tensor import DTensor

from beitctl.data.loader import Place, StepData, Stream
from beitctl.engine.dist import start
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.shard import fill, sharded
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.contrast import ContrastAndMatch
from beitctl_plugins.tasks.masked import MaskedPair

VLMO = replace(
    MODEL, layers=3, fusion_layers=1, norm="pre", key_bias=False, layer_scale=0.1, text_norm=True,
    position="relative-per-block", token_types=2, mask_token=False, drop_path=0.3,
)  # fmt: skip
PAIRS = coloured("red", "blue", "green", "grey", captions=("a {} square", "{}"))
SAMPLES = 4


def moved(name, shape):
    """Initial weights away from where training begins, so that similarities differ."""
    value = initial(name, shape, VLMO, 0)
    generator = torch.Generator().manual_seed(len(name) + sum(shape))
    return value + 0.3 * torch.randn(value.shape, generator=generator)


def parts():
    objectives = [
        Objective("contrast", ContrastAndMatch()),
        Objective("words", MaskedPair(image_mask_ratio=0.0, text_mask_ratio=0.3)),
    ]
    made = tools(model=VLMO)
    streams = [Stream(o.name, o.task, PAIRS.open(), SAMPLES, made) for o in objectives]
    return objectives, dict.fromkeys(("contrast", "words"), made), streams


def one_step(learner, batch, ranks):
    """Sums of losses and right answers, counts, gradients by name, and how often the model was run."""
    runs, encoded = [], Multiway.encoded
    Multiway.encoded = lambda self, *a, **k: runs.append(1) or encoded(self, *a, **k)
    sums = learner(batch)
    Multiway.encoded = encoded
    counts = ranks.sum(list(learner.counts(batch).values()))
    loss = torch.stack([sums[term][0] / count for term, count in zip(sums, counts, strict=True)]).sum()
    loss.backward()
    totals = ranks.sum([float(x.detach()) for pair in sums.values() for x in pair])
    gradients = {name: whole(p.grad).flatten().tolist() for name, p in learner.named_parameters()}
    return [totals, counts, len(runs), gradients]


def whole(gradient):
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def step_as_ranks():
    ranks = start()
    objectives, given, streams = parts()
    learner = sharded(lambda: MultiwayLearner(Multiway(VLMO), objectives, given), ranks, "fp32", moved)
    (batch,) = StepData(streams, VLMO, 0, Place(ranks.rank, ranks.world))[0]
    found = one_step(learner, batch, ranks)
    ranks.stop()
    return found


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The same step without sharding, on one process, and on two."""
    objectives, given, streams = parts()
    learner = MultiwayLearner(Multiway(VLMO), objectives, given)
    fill(learner, moved)
    (batch,) = StepData(streams, VLMO, 0, Place())[0]
    plain = one_step(learner, batch, start())
    sharded = [run_on_ranks(tmp_path_factory.mktemp("ranks"), step_as_ranks, world) for world in (1, 2)]
    return {"plain": [plain], "one": sharded[0], "two": sharded[1]}


CASES = [("one", 0), ("two", 0), ("two", 1)]


@pytest.mark.parametrize(("world", "rank"), CASES)
def test_losses_and_right_answers_are_those_of_one_unsharded_process(steps, world, rank):
    assert steps[world][rank][0] == pytest.approx(steps["plain"][0][0], rel=1e-5)


@pytest.mark.parametrize(("world", "rank"), CASES)
def test_counts_are_those_of_all_samples(steps, world, rank):
    assert steps[world][rank][1] == steps["plain"][0][1]
    assert steps["plain"][0][1][:2] == [SAMPLES, SAMPLES]


@pytest.mark.parametrize(("world", "rank"), CASES)
def test_gradients_are_those_of_one_unsharded_process(steps, world, rank):
    wanted = steps["plain"][0][3]
    found = steps[world][rank][3]
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert gradient == pytest.approx(wanted[name], abs=1e-5), name


@pytest.mark.parametrize(("world", "rank"), CASES)
def test_the_model_is_run_once_for_all_and_once_for_matching(steps, world, rank):
    assert steps[world][rank][2] == 2


def test_no_gradient_is_zero(steps):
    """What is compared above says something."""
    zero = [name for name, gradient in steps["plain"][0][3].items() if not any(gradient)]
    assert zero == []
