"""The discrete VAE: names and numbers of BEiT-1's class, the noise, the schedule, the losses, the guard."""

import math

import pytest
import torch
from torch.nn import functional as F

from beitctl.errors import DataError, DivergedError
from beitctl.model.dvae import DiscreteVAE, gumbel, initial_dvae, kl_to_uniform
from beitctl_plugins.tokenizers.dvae_learner import DVAELearner, Schedule, Shots, UseGuard

CODES, WIDTH = 6, 5


def model(layers=2, blocks=1, codes=CODES):
    found = DiscreteVAE(layers, 8, blocks, codes, WIDTH)
    with torch.no_grad():
        for name, value in found.named_parameters():
            value.copy_(initial_dvae(name, value.shape, 0))
            if name.endswith("bias"):
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
            elif name.startswith("encoder"):
                value.mul_(2)
    return found


def keys(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count, 2), generator=draw).to(torch.int32)


def shots(count=3, temperature=1.0, warm=1.0, opens=True, px=8):
    pixels = torch.randint(0, 256, (count, 3, px, px), generator=torch.Generator().manual_seed(1))
    names = tuple(map(str, range(count)))
    return Shots(pixels.to(torch.uint8), keys(count), temperature, warm, opens, names, ())


def learner(kl=0.5, balance=0.5, loss="mse", hard=False, codes=CODES):
    found = DVAELearner(model(codes=codes), kl, balance, loss, hard)
    found.reset_buffers()
    return found


def residual(state, x, name):
    y = F.relu(F.conv2d(x, state[f"{name}.net.0.weight"], state[f"{name}.net.0.bias"], padding=1))
    y = F.relu(F.conv2d(y, state[f"{name}.net.2.weight"], state[f"{name}.net.2.bias"], padding=1))
    return x + F.conv2d(y, state[f"{name}.net.4.weight"], state[f"{name}.net.4.bias"])


def plain(state, x, noise, temperature, layers=2, blocks=1):
    """Reconstruction and logits (B, K, h, w), in words of functions."""
    for layer in range(layers):
        at = layer * (1 + blocks)
        x = F.conv2d(x, state[f"encoder.{at}.0.weight"], state[f"encoder.{at}.0.bias"], 2, 1).relu()
        for block in range(blocks):
            x = residual(state, x, f"encoder.{at + 1 + block}")
    last = layers * (1 + blocks)
    logits = F.conv2d(x, state[f"encoder.{last}.weight"], state[f"encoder.{last}.bias"])
    soft = F.softmax((logits + noise) / temperature, 1)
    x = torch.einsum("bkhw,kd->bdhw", soft, state["codebook.weight"])
    for layer in range(layers):
        at = layer * (1 + blocks)
        x = F.conv_transpose2d(x, state[f"decoder.{at}.0.weight"], state[f"decoder.{at}.0.bias"], 2, 1).relu()
        for block in range(blocks):
            x = residual(state, x, f"decoder.{at + 1 + block}")
    return F.conv2d(x, state[f"decoder.{last}.weight"], state[f"decoder.{last}.bias"]), logits


def test_names_and_shapes_are_those_of_beits_code():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in DiscreteVAE().state_dict().items()}
    convs = {"encoder.6": (8192, 256, 1, 1), "decoder.6": (3, 256, 1, 1)}
    for layer in range(3):
        convs[f"encoder.{2 * layer}.0"] = (256, 256 if layer else 3, 4, 4)
        convs[f"decoder.{2 * layer}.0"] = (256 if layer else 512, 256, 4, 4)  # transposed: in, out
        for side in ("encoder", "decoder"):
            for number, kernel in ((0, 3), (2, 3), (4, 1)):
                convs[f"{side}.{2 * layer + 1}.net.{number}"] = (256, 256, kernel, kernel)
    expected = {f"{name}.weight": shape for name, shape in convs.items()} | {"codebook.weight": (8192, 512)}
    for name, shape in convs.items():
        transposed = name.startswith("decoder") and name.endswith(".0") and "net" not in name
        expected[f"{name}.bias"] = shape[1:2] if transposed else shape[:1]
    assert shapes == expected


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_forward_pass_is_that_of_the_plain_functions(blocks):
    found, x = model(blocks=blocks), torch.rand(2, 3, 8, 12) * 2 - 1
    noise = gumbel(keys(2), 6 * CODES).view(2, 6, CODES)
    made, logs = found(x, keys(2), 0.7)
    flat = noise.transpose(1, 2).unflatten(2, (2, 3))
    expected, logits = plain(found.state_dict(), x, flat, 0.7, blocks=blocks)
    assert torch.allclose(made, expected, atol=1e-6)
    assert torch.allclose(logs, logits.flatten(2).transpose(1, 2).log_softmax(-1), atol=1e-5)


