"""Fault 13: a step that does not fit into memory ends the run with what would make it fit."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Line, Steps, run, saved

from beitctl.errors import CapacityError

pytestmark = pytest.mark.fault(13)


class Big(Line):
    """Runs out of memory in its third step."""

    calls = 0

    def forward(self, batch):
        self.calls += 1
        if self.calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(batch)


def test_it_says_what_did_not_fit_and_what_to_change(tmp_path):
    hint = {"memory_hint": lambda: "The plan says 79 GiB"}
    with pytest.raises(CapacityError) as caught:
        run(tmp_path, Steps((1.0, 2.0)), learner=Big(), steps=5, save_every_steps=1, session=hint)
    assert caught.value.exit_code == 5
    assert str(caught.value) == (
        "step 3: rank 0 ran out of memory on cpu (host memory) with 2 samples in 1 passes. The plan says "
        "79 GiB. To make it fit: lower micro_samples (no limit), lower memory_budget (1; for compiled "
        "blocks), set recompute (false), or raise shard_ranks (the ranks of one machine)"
    )


def test_it_is_not_tried_again_and_earlier_checkpoints_stay(tmp_path):
    learner = Big()
    with pytest.raises(CapacityError):
        run(tmp_path, learner=learner, steps=5, save_every_steps=1)
    assert learner.calls == 3
    assert saved(tmp_path) == ["step-00000001", "step-00000002"]
    assert [step.number for step, _ in run(tmp_path, steps=5)] == [3, 4, 5]
