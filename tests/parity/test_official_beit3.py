"""Released BEiT-3 equals the official code (unilm 768a3c8, torchscale 4d1e0e8) on small random weights.

Reference: files, inputs and outputs of the official code in shared/reference/beit3, and the weight decay and
learning-rate scale that its optimizer factory gives every parameter. Tolerance 2e-5 absolute in fp32, 1e-4
relative for norms of gradients: the sums run in another order.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import beitctl
from beitctl.checkpoints import mapping
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.unilm_beit3 import UnilmBeit3
from beitctl.config import OptimConfig
from beitctl.engine.optim import adamw

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "beit3"
TOLERANCE = 2e-5
GRADIENTS = 1e-4
TASKS = ("retrieval", "vqa", "nlvr2", "classification", "captioning")
FORM = UnilmBeit3()
PICTURE = 10
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)


def file(task):
    return FOLDER / f"beit3_{task}.pth"


def table_of(task):
    """The table of a file, and its tensors."""
    state = read_tensors(file(task))
    config = FORM.config(state, {}, {"heads": 4})
    return FORM.table(config, {name: value.shape for name, value in state.items()}), state


def arrays(name):
    with np.load(FOLDER / name) as stored:
        return {key: torch.from_numpy(value) for key, value in stored.items()}


@pytest.fixture(scope="module")
def models():
    return {task: beitctl.load_model(file(task), heads=4) for task in TASKS}


@pytest.fixture(scope="module")
def inputs():
    found = arrays("inputs.npz")
    return found | {name: found[name].bool() for name in ("padding", "vision_masked")}


@pytest.fixture(scope="module")
def expected():
    return arrays("outputs.npz")


def texts(data):
    return {"text": data["ids"], "text_pad": data["padding"]}


def real(data):
    """(B, P + S) whether a row of a pair is a token."""
    return torch.cat([torch.ones(len(data["ids"]), PICTURE, dtype=torch.bool), ~data["padding"]], 1)


def retrieval_loss(models, data):
    pictures, words, scale = models["retrieval"](data["images"], **texts(data))
    logits, matches = scale * pictures @ words.T, torch.arange(len(words))
    return (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2


RUNS = {
    "trunk.vision": lambda m, d: m["retrieval"].model(d["images"]),
    "trunk.vision_masked": lambda m, d: m["retrieval"].model(d["images"], image_mask=d["vision_masked"]),
    "trunk.text": lambda m, d: m["retrieval"].model(**texts(d)),
    "trunk.pair": lambda m, d: m["retrieval"].model(d["images"], **texts(d)),
    "retrieval.vision_cls": lambda m, d: m["retrieval"].embed_image(d["images"]),
    "retrieval.language_cls": lambda m, d: m["retrieval"].embed_text(d["ids"], d["padding"]),
    "retrieval.loss": retrieval_loss,
    "vqa.logits": lambda m, d: m["vqa"](d["images"], **texts(d)),
    "nlvr2.logits": lambda m, d: m["nlvr2"](d["images"], image2=d["images2"], **texts(d)),
    "classification.logits": lambda m, d: m["classification"](d["images"]),
    "captioning.logits": lambda m, d: m["captioning"](d["images"], **texts(d)),
}
ROWS = {
    "trunk.text": lambda d: ~d["padding"],
    "trunk.pair": real,
    "captioning.logits": lambda d: ~d["padding"],
}
"""Rows that carry a meaning, where not all do."""


def test_every_output_of_the_reference_is_compared(expected):
    assert {name for name in expected if not name.startswith("grad.")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_an_output_equals_that_of_the_official_code(models, inputs, expected, name):
    with torch.no_grad():
        difference = (RUNS[name](models, inputs) - expected[name]).abs()
    if name in ROWS:
        difference = difference[ROWS[name](inputs)]
    assert difference.max() < TOLERANCE


@pytest.fixture(scope="module")
def gradients(inputs):
    """Gradients of sum(out ** 2) / rows of pairs, under the official names."""
    model = beitctl.load_model(file("retrieval"), heads=4)
    rows = model.model(inputs["images"], **texts(inputs))[real(inputs)]
    (rows.square().sum() / len(rows)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return mapping.write(table_of("retrieval")[0], found, {})


def test_the_same_parameters_have_gradients(gradients, expected):
    assert set(gradients) == {name.removeprefix("grad.") for name in expected if name.startswith("grad.")}


def test_every_gradient_has_the_norm_of_the_official_code(gradients, expected):
    off = {
        name: (float(value.norm()), float(expected[f"grad.{name}"]))
        for name, value in gradients.items()
        if float(value.norm()) != pytest.approx(float(expected[f"grad.{name}"]), rel=GRADIENTS)
    }
    assert off == {}


@pytest.mark.parametrize("task", TASKS)
def test_official_to_ours_to_official_is_bit_identical(task):
    table, state = table_of(task)
    tensors, unread = mapping.read(table, state)
    ours = FORM.table(
        FORM.config(state, {}, {"heads": 4}), {name: value.shape for name, value in tensors.items()}
    )
    written = mapping.write(ours, tensors, unread)
    assert set(written) == set(state)
    assert all(torch.equal(written[name], value) for name, value in state.items())
    assert all(written[name].shape == value.shape for name, value in state.items())


@pytest.mark.parametrize("task", TASKS)
def test_weight_decay_and_layer_decay_are_those_of_the_official_optimizer(models, task):
    note = json.loads((FOLDER / "param_groups.json").read_text())
    optim = OptimConfig(peak_lr=1e-3, weight_decay=note["weight_decay"], layer_decay=note["layer_decay"])
    model = models[task]
    groups = adamw(model, optim, model.model.config.layers).param_groups
    settings = {id(p): (group["weight_decay"], group["scale"]) for group in groups for p in group["params"]}
    found = {name: {settings[id(p)]} for name, p in model.named_parameters()}
    official = {name: (one["weight_decay"], one["lr_scale"]) for name, one in note["tasks"][task].items()}
    pairs = table_of(task)[0].pairs
    wanted = {
        name: {official.pop(their) for their in pair.theirs}
        for pair in pairs
        for name in pair.ours
        if name in found
    }
    assert official == {}
    assert found == wanted
