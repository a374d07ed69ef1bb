"""Fault 14: replicas that no longer agree are found out at the next step that is logged."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Heard, alike, run

from beitctl.engine import optim
from beitctl.engine.dist import start
from beitctl.engine.guarding import replicas
from beitctl.errors import DivergedError

pytestmark = pytest.mark.fault(14)


def perturbed_as_ranks(folder, what):
    """Two replicas; something of rank 1 changes by a hundred-thousandth in step 3."""
    ranks = start()
    learner = alike(ranks, shard_ranks=1)
    if ranks.rank == 1 and what == "weight":
        learner.after_step = lambda: perturb(learner)
    if ranks.rank == 1 and what == "gradient":
        clip = optim.clip
        optim.clip = lambda module, limit: clip(module, limit) * (1 + 1e-5)
    try:
        found = run(
            folder, steps=8, log_every_steps=4, session={"ranks": ranks, "warn": Heard()}, learner=learner
        )
        return len(found)
    except DivergedError as error:
        return str(error)
    finally:
        ranks.stop()


def perturb(learner):
    learner.steps = getattr(learner, "steps", 0) + 1
    if learner.steps == 3:
        with torch.no_grad():
            learner.w.to_local().mul_(1 + 1e-5)


def test_replicas_that_agree_go_on(on_ranks, tmp_path):
    assert on_ranks(perturbed_as_ranks, 2, tmp_path, "nothing") == [8, 8]


def test_weights_that_differ_end_the_run_on_all_ranks(on_ranks, tmp_path):
    first, second = on_ranks(perturbed_as_ranks, 2, tmp_path, "weight")
    assert first == second
    assert first.startswith(
        "step 4: the norm of the weights should be one number, but it differs between ranks"
    )
    assert "rank 0: " in first
    assert "rank 1: " in first


def test_gradients_that_differ_end_the_run_on_all_ranks(on_ranks, tmp_path):
    first, second = on_ranks(perturbed_as_ranks, 2, tmp_path, "gradient")
    assert first == second
    assert first.startswith("step 1: the gradient norm should be one number")


def test_of_several_ranks_the_one_that_differs_is_named():
    seen = [{"gradient norm": value} for value in (2.0, 2.0, 2.1, 2.0)]
    with pytest.raises(
        DivergedError, match=r"\(rank 2: 2\.1; the others: 2\): their weights no longer agree"
    ):
        replicas.check_same(7, seen)


def test_a_rank_whose_number_is_not_finite_differs():
    with pytest.raises(DivergedError, match=r"\(rank 1: nan; the others: 1\)"):
        replicas.check_same(7, [{"gradient norm": value} for value in (1.0, float("nan"), 1.0)])


def test_rounding_is_no_difference():
    replicas.check_same(7, [{"gradient norm": 1.0}, {"gradient norm": 1.0 + 1e-7}])
