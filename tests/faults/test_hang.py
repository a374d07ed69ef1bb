"""A process that hangs ends by itself, and says where it was."""

import sys
import time
from pathlib import Path

import pytest
from processes import ended, in_a_child

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Line, run, saved


class Stuck(Line):
    """Waits for ever in its third step, as for a rank that is gone."""

    steps = 0

    def forward(self, batch):
        self.steps += 1
        if self.steps == 3:
            waiting_for_a_rank_that_is_gone()
        return super().forward(batch)


def waiting_for_a_rank_that_is_gone():
    time.sleep(600)


def training(folder, minutes):
    run(folder, learner=Stuck(), steps=5, save_every_steps=1, hang_minutes=minutes)


def test_a_hang_ends_with_75_and_the_stacks(tmp_path, capfd):
    begun = time.monotonic()
    assert ended(in_a_child(lambda: training(tmp_path, 0.02))) == 75
    assert time.monotonic() - begun < 60
    assert "waiting_for_a_rank_that_is_gone" in (tmp_path / "stacks-rank-0.txt").read_text()
    assert "rank 0: no step in 0.02 minutes (train.hang_minutes)" in capfd.readouterr().err


def test_what_was_saved_before_a_hang_is_gone_on_with(tmp_path):
    ended(in_a_child(lambda: training(tmp_path, 0.02)))
    assert saved(tmp_path)[-1] == "step-00000002"
    assert [step.number for step, _ in run(tmp_path, steps=5)] == [3, 4, 5]


@pytest.mark.parametrize("minutes", [0, 30])
def test_a_run_that_gets_on_is_left_alone(tmp_path, minutes):
    assert len(run(tmp_path, steps=5, hang_minutes=minutes)) == 5
