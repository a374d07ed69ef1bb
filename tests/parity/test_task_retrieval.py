"""Evaluation of retrieval says what the official BEiT-3 (unilm 768a3c8) says of pictures and captions.

Reference: files, inputs and outputs in shared/reference/beit3, as in test_task_heads.py. Tolerance 2e-5
absolute in fp32.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import beitctl
from beitctl.api import Example, Item, Tools
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import PIXELS, MultiwayLearner, Objective
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.retrieval import Retrieval

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "beit3"
TOLERANCE = 2e-5
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)


@pytest.fixture(scope="module")
def stored():
    """Inputs and outputs of the official code."""
    found = {}
    for name in ("inputs.npz", "outputs.npz"):
        with np.load(FOLDER / name) as file:
            found |= {key: torch.from_numpy(value) for key, value in file.items()}
    return found


@pytest.fixture(scope="module")
def learner():
    file = beitctl.load_model(FOLDER / "beit3_retrieval.pth", heads=4)
    config = file.model.config
    made = MultiwayLearner(Multiway(config), [Objective("task", Retrieval())], {"task": Tools(config)}).eval()
    made.load_state_dict(file.state_dict())
    return made


def items(learner, stored):
    """Every picture with its caption twice and that of the next picture, as in evaluation."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in PIXELS[learner.model.config.pixels])
    lengths = (stored["padding"] == 0).sum(1).numpy()
    found = []
    for number in range(3):
        own = [number, number, (number + 1) % 3]
        texts, image = stored["ids"][own].numpy(), (stored["images"][number] * std + mean).numpy()
        extra = {"texts": texts, "lengths": lengths[own], "cut": np.zeros(3, np.uint8)}
        found.append(Item(image=image, text=texts[0, : lengths[number]], extra=extra))
    return found


def test_vectors_of_evaluation_equal_those_of_the_official_code(learner, stored):
    chunk = [(Example(str(n)), item) for n, item in enumerate(items(learner, stored))]
    with torch.no_grad():
        found = Retrieval().infer(learner, chunk, Tools(learner.model.config))
    assert found["counts"].tolist() == [3, 3, 3]
    assert (found["pictures"] - stored["retrieval.vision_cls"]).abs().max() < TOLERANCE
    expected = stored["retrieval.language_cls"][[0, 0, 1, 1, 1, 2, 2, 2, 0]]
    assert (found["texts"] - expected).abs().max() < TOLERANCE


def test_the_loss_of_the_vectors_of_evaluation_is_that_of_the_official_code(learner, stored):
    chunk = [(Example(str(n)), item) for n, item in enumerate(items(learner, stored))]
    with torch.no_grad():
        found = Retrieval().infer(learner, chunk, Tools(learner.model.config))
        logits = learner.heads["contrastive"].logit_scale.exp() * found["pictures"] @ found["texts"][::3].T
    truth = torch.arange(3)
    loss = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    assert abs(loss - stored["retrieval.loss"]) < TOLERANCE


def test_the_task_of_items_as_in_evaluation_has_the_official_loss(learner, stored):
    made, config = items(learner, stored), learner.model.config
    packed = collate([Portion("task", "dual", made)], config)
    with torch.no_grad():
        total, _ = learner(packed)["task"]
    assert abs(total / 3 - stored["retrieval.loss"]) < TOLERANCE
