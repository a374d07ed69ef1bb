"""Operations of a step by arithmetic, beside what torch counts while the step runs."""

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
from beitctl.model.flops import Flops, of_head, of_pass
from beitctl.model.multiway import Multiway
from beitctl.model.plan import BatchPlan, plan_of, with_fillers
from beitctl_plugins.tasks.masked import Bottleneck, MaskedImage, MaskedPair, MaskedText

MIXED = ModelConfig(
    layers=3, width=32, heads=2, ffn=96, image_px=24, patch_px=4, vocabulary=52, text_tokens=24
)
BEIT1 = ModelConfig(
    layers=3, width=32, heads=2, ffn=96, image_px=24, patch_px=4, position="relative-shared", norm="pre",
    key_bias=False, layer_scale=0.1,
)  # fmt: skip
LENGTHS = (20, 3, 11, 7)
"""Tokens of the texts of a batch, so that padding matters."""
CODES = 40


class Store:
    views, codes, grid = 1, CODES, 6


def objectives(task=None):
    image = [Objective("image", task or MaskedImage())]
    return [*image, Objective("text", MaskedText()), Objective("pair", MaskedPair())]


def items(layout, config):
    """Four samples with a third of the patches and two tokens of every text hidden."""
    mask = np.arange(config.patches) % 3 == 0
    picture = {
        "image": np.zeros((3, *config.size), np.uint8),
        "image_mask": mask,
        "patch_targets": np.where(mask, 1, -1),
    }
    for length in LENGTHS:
        targets = np.where(np.arange(length) < 2, 5, -1)
        text = {"text": np.full(length, 6), "text_targets": targets}
        yield Item(**(picture if layout != "text" else {}), **(text if layout != "image" else {}))


def measured(config, chosen):
    """Operations of forward and backward that torch counts, the plan of the batch, predicted rows."""
    learner = MultiwayLearner(
        Multiway(config), chosen, {o.name: Tools(config, Letters(), Store()) for o in chosen}
    )
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.normal_(std=0.02)
    portions = [Portion(o.name, o.task.layout, list(items(o.task.layout, config))) for o in chosen]
    batch = collate(portions, config)
    with FlopCounterMode(display=False) as forward:
        sums = learner(batch)
    with FlopCounterMode(display=False) as backward:
        torch.stack([total for total, _ in sums.values()]).sum().backward()
    counts = [group.counts for group in batch.groups.values()]
    rows = {unit: sum(count[unit] for count in counts) for unit in ("patch", "text")}
    return forward.get_total_flops(), backward.get_total_flops(), batch.plan, rows


def planned(config, plan, rows):
    return (
        of_pass(config, plan)
        + of_head(rows["patch"], config.width * CODES)
        + of_head(rows["text"], config.width * config.vocabulary)
    )


SETTINGS = {
    "shared, sub-LN": {},
    "decoupled": {"attention": "decoupled"},
    "fusion layers": {"fusion_layers": 2},
    "decoupled with fusion layers, pre-LN": {"attention": "decoupled", "fusion_layers": 1, "norm": "pre"},
    "relative positions for pairs": {"position": "relative-per-block"},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_operations_are_those_that_torch_counts_in_a_mixed_step(changes):
    config = replace(MIXED, **changes)
    forward, backward, plan, rows = measured(config, objectives())
    found = planned(config, plan, rows)
    assert found.forward + found.padding == pytest.approx(forward, rel=1e-3)
    assert found.padded == pytest.approx(forward + backward, rel=1e-3)


@pytest.mark.parametrize("position", ["relative-shared", "relative-per-block", "absolute"])
def test_operations_are_those_that_torch_counts_for_pictures_alone(position):
    config = replace(BEIT1, position=position)
    forward, backward, plan, rows = measured(config, objectives()[:1])
    found = planned(config, plan, rows)
    assert (found.forward, found.padding) == (pytest.approx(forward, rel=1e-3), 0)
    assert found.training == pytest.approx(forward + backward, rel=1e-3)


def test_extra_blocks_of_a_head_are_a_pass_without_embedding():
    task = MaskedImage(bottleneck=Bottleneck(early_layers=2, head_layers=2))
    forward, backward, plan, rows = measured(BEIT1, objectives(task)[:1])
    found = planned(BEIT1, plan, {"patch": 2 * rows["patch"], "text": 0})
    found += of_pass(BEIT1, plan, blocks=2, embedded=False)
    assert found.forward == pytest.approx(forward, rel=1e-3)
    assert found.training == pytest.approx(forward + backward, rel=1e-3)


def test_useful_operations_are_those_of_every_sequence_alone():
    together = of_pass(MIXED, plan_of(MIXED.picture_tokens, 0, LENGTHS, LENGTHS))
    alone = Flops()
    for length in LENGTHS:
        alone += of_pass(MIXED, plan_of(MIXED.picture_tokens, 0, [length], []))
        alone += of_pass(MIXED, plan_of(MIXED.picture_tokens, 0, [], [length]))
    assert (together.training, alone.padded) == (alone.training, alone.training)


@pytest.mark.parametrize("chosen", ["text", "pair"])
def test_useful_operations_are_those_that_torch_counts_without_padding(chosen, monkeypatch):
    monkeypatch.setitem(globals(), "LENGTHS", (9, 9, 9))
    only = [objective for objective in objectives() if objective.name == chosen]
    forward, backward, plan, rows = measured(MIXED, only)
    assert planned(MIXED, plan, rows).training == pytest.approx(forward + backward, rel=1e-3)


def test_padding_counts_each_kind_to_its_longest():
    plan = plan_of(MIXED.picture_tokens, 2, [4, 6], [10, 2])
    padded, real = of_pass(MIXED, plan).padded_attention, of_pass(MIXED, plan).attention
    side = MIXED.picture_tokens
    assert padded == 4 * 32 * 3 * (2 * side**2 + 2 * (side + 6) ** 2 + 2 * 10**2)
    assert real == 4 * 32 * 3 * (2 * side**2 + (side + 4) ** 2 + (side + 6) ** 2 + 10**2 + 2**2)


def test_full_recompute_is_the_blocks_once_more():
    found = of_pass(MIXED, plan_of(MIXED.picture_tokens, 2, [4], [10]))
    assert found.recompute == found.forward - found.patches


def test_a_batch_of_nothing_has_no_operations():
    assert of_pass(MIXED, BatchPlan(MIXED.picture_tokens, 0)) == Flops()


def test_the_parts_add_up_to_the_forward_pass():
    found = of_pass(MIXED, plan_of(MIXED.picture_tokens, 2, [4], [10])) + of_head(7, 100)
    named = found.as_dict()
    parts = ("patches", "projections", "experts", "attention", "heads")
    assert sum(named[part] for part in parts) == named["forward"]


def test_the_giant_of_the_paper_takes_4_2_tflop_a_triple():
    giant = ModelConfig(
        layers=40, width=1408, heads=16, ffn=6144, patch_px=14, vocabulary=64010, text_tokens=128
    )
    triple = of_pass(giant, plan_of(257, 1, [24], [128]))
    triple += of_head(2 * 102, 1408 * 8192) + of_head(19 + 12, 1408 * 64010)
    assert triple.training == pytest.approx(4.175e12, rel=0.01)


def test_fillers_are_no_useful_work():
    plan = plan_of(MIXED.picture_tokens, 2, [4, 6], [10, 2])
    found, filled = of_pass(MIXED, plan), of_pass(MIXED, with_fillers(plan, 64))
    assert (filled.training, filled.heads) == (found.training, found.heads)
