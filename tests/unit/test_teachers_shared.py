"""What all teachers share: tokens to a grid, normalisation, resampling, and what is refused."""

import pytest
import torch

from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.teachers.features import Features, Sight, needed, on_grid


def test_class_and_register_tokens_are_dropped():
    tokens = torch.arange(6.0).view(1, 6, 1)
    assert on_grid(tokens, 2, "mine").flatten().tolist() == [2, 3, 4, 5]


def test_tokens_that_fill_no_square_are_refused():
    with pytest.raises(UserError, match=r"mine: its 7 tokens with 1 class or register tokens .* no square"):
        on_grid(torch.zeros(1, 7, 4), 1, "mine")


def test_tokens_that_do_not_fill_the_models_own_grid_are_refused():
    with pytest.raises(UserError, match=r"mine: its 5 tokens with 1 .* fill no grid of 3 x 3"):
        on_grid(torch.zeros(1, 5, 4), 1, "mine", (3, 3))


def test_a_teacher_without_any_patch_is_refused():
    with pytest.raises(UserError, match=r"mine: its 1 tokens with 1 class"):
        on_grid(torch.zeros(1, 1, 4), 1, "mine")


def read_by(read, grid=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    return Features(torch.nn.Identity(), read, Sight("mine", 8, mean, std), grid)


def pooled(side):
    return lambda network, x: torch.nn.functional.adaptive_avg_pool2d(x, side)


def test_features_are_resampled_to_a_finer_grid_as_bilinear_interpolation_says():
    ramp = torch.linspace(0, 1, 8).view(1, 1, 1, 8).expand(1, 3, 8, 8)
    found = read_by(pooled(2), 4)(ramp)[0, :4, 0]
    left, right = ramp[0, 0, 0, :4].mean(), ramp[0, 0, 0, 4:].mean()
    expected = torch.stack([left, 0.75 * left + 0.25 * right, 0.25 * left + 0.75 * right, right])
    assert torch.allclose(found, expected, atol=1e-6)


def test_features_are_resampled_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16):
        found = read_by(lambda network, x: pooled(2)(network, x).bfloat16(), 4)(torch.rand(1, 3, 8, 8))
    assert found.shape == (1, 16, 3)


def test_places_run_row_by_row():
    rows = torch.arange(4.0).repeat_interleave(16).view(1, 1, 8, 8).expand(1, 3, 8, 8)
    assert read_by(pooled(4), 4)(rows)[0, :, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4 + [3.0] * 4


def test_constant_features_stay_constant_when_resampled():
    found = read_by(pooled(5), 3)(torch.full((1, 3, 8, 8), 0.3))
    assert torch.allclose(found, torch.full((1, 9, 3), 0.3))


def test_each_channel_has_its_own_mean_and_deviation():
    found = read_by(pooled(1), 1, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))(torch.full((1, 3, 8, 8), 0.5))
    assert torch.allclose(found[0, 0], torch.tensor([0.4, 0.15, 0.05]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    with pytest.raises(DataError, match=r"mine: its features .* not finite \(2 of 24 values\): the weights"):
        read_by(lambda network, x: spoiled(pooled(2)(network, x), value))


def spoiled(maps, value):
    maps[:, 0, 0, 0] = value
    return maps


def test_features_that_are_not_square_are_refused():
    with pytest.raises(UserError, match=r"mine: its features are \(3, 2, 4\) for a square picture"):
        read_by(lambda network, x: torch.nn.functional.adaptive_avg_pool2d(x, (2, 4)))


@pytest.mark.parametrize("mode", [True, False])
def test_a_teacher_in_a_model_that_is_trained_stays_in_eval_mode(mode):
    teacher = read_by(pooled(2))
    torch.nn.Sequential(teacher).train(mode)
    assert not any(module.training for module in teacher.modules())


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(SetupError, match=r"needs the package nowhere \(No module.*\): pip install there"):
        needed("nowhere", "pip install there")
