"""Every shipped pretraining recipe can learn: its loss on one repeated batch falls to under a tenth.

The recipe's own structure (positions, norms, experts, bottleneck, heads, objectives) at toy size, as
``--smoke`` makes it; parents as in the recipe ``tiny``, replaced here by a token store and a text tokenizer
made at random.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from beitctl import recipe, smoke
from beitctl.api import Tools
from beitctl.data.images import Crop, Pictures
from beitctl.data.loader import Place, StepData, Stream
from beitctl.engine import optim
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.shard import fill
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway

STEPS, SHARE = 300, 0.1


class Codes:
    """A token store with random codes for any picture."""

    views, codes, grid, image_px = 1, 32, 4, 32

    def view(self, id, number):
        draw = np.random.default_rng(sum(id.encode()))
        return Crop(0, 0, 32, 32), draw.integers(0, self.codes, 16)


class Words:
    """A text tokenizer with one id for each letter."""

    size, fingerprint = 402, "words"
    start_id, pad_id, end_id, unknown_id, mask_id = 0, 1, 2, 3, 401
    special_ids = (0, 1, 2, 3, 401)

    def encode(self, text):
        return [4 + ord(letter) % 390 for letter in text[:30]]

    def starts(self, ids):
        return [index % 3 == 0 for index in range(len(ids))]


def tables():
    found = []
    for name in recipe.names():
        keys = [key for key in recipe.load(name).tables if key.partition(".")[0] == "pretrain"]
        found += [(name, key) for key in keys]
    return found


def learner_and_batch(name, key):
    stage = smoke.shrunk(recipe.load(name), "pretrain", [key]).tables[key].plugin
    model = replace(stage.model, drop_path=0.0)
    tools = Tools(model, Words(), Codes(), labels=stage._labels(), pictures=Pictures())
    objectives = [Objective(n, table.task, table.weight) for n, table in stage.objectives.items()]
    learner = MultiwayLearner(Multiway(model), objectives, dict.fromkeys(stage.objectives, tools))
    fill(learner, lambda name, shape: initial(name, shape, model, 0))
    streams = [Stream(n, t.task, t.source.open(), t.samples, tools) for n, t in stage.objectives.items()]
    (batch,) = StepData(streams, model, 0, Place())[0]
    return learner, batch, stage.train.optim


@pytest.mark.parametrize(("name", "key"), tables())
def test_the_loss_on_one_batch_falls_to_under_a_tenth(name, key):
    learner, batch, settings = learner_and_batch(name, key)
    counts = learner.counts(batch)
    optimizer = optim.adamw(learner, replace(settings, weight_decay=0.0, betas=(0.9, 0.98)), 4)
    losses = []
    for step in range(STEPS):
        optim.set_lr(optimizer, 3e-3 * min(1.0, (step + 1) / 20))
        sums = learner(batch)
        loss = torch.stack([learner.weights[t] * sums[t][0] / counts[t] for t in learner.weights]).sum()
        losses.append(float(loss.detach()))
        if losses[-1] < SHARE * losses[0]:
            return
        optimizer.zero_grad()
        loss.backward()
        optim.clip(learner, 1.0)
        optimizer.step()
    raise AssertionError(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} after {STEPS} steps")
