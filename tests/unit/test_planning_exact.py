"""``beitctl plan --exact``: memory counted tensor by tensor, next to the estimate in closed form."""

import subprocess

import pytest
from planned import place, plan, told  # noqa: F401 - the fixture works by being here

from beitctl.planning import exact, text

pytestmark = pytest.mark.slow
STATES = ("master_weights", "moments", "gradients")
ASKED = ("--recipe", "beit3-base", "--gpus", "8", "--exact")
SMALL = [
    *("model.layers=2", "train.micro_samples=96", 'train.compile="off"'),
    *(f"objectives.{name}.samples=512" for name in ("image", "text", "pair")),
]


PLANS = []
"""The plan of a BEiT-3 of two blocks on eight GPUs, once it is made."""


@pytest.fixture
def found(capsys):
    if not PLANS:
        asked = [word for setting in SMALL for word in ("--set", f"pretrain.{setting}")]
        PLANS.append(told(capsys, *ASKED, *asked))
    return PLANS[0]


def test_weights_moments_and_gradients_are_those_of_the_estimate(found):
    for name in STATES:
        assert found["exact"]["states"][name] == pytest.approx(found["memory"][name], rel=0.02), name


def test_the_estimate_lies_above_what_is_counted_but_not_far(found):
    estimate = found["memory"]["total"]["eager"] - found["memory"]["reserve"]
    assert found["exact"]["total"] < estimate < 1.6 * found["exact"]["total"]


def test_the_count_is_that_of_one_pass_of_several(found):
    assert found["step"]["passes"] == 2
    assert found["exact"]["micro_samples"] == found["step"]["micro_samples"]
    assert found["exact"]["peak"]["gradients"] > 0


def test_the_tables_show_the_count_next_to_the_estimate(found):
    shown = text.text(found)
    assert "memory of a GPU, counted (uncompiled blocks, fake tensors" in shown
    assert "all at the peak" in shown


def test_a_task_that_needs_data_is_told_and_the_plan_stands(capsys):
    asked = ("--recipe", "vlmo-base", "--only", "pairs", "--gpus", "8", "--exact")
    assert "needs data" in told(capsys, *asked)["exact"]["problem"]


def test_a_count_that_takes_too_long_is_told(capsys, monkeypatch):
    def late(*args, **kwargs):
        raise subprocess.TimeoutExpired("python", kwargs["timeout"])

    monkeypatch.setattr(exact.subprocess, "run", late)
    code, out, _ = plan(capsys, *ASKED)
    assert code == 0
    assert "not counted: no answer within 300 s" in out
