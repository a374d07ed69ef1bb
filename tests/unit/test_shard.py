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


class Exact(nn.Module):
    """Computes in fp32; remembers what its weight was."""

    compute_fp32 = True

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.inner = nn.ModuleList([nn.Linear(3, 3)])
        self.inner[0].compute_fp32 = True
        self.seen = ()

    def forward(self, x):
        self.seen = (self.linear.weight.dtype, self.inner[0].weight.dtype, x.dtype)
        return self.inner[0](self.linear(x.float()))


class Mixed(nn.Module):
    """A body and a head that computes in fp32."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), Exact()
        self.seen = ()

    def forward(self, x):
        self.seen = (self.body.weight.dtype,)
        return self.head(self.body(x))


def gradients_of_mixed(precision):
    def value(name, shape):
        return torch.linspace(-1, 1, shape.numel()).view(shape) / 3

    module = sharded(Mixed, start(), precision, value)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    module(torch.linspace(0, 1, 8).view(2, 4).to(kind)).square().sum().backward()
    return module, {name: p.grad.full_tensor() for name, p in module.named_parameters()}


def test_modules_with_compute_fp32_compute_in_it_and_the_rest_as_told():
    module, gradients = gradients_of_mixed("bf16")
    assert module.seen == (torch.bfloat16,)
    assert module.head.seen == (torch.float32, torch.float32, torch.bfloat16)
    assert {value.dtype for value in gradients.values()} == {torch.float32}


def test_gradients_go_through_a_module_with_compute_fp32_to_the_rest():
    _, mixed = gradients_of_mixed("bf16")
    _, exact = gradients_of_mixed("fp32")
    assert sorted(mixed) == sorted(exact)
    for name, value in mixed.items():
        assert value.abs().max() > 0.01, name
        assert torch.allclose(value, exact[name], atol=0.05), name


def test_a_module_with_compute_fp32_alone_can_be_sharded():
    module = sharded(Exact, start(), "bf16", lambda name, shape: torch.ones(shape))
    assert module(torch.ones(1, 4)).dtype == torch.float32
