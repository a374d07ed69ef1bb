"""The task ``classification`` says what the official code says, on small random weights.

Reference: files, inputs and outputs of the official code in shared/reference. Tolerance 2e-5 absolute in
fp32: the sums run in another order.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from beitctl.api import Item, Tools
from beitctl.checkpoints.loading import read_model
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.model.multiway import Multiway, Packed
from beitctl_plugins.tasks.classification import Classification

FOLDER = Path(__file__).parents[3] / "shared" / "reference"
TOLERANCE = 2e-5
FILES = {
    "beit3": ("beit3/beit3_classification.pth", "beit3/inputs.npz", "beit3/outputs.npz", {"heads": 4}),
    "beit": ("beit12/beit_classification.pth", "beit12/beit_inputs.npz", "beit12/beit_outputs.npz", {}),
}
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)


def array(file, name):
    with np.load(FOLDER / file) as stored:
        return torch.from_numpy(stored[name])


def said(name):
    """What the task says of the official pictures, and what it should."""
    weights, inputs, outputs, settings = FILES[name]
    stored = read_model(FOLDER / weights, settings)
    task, config = Classification(), stored.model
    classes = len(stored.tensors["heads.classifier.linear.weight"])
    tools = Tools(config, labels=tuple(map(str, range(classes))), train=False)
    assert task.fitted(config) == config
    learner = MultiwayLearner(Multiway(config), [Objective("task", task)], {"task": tools})
    learner.load_state_dict({key: stored.tensors[key] for key in learner.state_dict()})
    pixels = array(inputs, "images")
    items = [Item(image=np.zeros((3, *config.size), np.uint8), label=0) for _ in pixels]
    batch = collate([Portion("task", "image", items)], config)
    packed = Packed(
        layout=learner.model.layout(batch.plan), pixels=pixels, image_mask=batch.image_mask, ids=batch.ids
    )
    with torch.no_grad():
        encoded = learner.eval().model.encoded(packed, [])
        found = task.output(encoded, batch.groups["task"], dict(learner.heads.items()))
    return found, array(outputs, "classification.logits")


@pytest.mark.parametrize("name", FILES)
def test_the_logits_equal_those_of_the_official_code(name):
    found, expected = said(name)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", FILES)
def test_the_comparison_can_fail(name):
    found, expected = said(name)
    assert (found.roll(1, 0) - expected).abs().max() > 100 * TOLERANCE
