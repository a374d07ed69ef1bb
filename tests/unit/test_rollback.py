"""Data after a rollback: those of another step, with what depends on the step itself as it is."""

from small import Given, png

from beitctl.api import Example
from beitctl.config import ModelConfig
from beitctl.data.loader import Place
from beitctl.engine.guarding.rollback import Shifted
from beitctl_plugins.tokenizers.dvae_learner import Schedule, ShotSteps
from beitctl_plugins.tokenizers.views import Crops, streams_of


def test_data_are_those_of_a_later_step():
    assert [Shifted(range(10, 99), 3)[step] for step in (0, 1)] == [13, 14]


def test_a_temperature_stays_that_of_its_step():
    examples = tuple(Example(str(number), png((number, 0, 0))) for number in range(12))
    view = ModelConfig(layers=1, width=1, heads=1, ffn=1, image_px=8, patch_px=4)
    streams = streams_of([Given(examples=examples)], 2, Crops((0.5, 1.0), (8,)), view)
    data = ShotSteps(streams, Schedule(1.0, 0.1, 20, 10, 5), 0, Place())
    (shifted,), (own,), (later,) = Shifted(data, 3)[5], data[5], data[8]
    assert shifted.samples == later.samples != own.samples
    assert shifted.keys.equal(later.keys)
    assert (shifted.temperature, shifted.warm, shifted.opens) == (own.temperature, own.warm, own.opens)
