"""Mixup, CutMix and random erasing, beside timm's."""

import random

import numpy as np
import pytest
import torch
from small import rng
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target, rand_bbox
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch.nn import functional as F

from beitctl_plugins.tasks import mixing

PX = 16
BOTH = (0.8, 1.0)


def draws(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def pictures(count=4):
    return torch.randn(count, 3, PX, PX, generator=torch.Generator().manual_seed(0))


def drawn(count=400, alphas=BOTH, prob=1.0, switch=0.5):
    return [mixing.mix_draws(rng(seed), PX, alphas, prob, switch) for seed in range(count)]


def box(row, px=PX):
    return [round(edge * px) for edge in row[1:]]


def is_cut(row):
    return row[2] > row[1]


class Replaced:
    """Numbers that timm takes from NumPy's global generator, in turn."""

    def __init__(self, monkeypatch, points):
        self.points = iter(points)
        monkeypatch.setattr(np.random, "randint", lambda low, high, size=None: next(self.points))


class Given:
    """A generator that says which point is drawn."""

    def __init__(self, *point):
        self.point = np.array(point)

    def integers(self, high, size):
        return self.point


@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("point", [(0, 0), (8, 7), (15, 2), (15, 15)], ids=str)
def test_the_box_is_that_of_timm(monkeypatch, share, point):
    Replaced(monkeypatch, point)
    expected = [int(edge) for edge in rand_bbox((3, PX, PX), share)]
    assert list(mixing.cut_box(Given(*point), PX, share)) == expected


def test_the_share_of_a_cut_is_what_its_box_leaves():
    for row in filter(is_cut, drawn(100)):
        top, bottom, left, right = box(row)
        assert row[0] == pytest.approx(1 - (bottom - top) * (right - left) / PX**2)


def test_the_share_of_a_cut_is_corrected_as_by_timm(monkeypatch):
    class Drawn(Given):
        def random(self):
            return 0.0

        def beta(self, a, b):
            return 0.4

    Replaced(monkeypatch, (15, 1))
    _, lam = cutmix_bbox_and_lam((3, PX, PX), 0.4)
    assert mixing.mix_draws(Drawn(15, 1), PX, BOTH, 1.0, 0.5)[0] == pytest.approx(float(lam))


@pytest.mark.parametrize(("switch", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_cutmix_takes_the_place_of_mixup_as_often_as_is_said(switch, share):
    rows = [row for row in drawn(switch=switch) if row[0] < 1]
    assert np.mean([is_cut(row) for row in rows]) == pytest.approx(share, abs=0.08)


@pytest.mark.parametrize(("alphas", "cut"), [((0.8, 0.0), False), ((0.0, 1.0), True)], ids=str)
def test_one_alone_needs_no_switch(alphas, cut):
    rows = [row for row in drawn(100, alphas) if row[0] < 1]
    assert len(rows) > 90
    assert {is_cut(row) for row in rows} == {cut}


def test_samples_are_mixed_as_often_as_is_said():
    assert np.mean([row[0] < 1 for row in drawn(prob=0.3)]) == pytest.approx(0.3, abs=0.07)
    assert all(row == (1, 0, 0, 0, 0) for row in drawn(50, prob=0.0))
    assert all(row == (1, 0, 0, 0, 0) for row in drawn(50, (0.0, 0.0)))


def test_shares_of_mixup_come_from_its_beta_distribution():
    shares = np.array([row[0] for row in drawn(2000, (0.8, 0.0))])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)


def test_all_that_is_drawn_lies_between_0_and_1():
    rows = np.array(drawn() + [mixing.erase_draws(rng(s), PX, 1.0) for s in range(400)])
    assert rows.min() >= 0
    assert rows.max() <= 1


MIXUP = (0.3, 0, 0, 0, 0)
CUT = (1 - 8 * 4 / PX**2, 4 / PX, 12 / PX, 2 / PX, 6 / PX)
OTHER = (0.9, 0, 0, 0, 0)


def test_neighbours_are_mixed_with_the_share_of_the_even_one():
    x = pictures()
    found = mixing.mixed(x, draws(MIXUP, OTHER, OTHER, MIXUP))
    for own, other, share in ((0, 1, 0.3), (1, 0, 0.3), (2, 3, 0.9), (3, 2, 0.9)):
        assert torch.allclose(found[own], share * x[own] + (1 - share) * x[other], atol=1e-6)


def test_a_box_is_swapped_exactly():
    x = pictures(2)
    found = mixing.mixed(x, draws(CUT, MIXUP))
    expected = x.clone()
    expected[:, :, 4:12, 2:6] = x.flip(0)[:, :, 4:12, 2:6]
    assert torch.equal(found, expected)


def test_a_share_of_one_changes_nothing():
    x = pictures(2)
    assert torch.equal(mixing.mixed(x, draws((1, 0, 0, 0, 0), CUT)), x)


@pytest.mark.parametrize("px", [16, 96, 224, 384, 480, 1022])
def test_edges_survive_as_shares_in_single_precision(px):
    for edge in range(px + 1):
        assert round(float(np.float32(edge / px)) * px) == edge


def test_pictures_of_a_pass_do_not_depend_on_the_other_pairs():
    x, rows = pictures(6), draws(*(drawn(6)))
    whole = mixing.mixed(x, rows)
    parts = [mixing.mixed(x[i : i + 2], rows[i : i + 2]) for i in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))


def test_an_odd_pass_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match="in twos, but a pass holds 3: samples must be a multiple of twice the"
    ):
        mixing.mixed(pictures(3), draws(MIXUP, MIXUP, MIXUP))


