"""The heads of segmentation: batch norm against torch's, taps, sizes, dropout, operations, initial values."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small import MODEL, weights
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from beitctl.engine.shard import fill
from beitctl.model.dense import AUXILIARY, Segmenter, SyncedBatchNorm, default_taps, feature_maps
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway

CONFIG = replace(MODEL, final_norm=False)


def filled(module, prefix="heads.segmenter."):
    fill(module, lambda name, shape: initial(prefix + name, shape, CONFIG, 0))
    return module


def both_norms(channels=3):
    """Ours and torch's with the same weights."""
    ours, theirs = SyncedBatchNorm(channels), nn.BatchNorm2d(channels)
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(0.5, 2, channels))
        theirs.bias.copy_(torch.linspace(-1, 1, channels))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_batch_norm_is_torchs_in_training_and_after_it():
    ours, theirs = both_norms()
    inputs = [(noise(4, 3, 2, 5) * 3 + 1).requires_grad_(True) for _ in range(2)]
    for norm, x in zip((ours, theirs), inputs, strict=True):
        (norm(x) * noise(4, 3, 2, 5, seed=1)).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)
    for name, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, atol=1e-6), name
    for name in ("weight", "bias"):
        assert torch.allclose(getattr(ours, name).grad, getattr(theirs, name).grad, atol=1e-5)
    x = noise(2, 3, 4, 4, seed=2)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_batch_norm_passes_gradcheck():
    norm = SyncedBatchNorm(2)
    fill(norm, lambda name, shape: torch.linspace(0.5, 1.5, 2))
    x = noise(2, 2, 2, 3).requires_grad_(True)
    direction = noise(2, 2, 2, 3, seed=1)
    (norm(x) ** 2).sum().backward()
    step = 1e-2
    with torch.no_grad():
        up, down = ((norm(x + sign * step * direction) ** 2).sum() for sign in (1, -1))
    assert ((up - down) / (2 * step)).item() == pytest.approx((x.grad * direction).sum().item(), abs=2e-2)


def test_batch_norm_computes_in_fp32_and_gives_the_type_it_was_given():
    ours, theirs = both_norms()
    x = (noise(4, 3, 8, 8) * 0.1 + 100).bfloat16()
    found = ours.to(torch.bfloat16).train()(x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), theirs(x.float()), atol=0.02)


def test_statistics_stay_fp32_where_weights_are_not():
    ours, _ = both_norms()
    for parameter in ours.parameters():
        parameter.data = parameter.data.bfloat16()
    ours(noise(4, 3, 8, 8).bfloat16())
    assert ours.running_mean.dtype == torch.float32


def test_a_channel_of_one_value_becomes_its_bias():
    ours, _ = both_norms()
    assert torch.equal(ours(noise(1, 3, 1, 1)).flatten(), ours.bias)
    assert torch.isfinite(ours.running_var).all()


def test_no_samples_leave_the_statistics_as_they_are():
    ours, _ = both_norms()
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    ours(x).sum().backward()
    assert ours.num_batches_tracked == 0
    assert torch.equal(ours.running_mean, torch.zeros(3))
    assert torch.equal(ours.running_var, torch.ones(3))
    assert torch.equal(ours.weight.grad, torch.zeros(3))


def test_buffers_begin_anew():
    ours, _ = both_norms()
    ours(noise(4, 3, 2, 2))
    ours.reset_buffers()
    assert (ours.running_mean.sum(), ours.running_var.sum(), ours.num_batches_tracked) == (0, 3, 0)


@pytest.mark.parametrize(
    ("layers", "taps"),
    [
        (12, (4, 6, 8, 12)),
        (24, (8, 12, 16, 24)),
        (6, (2, 3, 4, 6)),
        (40, (13, 20, 27, 40)),
        (2, (1, 1, 1, 2)),
        (1, (1, 1, 1, 1)),
    ],
)
def test_taps_are_the_published_ones_or_in_proportion(layers, taps):
    assert default_taps(layers) == taps


