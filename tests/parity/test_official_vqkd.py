"""VQ-KD equals the official tokenizer on small random weights: codes, features, losses, a step of training.

Reference: outputs of microsoft/unilm 768a3c8 (beit2/modeling_vqkd.py) in shared/reference/beit12. Tolerance
2e-5 absolute in fp32: the sums run in another order. The official code takes pixels in 0..1, ours in -1..1.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import beitctl
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.unilm_vqkd import read_vqkd, write_vqkd
from beitctl.engine.learner import HALF, normalise
from beitctl.model.codebook import Rules, Upkeep
from beitctl_plugins.tokenizers.vqkd_learner import Losses, Views, VQKDLearner

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "beit12"
FILE = FOLDER / "beit2_vqkd.pth"
TOLERANCE = 2e-5
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)


@pytest.fixture
def model():
    """Fresh for every test: one of them trains it."""
    return beitctl.load_tokenizer(FILE, heads=4).model


@pytest.fixture(scope="module")
def inputs():
    """Pictures in -1..1, and the teacher's features."""
    found = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "beit2_vqkd_inputs.npz").items()}
    return found["images01"] * 2 - 1, found["teacher_target"]


@pytest.fixture(scope="module")
def expected():
    outputs = np.load(FOLDER / "beit2_outputs.npz").items()
    return {k.removeprefix("vqkd."): torch.from_numpy(v) for k, v in outputs if k.startswith("vqkd.")}


def difference(found, expected):
    assert found.shape == expected.shape
    return (found - expected).abs().max()


def losses(model, inputs):
    """Commitment and reconstruction, as the official code means them."""
    images, target = inputs
    features, commitment, _ = model(images)
    return commitment.mean(), (1 - F.cosine_similarity(features, target, dim=-1)).mean()


def test_codes_equal(model, inputs, expected):
    assert torch.equal(model.tokens(inputs[0]), expected["tokens"])


def test_vectors_of_codes_equal(model, inputs, expected):
    _, _, codes = model(inputs[0])
    found = model.codebook.vectors[codes].transpose(1, 2).reshape(expected["quantized"].shape)
    assert difference(found, expected["quantized"]) < TOLERANCE


def test_features_equal(model, inputs, expected):
    assert difference(model(inputs[0])[0], expected["reconstruction"]) < TOLERANCE


def test_losses_equal(model, inputs, expected):
    commitment, reconstruction = losses(model, inputs)
    assert difference(commitment, expected["commit_loss"]) < TOLERANCE
    assert difference(reconstruction, expected["rec_loss"]) < TOLERANCE


def trained(model, inputs):
    """The model after one step of training as the released code makes it, but for the optimizer."""
    learner = VQKDLearner(model, Losses(), Upkeep(model.codebook, Rules(), samples=len(inputs[0])))
    learner.upkeep.reset_buffers()
    pictures, target = (inputs[0] + 1) * 127.5, inputs[1]
    batch = Views(pictures, pictures, torch.arange(len(pictures)))
    learner.teach(lambda _: target).train().requires_grad_(True)
    sums, counts = learner(batch), learner.counts(batch)
    sum(sums[term][0] / counts[term] for term in sums).backward()
    learner.after_step()
    return model


def test_the_codebook_after_one_step_equals(model, inputs, expected):
    before = model.codebook.vectors.clone()
    found = trained(model, inputs).codebook.vectors
    assert difference(found, expected["codebook_after_one_update"]) < TOLERANCE
    assert difference(found, before) > TOLERANCE


def test_the_gradient_of_the_first_layer_equals(model, inputs, expected):
    found = trained(model, inputs).encoder.vision_embed.proj.weight.grad
    wanted = expected["grad_encoder_first"]
    assert difference(found, wanted.flatten(1)) < TOLERANCE
    assert float(found.norm()) == pytest.approx(float(wanted.norm()), rel=1e-4)


def test_the_tokenizer_reads_bytes(inputs):
    images = (torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    tokenizer = beitctl.load_tokenizer(FILE, heads=4)
    assert torch.equal(tokenizer.encode(images), tokenizer.model.tokens(normalise(images, HALF)))


def test_the_file_is_written_back_bit_for_bit():
    official = read_tensors(FILE)
    sizes, tensors, unread = read_vqkd(official, heads=4)
    written = write_vqkd(sizes, tensors, unread)
    assert written.keys() == official.keys()
    assert all(torch.equal(written[name], value) for name, value in official.items())
    assert all(written[name].dtype == value.dtype for name, value in official.items())


def test_a_model_that_took_the_tensors_is_written_back_bit_for_bit(model):
    official = read_tensors(FILE)
    sizes, _, unread = read_vqkd(official, heads=4)
    written = write_vqkd(sizes, model.state_dict(), unread)
    assert all(torch.equal(written[name], value) for name, value in official.items())
