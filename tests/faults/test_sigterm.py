"""Fault 11: SIGTERM in the middle of a step ends the step, saves, and leaves; the run goes on bit for bit."""

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Line, run, saved

from beitctl.errors import Interrupted, Stopped

pytestmark = pytest.mark.fault(11)


class Asked(Line):
    """Gets a signal during the forward pass of its fifth step."""

    def __init__(self, number):
        super().__init__()
        self.number, self.calls = number, 0

    def forward(self, batch):
        self.calls += 1
        if self.calls == 5:
            os.kill(os.getpid(), self.number)
        return super().forward(batch)


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [(signal.SIGTERM, Stopped, 75), (signal.SIGUSR1, Stopped, 75), (signal.SIGINT, Interrupted, 130)],
)
@pytest.mark.parametrize("in_background", [True, False])
def test_the_step_is_ended_and_the_run_goes_on_bit_for_bit(tmp_path, number, error, code, in_background):
    whole = run(tmp_path / "a", steps=9)
    settings = {"steps": 9, "save_every_steps": 2, "async_save": in_background}
    with pytest.raises(error, match="stopped at step 5, saved") as caught:
        run(tmp_path / "b", learner=Asked(number), **settings)
    assert caught.value.exit_code == code
    assert saved(tmp_path / "b")[-1] == "step-00000005"
    rest = run(tmp_path / "b", **settings)
    assert [(step.number, w) for step, w in rest] == [(step.number, w) for step, w in whole[5:]]
