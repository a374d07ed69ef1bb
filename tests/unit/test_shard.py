"""Sharded modules: initial weights to the bit on any number of ranks, whole weights back."""

import hashlib

import pytest
import torch
from small import MODEL
from torch import nn

from beitctl.engine import shard
from beitctl.engine.dist import start
from beitctl.engine.shard import compute_dtype, full_weights, sharded
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway

CPU = torch.device("cpu")


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def expected():
    names = {name: value.shape for name, value in Multiway(MODEL).named_parameters()}
    return {name: digest(initial(name, shape, MODEL, 3)) for name, shape in names.items()}


def weights_as_ranks():
    ranks = start()
    module = sharded(
        lambda: Multiway(MODEL), ranks, "fp32", lambda name, shape: initial(name, shape, MODEL, 3)
    )
    found = {name: digest(value) for name, value in full_weights(module).items()}
    ranks.stop()
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_weights_are_the_initial_ones_to_the_bit(on_ranks, world):
    assert on_ranks(weights_as_ranks, world) == [expected()] * world


class Counted(nn.Module):
    """One parameter, and a buffer with a start of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 2))
        self.register_buffer("seen", torch.empty(3))

    def reset_buffers(self):
        self.seen.fill_(7)


def test_buffers_get_their_start_and_are_among_the_whole_weights():
    module = sharded(Counted, start(), "fp32", lambda name, shape: torch.ones(shape))
    found = full_weights(module)
    assert found["seen"].tolist() == [7, 7, 7]
    assert torch.equal(found["weight"], torch.ones(5, 2))


def test_whole_weights_are_detached_on_the_cpu():
    found = full_weights(nn.Linear(2, 3))
    assert all(value.device == CPU and not value.requires_grad for value in found.values())


def test_a_parameter_without_an_initial_value_is_refused():
    def nothing(name, shape):
        raise ValueError(f"no initial value is defined for parameter {name}")

    with pytest.raises(ValueError, match="no initial value is defined for parameter weight"):
        sharded(Counted, start(), "fp32", nothing)


@pytest.mark.parametrize(
    ("precision", "native", "kind"),
    [
        ("fp32", True, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, precision, native, kind):
    monkeypatch.setattr(shard, "cpu_has_bf16", lambda: native)
    assert compute_dtype(precision, CPU) == kind


@pytest.mark.parametrize(("native", "kind"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_gpu_asks_the_gpu(monkeypatch, native, kind):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: native)
    assert compute_dtype("auto", torch.device("cuda")) == kind


def test_weights_stay_fp32_whatever_is_computed_in():
    def ones(name, shape):
        return torch.ones(shape)

    module = sharded(lambda: Multiway(MODEL), start(), "bf16", ones)
    assert {value.dtype for value in full_weights(module).values()} == {torch.float32}
