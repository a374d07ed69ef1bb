"""The model with the heads of its objectives."""

import numpy as np
import pytest
import torch
from small import MODEL, coloured, rng, tools, weights

from beitctl.api import Example
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import HALF, MultiwayLearner, Objective, normalise
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.masked import MaskedImage, MaskedPair, MaskedText

OBJECTIVES = [
    Objective("image", MaskedImage(min_block=2)),
    Objective("text", MaskedText(mask_ratio=0.5), 2.0),
    Objective("pair", MaskedPair(min_block=2, image_weight=0.5), 3.0),
]


@pytest.fixture
def learner():
    found = MultiwayLearner(Multiway(MODEL), OBJECTIVES, dict.fromkeys(("image", "text", "pair"), tools()))
    with torch.no_grad():
        for name, value in weights(found, "").items():
            found.get_parameter(name).copy_(value)
    return found


def portion(objective, count, keep=None):
    pictures = coloured(*["blue", "red"][:count]).open()
    prose = Example("t", text="some prose")
    items = [
        objective.task.prepare(prose if objective.name == "text" else pictures[i], rng(i), tools())
        for i in range(count)
    ]
    return Portion(objective.name, objective.task.layout, items, keep)


def batch(counts=(2, 2, 2), keep=False):
    scale = np.zeros((2, 1, 2), np.float32) if keep else None
    portions = [portion(o, n, scale) for o, n in zip(OBJECTIVES, counts, strict=True)]
    return collate(portions, MODEL)


def test_terms_are_named_by_objective_and_weighted_by_both_weights(learner):
    assert learner.weights == {"image": 1.0, "text": 2.0, "pair": 3.0, "pair.image": 1.5}


def test_objectives_share_heads_of_one_name(learner):
    assert sorted(learner.heads) == ["image_codes", "text_tokens"]


def test_a_forward_pass_gives_every_term_in_the_order_of_the_weights(learner):
    assert list(learner(batch())) == list(learner.weights)


def test_counts_are_the_predictions_of_every_term(learner):
    assert learner.counts(batch()) == {"image": 12, "text": 8, "pair": 8, "pair.image": 12}


def test_an_objective_without_samples_has_no_loss_and_every_parameter_a_gradient(learner):
    sums = learner(batch((2, 0, 0)))
    assert sums["text"][0].item() == 0
    torch.stack([total for total, _ in sums.values()]).sum().backward()
    assert [name for name, p in learner.named_parameters() if p.grad is None] == []


def test_an_objective_alone_has_the_loss_that_it_has_beside_others(learner):
    together, alone = learner(batch())["text"][0], learner(batch((0, 2, 0)))["text"][0]
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)


def test_outputs_are_named_by_objective_and_as_many_as_predictions(learner):
    found = learner.outputs(batch())
    sizes = {name: {unit: len(ids) for unit, ids in said.items()} for name, said in found.items()}
    assert sizes == {"image": {"patch": 12}, "text": {"text": 8}, "pair": {"text": 8, "patch": 12}}


def test_stochastic_depth_acts_in_training(learner):
    dropped = batch(keep=True)
    assert not torch.equal(learner.train().encode(dropped).rows, learner.train().encode(batch()).rows)


def test_stochastic_depth_is_off_in_evaluation(learner):
    assert torch.equal(learner.eval().encode(batch(keep=True)).rows, learner.eval().encode(batch()).rows)


def test_half_maps_bytes_to_minus_one_and_one():
    found = normalise(torch.tensor([[0, 255]], dtype=torch.uint8).expand(1, 3, 1, 2), HALF)
    assert found.flatten().tolist() == pytest.approx([-1, 1] * 3)


def test_statistics_are_per_channel():
    pixels = torch.tensor([124, 116, 104], dtype=torch.uint8).reshape(1, 3, 1, 1)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalise(pixels, imagenet).flatten().tolist() == pytest.approx([0, 0, 0], abs=0.02)
