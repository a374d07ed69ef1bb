"""Presets of VQ-KD: what they set, and that nothing is set without a word."""

import pytest
from pydantic import ValidationError

from beitctl.api import Plugin
from beitctl_plugins.tokenizers.vqkd import VQKD


class Nobody(Plugin):
    """A teacher that is never asked."""

    def open(self, grid):
        raise AssertionError


def made(**table):
    return VQKD.model_validate(
        {"teacher": Nobody(), "train": {"steps": 90, "optim": {"peak_lr": 1e-3}}, **table}
    )


def test_small_sleeps_for_a_third_of_the_steps_and_revives_early():
    found = made(preset="small")
    assert (found.start_after, found.revive_after, found.centre) == (30, 10, True)


def test_a_setting_of_ones_own_goes_before_the_preset():
    found = made(preset="small", start_after=7, centre=False)
    assert (found.start_after, found.centre, found.revive_after) == (7, False, 10)


def test_official_switches_everything_off():
    found = made(preset="official")
    assert (found.start, found.revive_after, found.start_after) == ("random", 0, 0)
    assert (found.entropy, found.centre, found.min_used_share) == (0, False, 0)


def test_official_admits_no_other_setting():
    with pytest.raises(ValidationError, match=r'"official" means revive_after = 0, centre = false; remove'):
        made(preset="official", revive_after=20, centre=True)


def test_what_official_means_may_be_said():
    assert made(preset="official", revive_after=0).preset == "official"


@pytest.mark.parametrize("preset", ["alive", "small", "official"])
def test_what_is_written_down_reads_back_the_same(preset):
    found = made(preset=preset)
    table = {k: v for k, v in found.model_dump(by_alias=True).items() if k != "teacher"}
    assert VQKD.model_validate({**table, "teacher": Nobody()}).model_dump() == found.model_dump()


def test_an_average_of_the_weights_is_refused():
    with pytest.raises(
        ValidationError, match=r"train.ema_decay \(0.9\) must be 0: codes belong to the encoder"
    ):
        made(train={"steps": 20, "optim": {"peak_lr": 1e-3}, "ema_decay": 0.9})


def test_an_unknown_preset_is_named():
    with pytest.raises(ValidationError, match="preset"):
        made(preset="tiny")
