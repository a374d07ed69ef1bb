"""Memory of a GPU in ``beitctl plan``, and what would make a training fit."""

from dataclasses import replace

import pytest
import torch
from planned import MODEL, TRAIN, place, work  # noqa: F401 - the fixture works by being here
from torch.nn import functional as F

from beitctl import overrides
from beitctl.engine.measuring.gpus import GIB
from beitctl.model import attention
from beitctl.model.multiway import Multiway
from beitctl.model.plan import plan_of
from beitctl.planning import estimate
from beitctl.planning.memory import fixes, per_gpu, saved_numbers
from beitctl_plugins.tasks.masked import MaskedImage, MaskedPair
from beitctl_plugins.tasks.retrieval import Retrieval


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "pre"}, {"norm": "pre", "layer_scale": 0.1}, {"attention": "decoupled"}]
)
def test_eager_blocks_keep_what_is_counted(changes, monkeypatch):
    monkeypatch.setattr(
        attention, "_plain", lambda q, k, v, mask, bias: F.scaled_dot_product_attention(q, k, v, mask)
    )
    model = Multiway(replace(MODEL, **changes))
    plan = plan_of(MODEL.picture_tokens, 4, [24] * 4, [24] * 4)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() / 4 / plan.tokens
            alive.append(storage)
        return tensor

    x = torch.randn(plan.tokens, MODEL.width, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.blocks[0](x, model.layout(plan))
    assert sum(kept.values()) == pytest.approx(saved_numbers(model.config, "eager"), rel=0.02)


@pytest.mark.parametrize(
    ("gpus", "settings", "shard"),
    [(4, {}, 4), (8, {}, 8), (64, {}, 8), (64, {"shard_ranks": 16}, 16), (4, {"shard_ranks": 2}, 2)],
)
def test_states_are_shared_by_the_gpus_of_a_group(gpus, settings, shard):
    made = replace(work(MaskedImage()), train=replace(TRAIN, ema_decay=0.9, **settings))
    one, many = per_gpu(made, 1, 0), per_gpu(made, gpus, 0)
    assert many.shard == shard
    for part in ("master_weights", "moments", "gradients", "average"):
        assert many.parts[part] == -(-one.parts[part] // shard)


def test_without_an_average_none_is_counted():
    assert per_gpu(work(MaskedImage()), 1, 0).parts["average"] == 0


@pytest.mark.parametrize(("gpus", "problems"), [(8, 1), (6, 0), (2, 0)])
def test_gpus_that_are_no_whole_number_of_groups_are_told(gpus, problems):
    made = replace(work(MaskedImage()), train=replace(TRAIN, shard_ranks=3))
    found = estimate._problems(made, per_gpu(made, gpus, 0), estimate.Asked(gpus))
    assert len(found) == problems
    assert all("8 GPUs are no whole number of groups of 3" in text for text in found)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, "compiled"), ({"compile": "off"}, "eager"), ({"recompute": True}, "recompute")],
)
def test_it_fits_by_what_the_settings_keep(settings, kept):
    found = per_gpu(replace(work(MaskedImage()), train=replace(TRAIN, **settings)), 1, 0)
    assert (found.judged_by, found.total()) == (kept, found.total(kept))


def test_memory_budget_keeps_its_share_of_a_compiled_block_and_its_input():
    whole, half = (
        per_gpu(replace(work(MaskedImage()), train=replace(TRAIN, memory_budget=share)), 1, 0).activations
        for share in (1.0, 0.5)
    )
    model = work(MaskedImage()).model
    kept = saved_numbers(model, "compiled")
    assert half["compiled"] / whole["compiled"] == pytest.approx((kept + model.width) / 2 / kept)
    assert half["eager"] == whole["eager"]


def test_a_pass_is_what_the_loader_deals_out():
    passes, mine = work(MaskedImage(), MaskedPair(), samples=32).share(4, 6)
    assert (passes, [part.samples for part in mine.parts]) == (3, [3, 3])


def test_recompute_takes_less_than_compiled_blocks_and_these_less_than_eager_ones():
    found = per_gpu(work(MaskedImage(), samples=64), 1, 0)
    assert found.total("recompute") < found.total("compiled") < found.total("eager")


@pytest.mark.parametrize("given", [{}, {"compile": "off"}, {"memory_budget": 0.75}, {"shard_ranks": 1}])
def test_every_proposed_setting_makes_it_fit(given):
    made = replace(work(MaskedImage(), MaskedPair(), samples=512), train=replace(TRAIN, **given))
    limit = per_gpu(made, 2, 0).total() - 2**20
    found = list(fixes(made, 2, limit))
    assert len(found) >= 4
    for fix in found:
        words = [word.partition("=") for word in fix.split() if "=" in word]
        settings = {key.removeprefix("pretrain.train."): value for key, _, value in words}
        gpus = int(fix.removeprefix("--gpus ")) if fix.startswith("--gpus") else 2
        micro = int(settings.pop("micro_samples", 0))
        values = {key: overrides.toml_value(value) for key, value in settings.items()}
        other = replace(made, train=replace(made.train, **values))
        assert per_gpu(other, gpus, micro).total() <= limit, fix


def test_a_larger_pass_or_half_the_gpus_would_not_fit():
    made = work(MaskedImage(), MaskedPair(), samples=512)
    limit = per_gpu(made, 1, 0).total() - 2**27
    found = list(fixes(made, 1, limit))
    micro = int(found[0].removeprefix("--set pretrain.train.micro_samples="))
    assert per_gpu(made, 1, micro).total() <= limit < per_gpu(made, 1, 2 * micro).total()
    gpus = int(found[1].removeprefix("--gpus "))
    assert per_gpu(made, gpus, 0).total() <= limit < per_gpu(made, gpus // 2, 0).total()


def test_a_contrastive_task_is_not_told_to_take_smaller_passes():
    made = work(Retrieval(), samples=512)
    assert not any("micro_samples" in fix for fix in fixes(made, 1, per_gpu(made, 1, 0).total() - 1))


def test_nothing_is_proposed_where_it_fits():
    assert list(fixes(work(MaskedImage()), 1, 80 * GIB)) == []
