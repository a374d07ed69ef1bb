"""BEiT-1 and BEiT v2 equal the official code (microsoft/unilm 768a3c8) on small random weights.

Reference: inputs and outputs of the official code in shared/reference/beit12. Tolerance 2e-5 absolute in
fp32: the sums run in another order. Gradients there are norms: 1e-4 relative.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from beitctl.checkpoints import mapping
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.loading import load_model, read_model
from beitctl.checkpoints.unilm_beit import UnilmBeit

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "beit12"
TOLERANCE = 2e-5
FILES = ("beit_mim", "beit_classification", "beit2_mim")
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)


def arrays(name):
    return {k: torch.from_numpy(v) for k, v in np.load(FOLDER / f"{name}.npz").items()}


def masked_logits(name, inputs):
    """Logits of every output of a pretraining model at the hidden patches."""
    model = load_model(FOLDER / f"{name}.pth")
    found = model(inputs["images"], image_mask=inputs["mask"])
    return model, {kind: logits[inputs["mask"]] for kind, logits in found.items()}


def difference(found, expected):
    return (found - expected).abs().max().item()


def test_logits_of_hidden_patches_equal_beit_1():
    _, found = masked_logits("beit_mim", arrays("beit_inputs"))
    assert difference(found["image"], arrays("beit_outputs")["mim.logits"]) < TOLERANCE


def test_class_logits_equal_beit_1():
    model = load_model(FOLDER / "beit_classification.pth")
    found = model(arrays("beit_inputs")["images"])
    assert difference(found, arrays("beit_outputs")["classification.logits"]) < TOLERANCE


def test_logits_of_hidden_patches_equal_beit_v2():
    _, found = masked_logits("beit2_mim", arrays("beit2_inputs"))
    assert difference(found["image"], arrays("beit2_outputs")["mim.logits"]) < TOLERANCE


def test_logits_through_the_bottleneck_equal_beit_v2():
    _, found = masked_logits("beit2_mim", arrays("beit2_inputs"))
    assert difference(found["class"], arrays("beit2_outputs")["mim.cls_logits"]) < TOLERANCE


def test_gradients_of_every_parameter_equal_beit_1():
    model, found = masked_logits("beit_mim", arrays("beit_inputs"))
    found["image"].logsumexp(-1).mean().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    table = UnilmBeit().table(model.model.config, {name: grad.shape for name, grad in ours.items()})
    theirs = mapping.write(table, ours, {})
    norms = {
        k.removeprefix("grad."): v.item() for k, v in arrays("beit_outputs").items() if k.startswith("grad.")
    }
    assert {name: theirs[name].norm().item() for name in norms} == pytest.approx(norms, rel=1e-4)
    assert len(norms) == len(ours) == 39


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_written_back_bit_for_bit(name):
    official = read_tensors(FOLDER / f"{name}.pth")
    stored = read_model(FOLDER / f"{name}.pth")
    table = UnilmBeit().table(stored.model, {name: value.shape for name, value in stored.tensors.items()})
    written = mapping.write(table, stored.tensors, stored.unread)
    assert sorted(written) == sorted(official)
    assert all(torch.equal(written[key], value) for key, value in official.items())
    assert all(written[key].dtype == value.dtype for key, value in official.items())


@pytest.mark.parametrize("name", FILES)
def test_nothing_of_ours_is_without_a_place_in_the_format(name):
    stored = read_model(FOLDER / f"{name}.pth")
    table = UnilmBeit().table(stored.model, {name: value.shape for name, value in stored.tensors.items()})
    assert mapping.untold(table, stored.tensors) == []


@pytest.mark.parametrize("size", [96, (64, 48)])
def test_pictures_of_another_size_are_classified(size):
    model = load_model(FOLDER / "beit_classification.pth", image_px=size)
    logits = model(torch.zeros(2, 3, *model.model.config.size))
    assert logits.shape == (2, 23)
    assert logits.isfinite().all()