def test_tokens_are_the_most_likely_codes_row_by_row():
    found, x = model(), torch.rand(4, 3, 8, 12) * 2 - 1
    logits = plain(found.state_dict(), x, torch.zeros(()), 1.0)[1]
    assert torch.equal(found.tokens(x).view(4, 2, 3), logits.argmax(1))
    assert len(found.tokens(x).unique()) > 1


def test_sides_that_the_halvings_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"pictures of \(8, 10\) pixels: sides must be multiples of 4"):
        model().logits(torch.zeros(1, 3, 8, 10))


def test_straight_through_draws_from_one_code_and_teaches_all():
    found, x = model(), torch.rand(2, 3, 8, 8) * 2 - 1
    made, logs = found(x, keys(2), 1.0, straight_through=True)
    noisy = (logs + gumbel(keys(2), 4 * CODES).view(2, 4, CODES)).argmax(-1)
    assert torch.allclose(made, found.pictures(found.codebook.weight[noisy], (2, 2)), atol=1e-5)
    made.sum().backward()
    assert found.encoder[-1].bias.grad.abs().min() > 0


def test_the_logits_are_exact_under_autocast():
    found, x = model(layers=1, blocks=0), torch.rand(1, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        rows = found.logits(x)
    assert rows.dtype == torch.float32


@pytest.mark.parametrize("sizes", [(2, 0, 6), (2, 1, 6), (1, 2, 9), (3, 1, 4)])
def test_the_size_is_read_off_the_tensors(sizes):
    layers, blocks, codes = sizes
    state = model(layers, blocks, codes).state_dict()
    found = DiscreteVAE.from_shapes(state)
    found.load_state_dict(state)
    assert (found.codes, found.shrink) == (codes, 2**layers)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({}, "found nothing"),
        ({"blocks.input.w": torch.ones(8, 3, 7, 7)}, r"found blocks.input.w \(8, 3, 7, 7\)"),
        ({"codebook.weight": torch.ones(8)}, r"found codebook.weight \(8,\)"),
        ({"codebook.weight": torch.ones(8, 2), "encoder.0.0.weight": torch.ones(4, 3, 3, 3)}, "found codeb"),
    ],
)
def test_tensors_of_another_model_are_refused(state, found):
    with pytest.raises(DataError, match=rf"not the weights of a discrete VAE: expected .*; {found}"):
        DiscreteVAE.from_shapes(state)


def test_the_noise_is_gumbels():
    noise = gumbel(keys(8), 50_000).double()
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.57722, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    uniform = (-(-noise).exp()).exp()
    shares = torch.histc(uniform, 20, 0, 1) / uniform.numel()
    assert shares.min() > 0.048
    assert shares.max() < 0.052


def test_the_noise_of_places_and_pictures_is_unrelated():
    noise = gumbel(torch.tensor([[0, 0], [0, 1], [1, 2], [7, 9]], dtype=torch.int32), 50_000)
    neighbours = torch.stack([*noise, noise[0].roll(1), noise[0].roll(256), noise[1].roll(-1)])
    away = torch.corrcoef(neighbours) - torch.eye(7)
    assert away.abs().max() < 0.02


def test_the_noise_of_a_picture_does_not_depend_on_the_others():
    every = gumbel(keys(5), 300)
    assert torch.equal(gumbel(keys(5)[2:4], 300), every[2:4])
    assert torch.equal(gumbel(keys(5)[2:4], 100), every[2:4, :100])


def test_the_noise_is_the_hash_that_it_is_said_to_be():
    def mix(h):
        h = ((h ^ h >> 16) * 0x85EBCA6B) % 2**32
        h = ((h ^ h >> 13) * 0xC2B2AE35) % 2**32
        return h ^ h >> 16

    key = keys(1)
    low, high = (int(k) % 2**32 for k in key[0])
    uniform = [((mix(mix(i ^ low) ^ high) >> 9) + 0.5) / 2**23 for i in range(50)]
    expected = [-math.log(-math.log(u)) for u in uniform]
    assert torch.allclose(gumbel(key, 50)[0], torch.tensor(expected), atol=1e-5)


