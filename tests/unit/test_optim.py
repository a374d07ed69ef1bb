"""Schedule, parameter groups, layer decay, clipping."""

import pytest
import torch
from torch import nn

from beitctl.config import ModelConfig, OptimConfig, TrainConfig
from beitctl.engine import optim
from beitctl.model.multiway import Multiway


def test_schedule_is_beits():
    settings = OptimConfig(peak_lr=1.5e-3, min_lr=1e-5, warmup_steps=6250)
    assert optim.lr_at(0, 500_000, settings) == 0
    assert optim.lr_at(6249, 500_000, settings) == pytest.approx(1.5e-3, abs=1e-12)
    assert optim.lr_at(6250, 500_000, settings) == pytest.approx(1.5e-3, abs=1e-12)
    last = optim.lr_at(499_999, 500_000, settings)
    assert 1e-5 < last < 1.0001e-5


def test_schedule_without_warmup_starts_at_the_peak():
    assert optim.lr_at(0, 10, OptimConfig(peak_lr=1e-3)) == 1e-3


def test_layer_decay_counts_from_the_top():
    assert optim.layer_scale("model.vision_embed.proj.weight", 12, 0.65) == pytest.approx(0.003697, abs=1e-6)
    assert optim.layer_scale("model.blocks.0.ffn.vision.fc1.weight", 12, 0.65) == pytest.approx(
        0.005688, abs=1e-6
    )
    assert optim.layer_scale("model.blocks.11.ffn.vision.fc1.weight", 12, 0.65) == 0.65
    assert optim.layer_scale("heads.classifier.linear.weight", 12, 0.65) == 1.0
    assert optim.layer_scale("model.norm.shared.weight", 12, 0.65) == 1.0


def test_heads_but_the_pooler_get_their_own_factor():
    """As in BEiT-3's fine-tuning of VQA: names that begin with "head" times 20, the pooler left alone."""
    model = nn.ModuleDict(
        {"model": multiway(), "heads": nn.ModuleDict({"pooler": nn.Linear(8, 8), "answers": nn.Linear(8, 3)})}
    )
    groups = optim.adamw(model, OptimConfig(peak_lr=1e-3, head_factor=20.0), 2).param_groups
    scales = {id(p): group["scale"] for group in groups for p in group["params"]}
    found = {name: scales[id(p)] for name, p in model.named_parameters() if scales[id(p)] != 1}
    assert found == {"heads.answers.weight": 20.0, "heads.answers.bias": 20.0}
    assert len(scales) == len(list(model.parameters()))


def multiway():
    config = ModelConfig(
        layers=2, width=8, heads=2, ffn=8, image_px=8, patch_px=4, vocabulary=9, text_tokens=4
    )
    return Multiway(config)


def test_every_parameter_is_in_exactly_one_group():
    model = multiway()
    groups = optim.adamw(model, OptimConfig(peak_lr=1e-3, layer_decay=0.9), 2).param_groups
    claimed = [id(p) for group in groups for p in group["params"]]
    assert sorted(claimed) == sorted(id(p) for p in model.parameters())


def test_weight_decay_spares_what_beit3_spares():
    spared = {n for n, p in multiway().named_parameters() if not optim.is_decayed(n, p)}
    assert {"vision_embed.cls_token", "vision_embed.position", "blocks.0.attention.shared.qkv.bias"} <= spared
    assert not {"text_embed.position.weight", "text_embed.token.weight", "vision_embed.mask_token"} & spared


def test_clipping_scales_to_the_limit():
    module = nn.Linear(2, 2, bias=False)
    module.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert float(optim.clip(module, 1.0)) == 5.0
    assert float(module.weight.grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_no_limit_leaves_gradients_alone():
    module = nn.Linear(2, 2, bias=False)
    module.weight.grad = torch.full((2, 2), 2.0)
    assert float(optim.clip(module, 0.0)) == 4.0
    assert torch.equal(module.weight.grad, torch.full((2, 2), 2.0))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"peak_lr": 0.0}, r"peak_lr \(0.0\) must be positive"),
        ({"peak_lr": 1.0, "min_lr": 2.0}, r"min_lr \(2.0\) must lie in 0..peak_lr"),
        ({"peak_lr": 1.0, "warmup_steps": -1}, r"warmup_steps \(-1\) must not be negative"),
        ({"peak_lr": 1.0, "betas": (0.9, 1.0)}, "betas .* must be at least 0 and below 1"),
        ({"peak_lr": 1.0, "weight_decay": -1.0}, r"weight_decay \(-1.0\) must not be negative"),
        ({"peak_lr": 1.0, "eps": 0.0}, r"eps \(0.0\) must be above 0"),
        ({"peak_lr": 1.0, "layer_decay": 0.0}, r"layer_decay \(0.0\) must be above 0"),
        ({"peak_lr": 1.0, "head_factor": 0.0}, r"head_factor \(0.0\) must be positive"),
    ],
)
def test_impossible_optimizer_settings_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        OptimConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 0}, r"steps \(0\) must be at least 1"),
        ({"save_every_minutes": 0}, r"save_every_minutes \(0\) must be positive"),
        ({"workers": -1}, r"workers \(-1\) must not be negative"),
        ({"max_bad_share": 2.0}, r"max_bad_share \(2.0\) must lie in 0..1"),
        ({"shard_ranks": -2}, r"shard_ranks \(-2\) must not be negative"),
        ({"profile": (5, 3)}, r"profile \(\[5, 3\]\) must be \[first step, last step\]"),
        ({"memory_budget": 0.5, "recompute": True}, r"memory_budget \(0.5\) must be 1 unless"),
        (
            {"optim": OptimConfig(peak_lr=1.0, warmup_steps=9)},
            r"warmup_steps \(9\) must not exceed steps \(5\)",
        ),
    ],
)
def test_impossible_training_settings_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**({"steps": 5, "optim": OptimConfig(peak_lr=1.0)} | settings))
