"""Tasks say and learn what the official BEiT-3 (unilm 768a3c8) does, from its files and on packed batches.

Reference: files, inputs and outputs in shared/reference/beit3. Tolerance 2e-5 absolute in fp32: the sums run
in another order. Our texts stand without their padding.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import beitctl
from beitctl.api import Item, Tools
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import PIXELS, MultiwayLearner, Objective
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.tasks.nlvr2 import NLVR2Task
from beitctl_plugins.tasks.retrieval import Retrieval
from beitctl_plugins.tasks.vqa import VQA

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "beit3"
TOLERANCE = 2e-5
ANSWERS, CLASSES = tuple(map(str, range(37))), tuple(map(str, range(21)))
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)
CASES = {
    "vqa": (VQA(), ANSWERS),
    "nlvr2": (NLVR2Task(), ("False", "True")),
    "classification": (Classification(label_smoothing=0.1), CLASSES),
    "retrieval": (Retrieval(), ()),
}
SPARSE = (((3, 20), (1.0, 0.3)), ((36,), (0.6,)), ((), ()))
"""Numbers of answers and their scores, for every sample."""
TRUTH = (1, 0, 1)


def arrays(name):
    with np.load(FOLDER / name) as stored:
        return {key: torch.from_numpy(value) for key, value in stored.items()}


@pytest.fixture(scope="module")
def inputs():
    return arrays("inputs.npz")


@pytest.fixture(scope="module")
def expected():
    return arrays("outputs.npz")


def learner(name):
    """The task over the official weights, all of which have a place."""
    task, labels = CASES[name]
    file = beitctl.load_model(FOLDER / f"beit3_{name}.pth", heads=4)
    config = file.model.config
    assert getattr(task, "fitted", lambda same: same)(config) == config
    made = MultiwayLearner(
        Multiway(config), [Objective("task", task)], {"task": Tools(config, labels=labels)}
    ).eval()
    made.load_state_dict(file.state_dict())
    return made


def batch(made, inputs):
    """A packed batch of the reference inputs, whose pixels come back from normalising as they are there."""
    task, config = made.objectives[0].task, made.model.config
    blank = np.zeros((3, *config.size), np.uint8)
    items = [
        Item(
            image=None if task.layout == "text" else blank,
            second=blank if task.layout == "two-pairs" else None,
            text=None if task.layout == "image" else ids[padding == 0].numpy(),
            label=label,
            extra={"answers": np.array(numbers, np.int64), "scores": np.array(values, np.float32)},
        )
        for ids, padding, label, (numbers, values) in zip(
            inputs["ids"], inputs["padding"], TRUTH, SPARSE, strict=True
        )
    ]
    pictures = [inputs["images"]] + ([inputs["images2"]] if task.layout == "two-pairs" else [])
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in PIXELS[config.pixels])
    return replace(
        collate([Portion("task", task.layout, items)], config), pixels=torch.cat(pictures) * std + mean
    )


@pytest.mark.parametrize("name", ["vqa", "nlvr2", "classification"])
def test_logits_of_a_task_equal_those_of_the_official_code(inputs, expected, name):
    made = learner(name)
    with torch.no_grad():
        found = made.outputs(batch(made, inputs))["task"]
    assert (found - expected[f"{name}.logits"]).abs().max() < TOLERANCE


def test_vectors_of_retrieval_equal_those_of_the_official_code(inputs, expected):
    made = learner("retrieval")
    with torch.no_grad():
        pictures, texts, _ = made.outputs(batch(made, inputs))["task"]
    assert (pictures - expected["retrieval.vision_cls"]).abs().max() < TOLERANCE
    assert (texts - expected["retrieval.language_cls"]).abs().max() < TOLERANCE


def soft(logits):
    """What the official loader makes of labels and scores."""
    found = torch.zeros_like(logits)
    for row, (numbers, values) in enumerate(SPARSE):
        for number, value in zip(numbers, values, strict=True):
            found[row, number] = value
    return found


def of_vqa(out):
    """BCEWithLogitsLoss(reduction="mean") * labels.size(1)."""
    logits = out["vqa.logits"]
    return F.binary_cross_entropy_with_logits(logits, soft(logits)) * 37


LOSSES = {
    "vqa": of_vqa,
    "nlvr2": lambda out: F.cross_entropy(out["nlvr2.logits"], torch.tensor(TRUTH)),
    "classification": lambda out: F.cross_entropy(
        out["classification.logits"], torch.tensor(TRUTH), label_smoothing=0.1
    ),
    "retrieval": lambda out: out["retrieval.loss"],
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_task_equals_that_of_the_official_code(inputs, expected, name):
    made = learner(name)
    packed = batch(made, inputs)
    with torch.no_grad():
        total, _ = made(packed)["task"]
    assert abs(total / made.counts(packed)["task"] - LOSSES[name](expected)) < TOLERANCE
