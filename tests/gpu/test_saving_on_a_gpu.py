"""Checkpoints of a training on a GPU: what they hold, and what a resumed run ends with."""

import pytest
import torch
from mixed import MODELS
from on_device import equal, saved_while_training, trained, wide

pytestmark = pytest.mark.gpu


@pytest.fixture
def deterministic():
    """Only algorithms that give the same bits every time."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_is_not(gpu, name, tmp_path):
    straight = trained(gpu, wide(name), tmp_path / "a", None)
    resumed = trained(gpu, wide(name), tmp_path / "b", 4)
    assert (tmp_path / "b" / "checkpoints" / "step-00000004").exists()
    assert equal(straight, resumed)


def test_a_background_save_holds_the_state_of_its_begin(gpu, tmp_path):
    before, loaded, after = saved_while_training(gpu, wide("paper"), tmp_path)
    assert equal(before, loaded)
    assert not equal(before, after)
