"""The checks of ``tests/gpu`` on the CPU, as far as they can be made there."""

import contextlib

import pytest
import torch
from mixed import MODELS, settings
from on_device import (
    LEARN,
    compared,
    equal,
    graphs_by_step,
    poisoned,
    saved_while_training,
    trained,
    unlogged_step,
    wide,
)

CPU = torch.device("cpu")
BF16, FP32 = settings(precision="bf16", optim=LEARN), settings(precision="fp32", optim=LEARN)


@pytest.mark.parametrize("name", MODELS)
def test_a_bf16_step_is_that_of_fp32_but_for_rounding(name, tmp_path):
    losses, errors = compared(CPU, wide(name), BF16, FP32, tmp_path)
    assert losses < 1e-2
    assert max(errors.values()) < 5e-2


def test_plain_blocks_compile_nothing_in_20_steps(tmp_path):
    graphs = graphs_by_step(CPU, MODELS["paper"], BF16, tmp_path)
    assert graphs == [graphs[0]] * 20


def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_is_not(tmp_path):
    straight, resumed = (
        trained(CPU, MODELS["paper"], tmp_path / name, stop) for name, stop in (("a", None), ("b", 4))
    )
    assert (tmp_path / "b" / "checkpoints" / "step-00000004").exists()
    assert equal(straight, resumed)


def test_a_background_save_holds_the_state_of_its_begin(tmp_path):
    before, loaded, after = saved_while_training(CPU, MODELS["paper"], tmp_path)
    assert equal(before, loaded)
    assert not equal(before, after)


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path):
    before, skipped, after, norm = poisoned(CPU, MODELS["paper"], tmp_path)
    assert norm == float("inf") or norm != norm
    assert equal(before, skipped)
    assert not equal(before, after)


@pytest.mark.parametrize("name", MODELS)
def test_the_step_that_is_watched_for_synchronisation_runs(name, tmp_path):
    unlogged_step(CPU, MODELS[name], BF16, tmp_path, contextlib.nullcontext)