def test_an_empty_pass_stays_empty():
    none = torch.zeros(0, 5)
    assert mixing.mixed(torch.zeros(0, 3, PX, PX), none).shape == (0, 3, PX, PX)
    assert mixing.soft_targets(torch.zeros(0, dtype=torch.int64), none, 7, 0.1).shape == (0, 7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_soft_targets_are_those_of_timm(share, smoothing):
    labels = torch.tensor([4, 1])
    found = mixing.soft_targets(labels, draws((share, 0, 0, 0, 0), OTHER), 7, smoothing)
    assert torch.allclose(found, mixup_target(labels, 7, share, smoothing), atol=1e-7)
    assert torch.allclose(found.sum(1), torch.ones(2))


def test_the_loss_is_that_of_timm():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    targets = mixing.soft_targets(torch.tensor([0, 6, 3, 3]), draws(MIXUP, OTHER, CUT, OTHER), 7, 0.1)
    expected = 4 * SoftTargetCrossEntropy()(logits, targets)
    assert mixing.soft_entropy(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_mixing_the_loss_is_the_smoothed_cross_entropy():
    logits, labels = torch.randn(2, 7), torch.tensor([5, 2])
    targets = mixing.soft_targets(labels, draws((1, 0, 0, 0, 0), OTHER), 7, 0.1)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    assert mixing.soft_entropy(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("share", "expected"), [(0.9, [4, 1]), (0.5, [4, 1]), (0.2, [1, 4])])
def test_the_larger_share_dominates(share, expected):
    rows = draws((share, 0, 0, 0, 0), OTHER)
    assert mixing.dominating(torch.tensor([4, 1]), rows).tolist() == expected


def erasures(count=600, px=64, prob=1.0):
    return [mixing.erase_draws(rng(seed), px, prob) for seed in range(count)]


def sides(row, px=64):
    return [round(value * px) for value in row[:4]]


def test_boxes_are_erased_as_often_as_is_said():
    assert np.mean([row[2] > 0 for row in erasures(prob=0.25)]) == pytest.approx(0.25, abs=0.05)


def test_erased_boxes_have_the_areas_and_shapes_of_timm():
    random.seed(0)
    theirs, eraser = [], RandomErasing(1.0, mode="const", device="cpu")
    for _ in range(600):
        gone = eraser(torch.ones(1, 64, 64))[0] == 0
        theirs.append((int(gone.any(1).sum()), int(gone.any(0).sum())))
    for statistic in (
        lambda h, w: h * w / 64**2,
        lambda h, w: np.log(h / w),
        lambda h, w: np.log(h / w) ** 2,
    ):
        ours = np.mean([statistic(h, w) for _, _, h, w in map(sides, erasures())])
        assert ours == pytest.approx(np.mean([statistic(*size) for size in theirs]), abs=0.06)


def test_erased_boxes_lie_inside_the_picture():
    for top, left, height, width in map(sides, erasures(200)):
        assert 0 < height < 64
        assert 0 < width < 64
        assert top + height <= 64
        assert left + width <= 64


ERASED = (4 / PX, 2 / PX, 8 / PX, 6 / PX, 0.25)
NOTHING = (0, 0, 0, 0, 0)


def test_noise_takes_the_place_of_the_box_alone():
    x = torch.full((2, 3, PX, PX), 9.0)
    found = mixing.erased(x, draws(ERASED, NOTHING))
    changed = found != 9
    expected = torch.zeros(PX, PX, dtype=torch.bool)
    expected[4:12, 2:8] = True
    assert torch.equal(changed[0], expected.expand(3, PX, PX))
    assert not changed[1].any()
    assert (x == 9).all()
    noise = found[0][changed[0]]
    assert noise.mean().item() == pytest.approx(0, abs=0.3)
    assert noise.std().item() == pytest.approx(1, abs=0.2)


def test_the_noise_follows_from_the_number_of_the_sample():
    x = torch.zeros(3, 3, PX, PX)
    found = mixing.erased(x, draws(ERASED, ERASED, (*ERASED[:4], 0.5)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    alone = mixing.erased(x[:1], draws((*ERASED[:4], 0.5)))
    assert torch.equal(alone[0], found[2])
