"""The guard against teachers that say nothing and codebooks that die: what it lets pass and what it says."""

import math

import pytest
import torch
from torch.nn import functional as F

from beitctl.errors import DataError, DivergedError
from beitctl_plugins.tokenizers.collapse import (
    CollapseGuard,
    check_teacher,
    few_rows,
    spread_of,
    variety,
)

CODES = 100


def random(n=400, width=8, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def clusters(count, noise=0.01):
    return random(count).repeat(400 // count, 1) + noise * random(400 // count * count, seed=1)


def test_equal_features_are_refused():
    with pytest.raises(DataError, match=r"same feature for all of 400 patches.*another stage"):
        variety(torch.ones(400, 8) * random(1))


def test_features_that_are_equal_but_for_rounding_are_refused():
    with pytest.raises(DataError, match="same feature"):
        variety(random(1) * 5 + 1e-4 * random())


def test_features_that_are_no_numbers_are_refused():
    broken = random()
    broken[3:7, 2] = math.nan
    with pytest.raises(DataError, match=r"not finite for 4 of 400 patches.*weights"):
        variety(broken)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_groups_are_counted_through_noise(count):
    assert variety(clusters(count)).groups == count


def test_a_teacher_with_two_kinds_of_patch_is_refused():
    with pytest.raises(DataError, match=r"only 2 kinds of patch among 400.*2 of 100 codes.*asks for 5"):
        check_teacher(variety(clusters(2)), CODES, 0.05)


def test_a_teacher_that_tells_patches_apart_passes():
    check_teacher(variety(random()), CODES, 0.05)


def test_a_large_common_part_hides_nothing():
    assert variety(random() + 1000.0).groups == variety(random()).groups


def window(used, uses=1000):
    counts = torch.zeros(CODES)
    counts[:used] = uses / used
    return counts


WIDE = F.normalize(random(), dim=-1)
NARROW = F.normalize(random(1) + 0.01 * random(), dim=-1)


def test_too_few_codes_for_three_windows_stop_the_run():
    guard = CollapseGuard(CODES, 0.05)
    guard.check(10, window(3), WIDE)
    guard.check(20, window(3), WIDE)
    with pytest.raises(DivergedError, match=r"at step 30.*3 of 100 codes were used.*revive_after"):
        guard.check(30, window(3), WIDE)


def test_a_good_window_between_forgives():
    guard = CollapseGuard(CODES, 0.05)
    for used in (3, 3, 50, 3, 3):
        guard.check(0, window(used), WIDE)


def test_vectors_that_point_one_way_stop_the_run_however_many_codes_are_used():
    guard = CollapseGuard(CODES, 0.05)
    guard.check(10, window(90), NARROW)
    guard.check(20, window(90), NARROW)
    with pytest.raises(DivergedError, match=r"all point the same way.*centre = true"):
        guard.check(30, window(90), NARROW)


def test_a_short_window_cannot_use_more_codes_than_it_has_vectors():
    guard = CollapseGuard(10_000, 0.5)
    for _ in range(5):
        guard.check(0, window(60, uses=60), WIDE)


def test_it_can_be_switched_off():
    guard = CollapseGuard(CODES, 0.0)
    for _ in range(5):
        guard.check(0, window(1), NARROW)


def test_spread_is_one_for_vectors_of_all_directions_and_zero_for_one():
    assert spread_of(WIDE) > 0.95
    assert spread_of(WIDE[:1].repeat(9, 1)) == pytest.approx(0, abs=1e-6)


def test_few_rows_takes_some_patches_of_every_picture():
    features = torch.arange(2 * 9.0).view(2, 9, 1)
    assert few_rows(features, each=3).flatten().tolist() == [0, 4, 8, 9, 13, 17]
