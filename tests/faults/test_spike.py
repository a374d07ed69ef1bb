"""Fault 6: a gradient that is finite, but far above its usual range."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Heard, Numbered, run

from beitctl.config import OptimConfig
from beitctl.errors import DivergedError

pytestmark = pytest.mark.fault(6)


def trained(folder, high, **settings):
    heard = Heard()
    optim = OptimConfig(peak_lr=1e-4, clip_norm=1.0)
    settings = {"optim": optim, "log_every_steps": 10, "save_every_steps": 20} | settings
    found = run(folder, Numbered(high=high), steps=100, session={"warn": heard}, **settings)
    return [step.number for step, _ in found], heard


def test_a_spike_is_a_warning_that_names_step_and_size(tmp_path):
    numbers, heard = trained(tmp_path, (65,))
    assert numbers == list(range(1, 101))
    ((code, text),) = heard.said
    assert code == "W304"
    assert text.startswith("gradient norm 1.9")
    assert "e+06 at step 66, usual are 1.9" in text


def test_a_second_spike_soon_after_is_not_warned_of_again(tmp_path):
    assert len(trained(tmp_path, (65, 75, 85))[1].said) == 1


def test_a_spike_goes_back_and_past_the_data_if_the_settings_say_so(tmp_path):
    numbers, heard = trained(tmp_path, (65,), on_spike="rollback")
    assert numbers == [*range(1, 70), *range(61, 101)]
    assert heard.codes() == ["W306", "W305"]


def test_spikes_are_left_alone_if_the_settings_say_so(tmp_path):
    numbers, heard = trained(tmp_path, (65,), on_spike="off")
    assert (numbers, heard.said) == (list(range(1, 101)), [])


def test_too_few_steps_show_no_spike(tmp_path):
    assert trained(tmp_path, (45,))[1].said == []


def test_a_run_with_no_checkpoint_to_go_back_to_ends(tmp_path):
    with pytest.raises(DivergedError, match=r"^gradient norm .* There is no checkpoint of this run"):
        trained(tmp_path, (65,), on_spike="rollback", save_every_steps=1000)
