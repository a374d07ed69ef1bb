"""Gradients do not depend on how many ranks share a step, in how many passes, and who holds what."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from mixed import MODELS, batch, build, gradients, learner, settings, whole, worst
from processes import run_on_ranks

from beitctl.config import OptimConfig
from beitctl.engine.dist import Ranks, start
from beitctl.engine.shard import fill
from beitctl.model.init import initial

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
EIGHTHS = {
    "image": (2, 1, 1, 0, 0, 0, 1, 2),
    "text": (0, 0, 2, 0, 0, 0, 1, 2),
    "pair": (0, 0, 0, 0, 2, 1, 1, 2),
}
"""Samples in every eighth of a step: some without text, some without a pair, some without a picture alone,
one with nothing. Four ranks in one pass get two neighbours each, in two passes the first four, then the
others."""
LAYOUTS = {1: (1,), 2: (2,), 4: (4, 2)}
"""World size to the ranks that share one copy: 2 of 4 is HSDP 2 x 2."""
CLIP = 0.05
"""Below the norm of the gradients."""


def share(rank, world, passes, model):
    """This rank's passes of the step."""
    size = 8 // (world * passes)
    found = []
    for number in range(passes):
        first = (number * world + rank) * size
        numbers = {
            name: range(sum(counts[:first]), sum(counts[: first + size])) for name, counts in EIGHTHS.items()
        }
        found.append(batch(numbers, model))
    return found


def gradients_as_ranks(folder):
    """By case: errors of the gradients against one unsharded process, and the norms."""
    ranks, found = start(), {}
    for name, model in MODELS.items():
        for precision, shard_ranks in itertools.product(("fp32", "bf16"), LAYOUTS[ranks.world]):
            config = settings(precision=precision, shard_ranks=shard_ranks)
            right = gradients(plain(model, precision), share(0, 1, 1, model), config, ALONE, Path(folder))
            module = learner(model, ranks, config)
            for passes in (1, 2) if precision == "fp32" else (2,):
                micro = share(ranks.rank, ranks.world, passes, model)
                got = gradients(module, micro, config, ranks, Path(folder))
                found[f"{name} {precision} {shard_ranks} {passes}"] = compared(got, right)
            if precision == "fp32":
                config = dataclasses.replace(config, optim=OptimConfig(peak_lr=1e-3, clip_norm=CLIP))
                got, norm, _ = gradients(module, micro, config, ranks, Path(folder))
                after = torch.cat([value.flatten() for value in got.values()]).norm()
                found[f"{name} clipped {shard_ranks}"] = {"before": norm, "after": float(after)}
    ranks.stop()
    return found


def compared(found, right):
    """Errors of gradients, of their norm and of the losses."""
    return {
        "worst": worst(found[0], right[0]),
        "whole": whole(found[0], right[0]),
        "norm": found[1] / right[1],
        "loss": max(abs(found[2][term] / value - 1) for term, value in right[2].items()),
    }


def plain(model, precision):
    """The learner on one process without FSDP, in the compute type from end to end."""
    module = build(model)
    fill(module, lambda name, shape: initial(name, shape, model, 0))
    return module if precision == "fp32" else module.bfloat16()


@pytest.fixture(scope="module", params=LAYOUTS)
def on_each_rank(request, tmp_path_factory):
    """What every rank of a world found."""
    folder = tmp_path_factory.mktemp(f"world-{request.param}")
    return run_on_ranks(folder / "ranks", gradients_as_ranks, request.param, folder)


def cases(found, *words):
    chosen = {case: errors for case, errors in found.items() if set(words) <= set(case.split())}
    assert chosen
    return chosen.items()


def test_fp32_gradients_are_those_of_one_process(on_each_rank):
    for found in on_each_rank:
        for case, errors in cases(found, "fp32"):
            assert errors["worst"] < 1e-5, case


def test_bf16_gradients_are_those_of_one_process_but_for_rounding(on_each_rank):
    for found in on_each_rank:
        for case, errors in cases(found, "bf16"):
            assert errors["whole"] < 1e-2, case


def test_losses_are_those_of_one_process(on_each_rank):
    for found in on_each_rank:
        for case, errors in cases(found, "fp32"):
            assert errors["loss"] < 1e-5, case


def test_every_rank_sees_the_norm_of_all_gradients(on_each_rank):
    for found in on_each_rank:
        for case, errors in cases(found, "fp32"):
            assert errors["norm"] == pytest.approx(1, rel=1e-5), case


def test_clipped_gradients_have_the_largest_norm_that_is_allowed_on_every_rank(on_each_rank):
    for found in on_each_rank:
        for case, norms in cases(found, "clipped"):
            assert norms["before"] > 2 * CLIP, case
            assert norms["after"] == pytest.approx(CLIP, rel=1e-3), case
