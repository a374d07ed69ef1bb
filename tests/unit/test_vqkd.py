"""VQ-KD's model: what passes the codebook, and what leaves it alone."""

import pytest
import torch
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.codebook import Codebook
from beitctl.model.init import initial
from beitctl.model.vqkd import VQKDModel


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
    found = VQKDModel(config, 1, 5, Codebook(8, 4))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            parameter.copy_(initial(name, parameter.shape, config, 0))
    found.reset_buffers()
    found.codebook.vectors.copy_(F.normalize(torch.randn(8, 4), dim=-1))
    return found


def test_the_gradient_passes_the_codebook_to_the_encoder(model):
    features, commitment, codes = model.train()(torch.randn(2, 3, 16, 16))
    assert features.shape == (2, 16, 5)
    assert commitment.shape == (2, 16, 4)
    assert codes.shape == (2, 16)
    features.sum().backward()
    assert model.encoder.vision_embed.proj.weight.grad.abs().sum() > 0


def test_no_gradient_reaches_the_codes(model):
    features, commitment, _ = model.train()(torch.randn(2, 3, 16, 16))
    (features.sum() + commitment.sum()).backward()
    assert not model.codebook.vectors.requires_grad


def test_tokens_are_the_codes_of_the_forward_pass(model):
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(images)[2], model.tokens(images))


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_leaves_the_codebook_alone(model, training):
    before = {k: v.clone() for k, v in model.codebook.state_dict().items()}
    model.train(training)(torch.randn(2, 3, 16, 16))
    assert all(torch.equal(before[k], v) for k, v in model.codebook.state_dict().items())


def test_autocast_changes_no_code(model):
    z = model.eval().vectors(torch.randn(2, 3, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            model.codebook.assign(z.flatten(0, 1)), model.codebook.assign(z.flatten(0, 1).float())
        )
        assert model.to_code(torch.randn(2, 16)).dtype == torch.float32