def test_the_divergence_is_torchs():
    logs = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    even = torch.full_like(logs, 1 / 7).log()
    expected = F.kl_div(even, logs, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(kl_to_uniform(logs.exp(), logs), expected, atol=1e-6)


def test_the_temperature_falls_from_start_to_end_and_stays():
    schedule = Schedule(1.0, 0.1, over=10, kl_over=4, window=5)
    found = [schedule.temperature(step) for step in (0, 5, 10, 99)]
    assert found == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert [schedule.warm(step) for step in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 1.0]
    assert Schedule(1.0, 0.1, 10, 0, 5).warm(0) == 1.0


@pytest.mark.parametrize("loss", ["mse", "smooth-l1"])
def test_the_losses_are_means_over_pixels_and_positions(loss):
    found, batch = learner(loss=loss), shots()
    counts = found.counts(batch)
    images = batch.pixels.float() / 127.5 - 1
    with torch.no_grad():
        sums, (made, logs) = found(batch), found.model(images, batch.keys, 1.0)
    error = F.mse_loss if loss == "mse" else F.smooth_l1_loss
    assert float(sums["pixels"][0]) / counts["pixels"] == pytest.approx(float(error(made, images)), rel=1e-5)
    kl = (logs.exp() * logs).sum(-1).mean() + math.log(CODES)
    assert float(sums["kl"][0]) / counts["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert counts == {"pixels": 3 * 3 * 8 * 8, "kl": 3 * 4, "balance": 3 * 4}


def test_the_divergence_warms_up_but_is_measured_whole():
    half, whole = learner()(shots(warm=0.5))["kl"], learner()(shots())["kl"]
    assert torch.allclose(half[0], 0.5 * whole[0])
    assert torch.equal(half[1], whole[1])


def test_balance_pulls_towards_codes_that_were_rare():
    found = learner()
    found.share.copy_(torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))
    found(shots())["balance"][0].backward()
    fall = found.model.encoder[-1].bias.grad
    assert fall[0] > 0
    assert (fall[1:] < 0).all()


def test_two_passes_are_one():
    one, two = learner(), learner()
    whole = shots(4)
    sums = one(whole)
    parts = [Shots(whole.pixels[a:b], whole.keys[a:b], 1.0, 1.0, not a, (), ()) for a, b in ((0, 1), (1, 4))]
    added = [two(part) for part in parts]
    for learned in (one, two):
        learned.after_step()
    for term, (loss, _) in sums.items():
        assert torch.allclose(loss, sum(part[term][0] for part in added), rtol=1e-5)
    assert torch.equal(one.usage, two.usage)
    assert torch.allclose(one.share, two.share)


def test_a_pass_without_pictures_adds_nothing():
    found = learner()
    sums = found(shots(0))
    assert all(float(loss.detach()) == 0 for loss, _ in sums.values())
    sum(loss for loss, _ in sums.values()).backward()
    assert not found.pending.any()


def test_use_is_counted_over_a_window():
    found = learner()
    for opens in (True, False, True):
        found(shots(opens=opens))
        found.after_step()
        last = found.usage.clone()
    tokens = found.model.tokens(shots().pixels.float() / 127.5 - 1)
    assert torch.equal(last, torch.bincount(tokens.flatten(), minlength=CODES).float())


def test_the_running_mean_stays_a_distribution():
    found = learner()
    for _ in range(3):
        found(shots())
        found.after_step()
    assert float(found.share.sum()) == pytest.approx(1.0)


def test_a_pass_that_is_not_finite_changes_no_count():
    found = learner()
    found(shots())
    found.after_step()
    share, usage = found.share.clone(), found.usage.clone()
    found(shots(opens=False))
    found.pending[0, 0] = float("nan")
    found.after_step()
    assert torch.equal(found.share, share)
    assert torch.equal(found.usage, usage)


def test_passes_without_a_step_do_not_count_after_a_checkpoint_was_loaded():
    found = learner()
    found(shots())
    found.loaded()
    assert not found.pending.any()


def use(used, codes=100, uses=50):
    return torch.zeros(codes).index_fill_(0, torch.arange(used), uses / max(1, used))


def test_a_collapsed_codebook_ends_the_run_with_advice():
    guard = UseGuard(100, 0.1, begin=10)
    for step in (20, 30):
        guard.check(step, use(3))
    with pytest.raises(
        DivergedError, match=r"at step 40.* 3 windows .* only 3 of 100 .* asks for 5.*kl_weight"
    ):
        guard.check(40, use(3))


@pytest.mark.parametrize(
    ("least", "begin", "used"),
    [(0.1, 10, (3, 3, 50, 3, 3)), (0.1, 100, (3,) * 5), (0.0, 0, (0,) * 5), (0.1, 0, (10,) * 5)],
    ids=["recovers", "too early", "switched off", "enough"],
)
def test_a_codebook_that_is_used_enough_goes_on(least, begin, used):
    guard = UseGuard(100, least, begin)
    for number, count in enumerate(used):
        guard.check(20 + number, use(count, uses=1000))


def test_few_patches_cannot_use_many_codes():
    guard = UseGuard(1000, 0.5, begin=0)
    for step in range(1, 6):
        guard.check(step, use(8, codes=1000, uses=10))
