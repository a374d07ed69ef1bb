"""Training steps on a GPU: numbers, graphs, memory, and what they wait for."""

import contextlib
import dataclasses

import pytest
import torch
from mixed import MODELS, gradients, learner, settings, varied
from on_device import LEARN, compared, equal, graphs_by_step, poisoned, ranks_on, unlogged_step, wide

pytestmark = pytest.mark.gpu

BF16, FP32 = settings(precision="bf16", optim=LEARN), settings(precision="fp32", optim=LEARN)
LOSS, GRADIENT = 1e-2, 5e-2
BACKENDS = ("padded", "varlen-flash")


def backend(name, **changes):
    return dataclasses.replace(BF16, attention_backend=name, **changes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernel", BACKENDS)
def test_a_bf16_step_is_that_of_fp32_but_for_rounding(gpu, name, kernel, tmp_path):
    losses, errors = compared(gpu, wide(name), backend(kernel), FP32, tmp_path)
    assert losses < LOSS
    assert max(errors.values()) < GRADIENT, errors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernel", BACKENDS)
def test_compiled_blocks_take_the_step_of_plain_ones(gpu, name, kernel, tmp_path):
    losses, errors = compared(gpu, wide(name), backend(kernel, compile="on"), backend(kernel), tmp_path)
    assert losses < LOSS
    assert max(errors.values()) < GRADIENT, errors


@pytest.mark.parametrize("name", MODELS)
def test_no_graph_is_compiled_after_the_third_step(gpu, name, tmp_path):
    graphs = graphs_by_step(gpu, wide(name), settings(precision="bf16", optim=LEARN, compile="on"), tmp_path)
    assert graphs[0] > 0
    assert graphs[2:] == [graphs[2]] * 18


def test_a_step_without_a_finite_gradient_changes_nothing(gpu, tmp_path):
    before, skipped, after, norm = poisoned(gpu, wide("paper"), tmp_path)
    assert norm == float("inf") or norm != norm
    assert equal(before, skipped)
    assert not equal(before, after)


@contextlib.contextmanager
def no_waiting():
    """Make every wait of the host for the GPU an error."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernel", BACKENDS)
def test_a_step_that_is_not_logged_never_waits_for_the_gpu(gpu, name, kernel, tmp_path):
    unlogged_step(gpu, wide(name), backend(kernel), tmp_path, no_waiting)


def test_recomputing_blocks_lowers_the_peak_of_the_memory(gpu, tmp_path):
    model, peaks = dataclasses.replace(wide("paper"), layers=8), {}
    ranks = ranks_on(gpu)
    (micro,) = varied([0], model)
    for recompute in (True, False):
        config = dataclasses.replace(BF16, recompute=recompute)
        module = learner(model, ranks, config)
        gradients(module, micro, config, ranks, tmp_path)
        torch.cuda.reset_peak_memory_stats(gpu)
        before = torch.cuda.memory_allocated(gpu)
        gradients(module, micro, config, ranks, tmp_path)
        peaks[recompute] = torch.cuda.max_memory_allocated(gpu) - before
        del module
    assert peaks[True] < peaks[False]