@pytest.mark.parametrize("changes", [{}, {"distill_token": True}], ids=["class token", "two tokens"])
def test_maps_hold_the_patches_in_their_places_before_the_final_norm(changes):
    config = replace(MODEL, layers=2, image_px=(16, 24), **changes)
    model = Multiway(config)
    model.load_state_dict(weights(model, "", config), strict=True)
    packed, _ = model.pack(noise(2, 3, 16, 24))
    encoded = model.encoded(packed, [1, 2])
    rows = torch.arange(2 * config.picture_tokens).view(2, -1)
    maps = feature_maps(encoded, rows, [1, 2])
    assert [tuple(found.shape) for found in maps] == [(2, 8, 4, 6)] * 2
    tokens = encoded.last.view(2, config.picture_tokens, 8)
    assert torch.equal(maps[1][1, :, 2, 5], tokens[1, config.prefix + 2 * 6 + 5])
    assert not torch.equal(maps[0], maps[1])


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (8, 7)])
@pytest.mark.parametrize("samples", [0, 1, 2])
def test_logits_are_four_times_as_fine_as_the_patches(grid, samples):
    head = filled(Segmenter(CONFIG, 7)).train()
    maps = [noise(samples, 8, *grid, seed=k).requires_grad_(True) for k in range(4)]
    logits, other = head.both(maps)
    assert logits.shape == (samples, 7, 4 * grid[0], 4 * grid[1])
    assert other.shape == (samples, 7, *grid)
    (logits.sum() + other.sum()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_dropout_scales_whole_channels_of_both_heads():
    head = filled(Segmenter(CONFIG, 7)).eval()
    maps = [noise(2, 8, 3, 3, seed=k) for k in range(4)]
    none = torch.zeros(2, 8 + AUXILIARY)
    logits, other = head.both(maps, none)
    assert torch.equal(logits, head.decode_head.classifier.bias[:, None, None].expand_as(logits))
    assert torch.equal(other, head.auxiliary_head.classifier.bias[:, None, None].expand_as(other))
    plain, scaled = head.both(maps), head.both(maps, none + 1)
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[1], scaled[1])
    assert torch.equal(head(maps), plain[0])


@pytest.mark.parametrize("auxiliary", [True, False])
def test_operations_are_those_that_torch_counts(auxiliary):
    head = filled(Segmenter(CONFIG, 7, auxiliary=auxiliary)).train()
    with FlopCounterMode(display=False) as counter:
        head.both([noise(2, 8, 6, 5, seed=k) for k in range(4)])
    assert head.operations(2, (6, 5)) == counter.get_total_flops()


def test_initial_values_are_those_of_mmsegmentation():
    found = weights(Segmenter(CONFIG, 7), "heads.segmenter.")
    assert all(
        value.abs().max() <= 32**-0.5 for name, value in found.items() if ".fpn1." in name and value.ndim == 4
    )
    assert found["heads.segmenter.fpn2.0.weight"].abs().max() > 0.8 * 32**-0.5
    bottleneck = found["heads.segmenter.decode_head.bottleneck.conv.weight"]
    assert bottleneck.std().item() == pytest.approx(math.sqrt(2 / (8 * 9)), rel=0.05)
    other = found["heads.segmenter.auxiliary_head.classifier.weight"]
    assert other.std().item() == pytest.approx(0.01, rel=0.1)
    flat = {name: value for name, value in found.items() if value.ndim == 1}
    for name, value in flat.items():
        assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name


def test_a_half_precision_head_reads_full_precision_rows():
    head = filled(Segmenter(CONFIG, 7)).eval()
    for parameter in head.parameters():
        parameter.data = parameter.data.bfloat16()
    maps = [noise(1, 8, 4, 4, seed=k) for k in range(4)]
    assert head(maps).dtype == torch.bfloat16


def test_encoded_without_the_depth_is_refused():
    encoded = SimpleNamespace(model=Multiway(CONFIG), inner={})
    with pytest.raises(KeyError):
        feature_maps(encoded, torch.arange(17)[None], [1])
