"""Plan, initial weights, parameter counts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beitctl.config import ModelConfig
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl.model.plan import plan_of
from beitctl.model.sizes import parameter_parts

BASE = {"layers": 12, "width": 768, "heads": 12, "ffn": 3072, "vocabulary": 64010, "text_tokens": 1022}


@given(
    st.integers(2, 6),
    st.integers(0, 4),
    st.lists(st.integers(1, 7), max_size=4),
    st.lists(st.integers(1, 7), max_size=4),
)
def test_every_row_belongs_to_one_slot_and_one_sequence(picture, images, pairs, texts):
    plan = plan_of(picture, images, pairs, texts)
    assert sorted(plan.perm) == list(range(plan.tokens))
    flat = np.concatenate([np.zeros(0, np.int64), *(grid.ravel() for _, grid in plan.grids)])
    assert np.array_equal(flat[plan.slots], np.arange(plan.tokens))
    assert [len(row[row >= 0]) for _, grid in plan.grids for row in grid] == plan.lengths.tolist()
    assert np.bincount(plan.row_sequence, minlength=plan.sequences).tolist() == plan.lengths.tolist()


def test_segments_lie_in_the_order_of_the_experts():
    plan = plan_of(5, 2, [3, 1], [4])
    assert plan.cuts == (10, 20, 24, 28)
    assert plan.row_sequence.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5 + [2] * 3 + [3] + [4] * 4
    assert plan.text_positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("layers", "width", "heads", "ffn", "published"),
    [(12, 768, 12, 3072, 276_510_730), (24, 1024, 16, 4096, 746_709_514)],
)
def test_released_pretraining_models_have_their_published_size(layers, width, heads, ffn, published):
    config = ModelConfig(
        layers=layers, width=width, heads=heads, ffn=ffn, vocabulary=64010, text_tokens=1022,
        attention="decoupled",
    )  # fmt: skip
    with torch.device("meta"):
        heads_ = {"t": torch.nn.Linear(width, 64010), "i": torch.nn.Linear(width, 8192)}
        counts = parameter_parts(Multiway(config), heads_)
    unread = 4 * width  # rows 0 and 1 of both official position tables are never read, and we have none
    assert counts["total"] == published - unread


def test_the_giant_has_the_papers_parts():
    config = ModelConfig(
        layers=40, width=1408, heads=16, ffn=6144, patch_px=14, vocabulary=64010, text_tokens=128,
        fusion_layers=3, norm="pre",
    )  # fmt: skip
    with torch.device("meta"):
        counts = parameter_parts(Multiway(config), {})
    ffn = 2 * 1408 * 6144 + 6144 + 1408
    assert counts["vision experts"] == 40 * (ffn + 2 * 1408)  # 692 M in the paper, and the norm before it
    assert counts["language experts"] == counts["vision experts"]
    assert counts["fusion experts"] == 3 * (ffn + 2 * 1408)  # 52 M
    assert counts["attention"] == 40 * (4 * (1408**2 + 1408) + 2 * 1408)  # 317 M


def value(name, shape, init="magneto", layers=12, seed=0, width=8):
    config = ModelConfig(
        layers=layers, width=width, heads=1, ffn=width, vocabulary=8, text_tokens=4, init=init
    )
    return initial(name, torch.Size(shape), config, seed)


def test_initial_values_depend_on_seed_and_name():
    a = value("model.blocks.0.ffn.vision.fc1.weight", (64, 64))
    assert torch.equal(a, value("model.blocks.0.ffn.vision.fc1.weight", (64, 64)))
    assert not torch.equal(a, value("model.blocks.0.ffn.vision.fc1.weight", (64, 64), seed=1))
    assert not torch.equal(a, value("model.blocks.1.ffn.vision.fc1.weight", (64, 64)))


def test_beit_divides_output_matrices_by_the_root_of_twice_the_layer():
    first = value("model.blocks.0.ffn.vision.fc2.weight", (400, 400), "beit")
    fourth = value("model.blocks.3.ffn.vision.fc2.weight", (400, 400), "beit")
    assert first.abs().max() <= 0.02 / math.sqrt(2)
    assert float(first.std() / fourth.std()) == pytest.approx(2, rel=0.02)
    assert float(value("model.blocks.3.ffn.vision.fc1.weight", (400, 400), "beit").std()) == pytest.approx(
        0.0108, rel=0.02
    )


@pytest.mark.parametrize(("layers", "gain"), [(12, 1.782710), (24, 1.967537), (40, 2.093329)])
def test_magneto_scales_value_output_and_ffn(layers, gain):
    plain = math.sqrt(2 / 800)
    fc1 = value("model.blocks.0.ffn.vision.fc1.weight", (400, 400), layers=layers)
    qkv = value("model.blocks.0.attention.shared.qkv.weight", (1200, 400), layers=layers)
    assert float(fc1.std()) == pytest.approx(gain * plain, rel=0.02)
    assert float(qkv[:800].std()) == pytest.approx(plain, rel=0.02)
    assert float(qkv[800:].std()) == pytest.approx(gain * plain, rel=0.02)


def test_released_starts_positions_wide_and_tokens_at_zero():
    assert float(value("model.vision_embed.position", (500, 200), "released").std()) == pytest.approx(
        1, rel=0.02
    )
    assert not value("model.vision_embed.cls_token", (8,), "released").any()


def test_a_parameter_without_a_rule_is_refused():
    with pytest.raises(
        ValueError, match=r"no initial value is defined for parameter model.strange of shape \(3, 3, 3\)"
    ):
        value("model.strange", (3, 3, 3))


@pytest.mark.parametrize("init", ["beit", "magneto", "released"])
@pytest.mark.parametrize("attention", ["shared", "decoupled"])
def test_every_parameter_has_a_rule(init, attention):
    config = ModelConfig(
        layers=2, width=8, heads=2, ffn=8, image_px=8, patch_px=4, vocabulary=9, text_tokens=4,
        attention=attention, fusion_layers=1, init=init, norm="sub", key_bias=False,
    )  # fmt: skip
    for name, parameter in Multiway(config).named_parameters():
        assert torch.isfinite(initial(name, parameter.shape, config, 0)).all(), name


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"width": 10, "heads": 4}, r"width \(10\) must be a multiple of heads \(4\)"),
        ({"image_px": 30, "patch_px": 16}, r"image_px \(30\) must be a multiple of patch_px \(16\)"),
        ({"fusion_layers": 3}, r"fusion_layers \(3\) must lie in 0..layers \(2\)"),
        ({"drop_path": 1.0}, r"drop_path \(1.0\) must be at least 0 and below 1"),
        ({"layers": 0}, r"layers \(0\) must be at least 1"),
        ({"vocabulary": 10, "text_tokens": 1}, r"text_tokens \(1\) must be at least 2"),
        ({"vocabulary": -1}, "must not be negative"),
    ],
)
def test_impossible_sizes_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        ModelConfig(**({"layers": 2, "width": 8, "heads": 2, "ffn": 8} | settings))
