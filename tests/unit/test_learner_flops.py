"""What a learner says a batch costs, beside what torch counts while it trains on it.

All texts of a batch are equally long here, so that the padded attention that torch counts is useful work.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import Letters
from torch.utils.flop_counter import FlopCounterMode

from beitctl.api import Item, Tools
from beitctl.config import ModelConfig
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.tasks.contrast import ContrastAndMatch
from beitctl_plugins.tasks.masked import Bottleneck, MaskedImage, MaskedPair, MaskedText
from beitctl_plugins.tasks.retrieval import Retrieval

PAPER = ModelConfig(
    layers=3, width=32, heads=2, ffn=96, image_px=24, patch_px=4, vocabulary=52, text_tokens=24,
    fusion_layers=1,
)  # fmt: skip
DECOUPLED = replace(PAPER, fusion_layers=0, attention="decoupled")
BEIT1 = ModelConfig(
    layers=3, width=32, heads=2, ffn=96, image_px=24, patch_px=4, position="relative-shared", norm="pre",
    key_bias=False, layer_scale=0.1,
)  # fmt: skip
LENGTH = 9


class Store:
    views, codes, grid = 1, 40, 6


def item(layout, config, labelled):
    mask = np.arange(config.patches) % 3 == 0
    picture = {"image": np.zeros((3, *config.size), np.uint8)}
    if not labelled:
        picture |= {"image_mask": mask, "patch_targets": np.where(mask, 1, -1)}
    text = {"text": np.full(LENGTH, 6), "text_targets": np.where(np.arange(LENGTH) < 2, 5, -1)}
    return Item(
        **(picture if layout != "text" else {}),
        **(text if layout != "image" else {}),
        label=int(labelled),
        chance=(0.3, 0.6),
    )


def made(config, tasks, samples=4):
    """A learner of some tasks and a batch for it."""
    objectives = [Objective(name, task) for name, task in tasks.items()]
    tools = Tools(config, Letters(), Store(), ("cat", "dog", "emu"))
    learner = MultiwayLearner(Multiway(config), objectives, dict.fromkeys(tasks, tools))
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.normal_(std=0.02)
    portions = [
        Portion(
            o.name, o.task.layout,
            [item(o.task.layout, config, getattr(o.task, "labelled", False)) for _ in range(samples)],
        )
        for o in objectives
    ]  # fmt: skip
    return learner, collate(portions, config)


def counted(learner, batch):
    """Operations of a forward and a backward pass that torch counts."""
    with FlopCounterMode(display=False) as counter:
        sums = learner(batch)
        torch.stack([total for total, _ in sums.values()]).sum().backward()
    return counter.get_total_flops()


MIXED = {"image": MaskedImage(), "text": MaskedText(), "pair": MaskedPair()}
LEARNERS = {
    "BEiT-3 as in the paper": (PAPER, MIXED),
    "BEiT-3 as released": (DECOUPLED, MIXED),
    "BEiT-1": (BEIT1, {"image": MaskedImage()}),
    "BEiT v2": (BEIT1, {"image": MaskedImage(bottleneck=Bottleneck(early_layers=2, head_layers=2))}),
    "classification": (replace(BEIT1, final_norm=False), {"task": Classification()}),
    "retrieval": (DECOUPLED, {"task": Retrieval()}),
    "VLMo's contrast and matching": (PAPER, {"task": ContrastAndMatch(), "pair": MaskedPair()}),
    "VLMo's heads": (PAPER, {"text": MaskedText(head="bert"), "pair": MaskedPair(image_mask_ratio=0)}),
}


@pytest.mark.parametrize(("config", "tasks"), LEARNERS.values(), ids=LEARNERS)
def test_operations_are_those_that_torch_counts(config, tasks):
    learner, batch = made(config, tasks)
    assert learner.flops(batch) == pytest.approx(counted(learner, batch), rel=1e-3)


def test_a_batch_of_twice_the_samples_costs_twice_as_much():
    one, two = (made(PAPER, MIXED, samples) for samples in (2, 4))
    assert two[0].flops(two[1]) == 2 * one[0].flops(one[1])


def test_padding_is_no_useful_work():
    learner, batch = made(PAPER, {"text": MaskedText()})
    shorter = replace(batch, plan=replace(batch.plan, text_lengths=(LENGTH, 1, 1, 1)))
    less = 12 * PAPER.layers * PAPER.width * 3 * (LENGTH**2 - 1)  # both products, forward and backward
    rows = 3 * (LENGTH - 1) * 3 * PAPER.layers * (8 * PAPER.width**2 + 4 * PAPER.width * PAPER.ffn)
    assert learner.flops(batch) - learner.flops(shorter) == less + rows


class Twice(MaskedText):
    """A task that says itself what it costs."""

    def operations(self, config, plan, group, heads):
        from beitctl.model.flops import of_pass

        return of_pass(config, plan)


def test_a_task_may_say_itself_what_it_costs():
    learner, batch = made(PAPER, {"text": Twice()})
    plain, same = made(PAPER, {"text": MaskedText()})
    head = 3 * 2 * batch.groups["text"].counts["text"] * PAPER.width * PAPER.vocabulary
    assert learner.flops(batch) == 2 * (plain.flops(same) - head)
