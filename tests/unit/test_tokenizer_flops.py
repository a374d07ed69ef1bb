"""What a batch of the trainable image tokenizers costs, beside what torch counts while they train on it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beitctl.config import ModelConfig
from beitctl.model.codebook import Codebook, Rules, Upkeep
from beitctl.model.dvae import DiscreteVAE, initial_dvae
from beitctl.model.vqkd import VQKDModel
from beitctl_plugins.tokenizers.dvae_learner import DVAELearner, Shots
from beitctl_plugins.tokenizers.vqkd_learner import Losses, Views, VQKDLearner

ENCODER = ModelConfig(layers=2, width=32, heads=2, ffn=64, image_px=24, patch_px=4, mask_token=False)


def counted(learner, batch):
    with FlopCounterMode(display=False) as counter:
        sums = learner(batch)
        torch.stack([sums[term][0] for term in learner.weights]).sum().backward()
    return counter.get_total_flops()


def vqkd(awake):
    model = VQKDModel(ENCODER, 1, 24, Codebook(40, 8))
    learner = VQKDLearner(model, Losses(), Upkeep(model.codebook, Rules(), samples=3))
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.normal_(std=0.1)
    for part in learner.modules():
        if hasattr(part, "reset_buffers"):
            part.reset_buffers()
    model.codebook.vectors.normal_()
    model.codebook.ready.fill_(int(awake))
    pixels = torch.randint(0, 256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(0))
    target = torch.randn(3, 36, 24)
    batch = Views(pixels.to(torch.uint8), pixels.to(torch.uint8), torch.arange(3))
    return learner.teach(lambda images: target), batch


@pytest.mark.parametrize("awake", [True, False], ids=["with codes", "before there are codes"])
def test_operations_of_vqkd_are_those_that_torch_counts(awake):
    learner, batch = vqkd(awake)
    assert learner.flops(batch) == pytest.approx(counted(learner, batch), rel=1e-3)


@pytest.mark.parametrize("px", [16, 32])
def test_operations_of_a_dvae_are_those_that_torch_counts(px):
    model = DiscreteVAE(2, 16, 1, 48, 12)
    learner = DVAELearner(model, 0.5, 0.5, "mse", hard=False)
    learner.reset_buffers()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(initial_dvae(name, value.shape, 0))
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, px, px), generator=draw).to(torch.uint8)
    noise = torch.randint(0, 9, (3, 2), generator=draw).to(torch.int32)
    batch = Shots(pixels, noise, 1.0, 1.0, True, ("a", "b", "c"), ())
    assert learner.flops(batch) == pytest.approx(counted(learner, batch), rel=1e-3)
