"""The codebook: it starts from the data, follows them, and wakes codes that nothing uses."""

import math

import pytest
import torch
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.init import initial
from beitctl.model.vqkd import Codebook, VQKDModel, perplexity


def book(codes=4, width=2, decay=0.9, revive_after=0, start_after=0):
    found = Codebook(codes, width, decay=decay, revive_after=revive_after, start_after=start_after)
    found.reset_buffers()
    return found


def unit(*angles):
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def test_it_starts_on_the_clusters_of_the_data():
    found = book()
    centres = unit(0.0, 1.5, 3.0, 4.5)
    cloud = F.normalize(
        centres.repeat(50, 1) + 0.01 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    found.start(cloud)
    assert len(found.assign(centres).unique()) >= 3
    assert torch.allclose(found.vectors.norm(dim=-1), torch.ones(4))


def test_it_starts_once():
    found = book()
    found.start(unit(*torch.linspace(0, 6, 20).tolist()))
    before = found.vectors.clone()
    found.start(unit(*torch.linspace(1, 2, 20).tolist()))
    assert torch.equal(found.vectors, before)


def test_a_used_code_moves_toward_the_mean_and_others_stay():
    found = book(codes=2)
    found.vectors.copy_(unit(0.0, 3.0))
    z = unit(0.2, 0.4)
    found.follow(z, found.assign(z))
    mean = F.normalize(z.mean(0), dim=0)
    assert torch.allclose(found.vectors[0], F.normalize(0.9 * unit(0.0)[0] + 0.1 * mean, dim=0))
    assert torch.equal(found.vectors[1], unit(3.0)[0])


def test_an_idle_code_is_put_on_the_data():
    found = book(codes=2, revive_after=3)
    found.vectors.copy_(unit(0.0, 3.0))
    z = unit(0.1, 0.2)
    for _ in range(3):
        found.follow(z, found.assign(z))
    assert float((found.vectors[1] @ z.T).max()) == pytest.approx(1.0)


def test_without_revival_an_idle_code_stays_dead():
    found = book(codes=2)
    found.vectors.copy_(unit(0.0, 3.0))
    for _ in range(20):
        found.follow(unit(0.1), torch.tensor([0]))
    assert torch.equal(found.vectors[1], unit(3.0)[0])


def test_perplexity_counts_codes_in_even_use():
    assert perplexity(torch.tensor([5.0, 5.0, 5.0, 5.0, 0.0])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([9.0, 0.0])) == pytest.approx(1.0)


@pytest.fixture
def model():
    config = ModelConfig(
        layers=2,
        width=16,
        heads=2,
        ffn=32,
        image_px=16,
        patch_px=4,
        norm="pre",
        key_bias=False,
        init="magneto",
    )
    found = VQKDModel(config, 1, 5, book(codes=8, width=4))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.copy_(initial(name, parameter.shape, config, 0))
    found.reset_buffers()
    return found


def test_the_gradient_passes_the_codebook_to_the_encoder(model):
    features, commitment, codes = model.train()(torch.randn(2, 3, 16, 16))
    assert features.shape == (2, 16, 5)
    assert commitment.shape == (2, 16, 4)
    assert codes.shape == (2, 16)
    features.sum().backward()
    assert model.encoder.vision_embed.proj.weight.grad.abs().sum() > 0


def test_tokens_are_the_codes_of_the_forward_pass(model):
    images = torch.randn(2, 3, 16, 16)
    model.train()(images)
    assert torch.equal(model.eval()(images)[2], model.tokens(images))


def test_evaluation_leaves_the_codebook_alone(model):
    model.train()(torch.randn(2, 3, 16, 16))
    before = {k: v.clone() for k, v in model.codebook.state_dict().items()}
    model.eval()(torch.randn(2, 3, 16, 16))
    assert all(torch.equal(before[k], v) for k, v in model.codebook.state_dict().items())


def test_the_codebook_sleeps_for_the_first_steps(model):
    model.codebook.start_after = 2
    model.train()
    for _ in range(2):
        _, commitment, _ = model(torch.randn(2, 3, 16, 16))
        assert not commitment.any()
    assert not int(model.codebook.ready)
    _, commitment, _ = model(torch.randn(2, 3, 16, 16))
    assert int(model.codebook.ready)
    assert commitment.any()


def test_features_lose_the_mean_of_the_first_batch(model):
    first, later = torch.randn(2, 16, 5) + 3, torch.randn(2, 16, 5)
    model.train()
    assert model.centred(first).mean((0, 1)).abs().max() < 1e-6
    assert torch.allclose(model.centred(later), later - first.mean((0, 1)))


def test_autocast_changes_no_code(model):
    images = torch.randn(2, 3, 16, 16)
    model.train()(images)
    z = model.eval().vectors(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            model.codebook.assign(z.flatten(0, 1)), model.codebook.assign(z.flatten(0, 1).float())
        )
        assert model.to_code(torch.randn(2, 16)).dtype == torch.float32
