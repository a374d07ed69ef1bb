"""Compiled, recomputed and reordered blocks compute what plain ones do; failures end a run or are told."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import MODEL
from torch import nn
from torch._dynamo.utils import counters

from beitctl.config import ModelConfig, OptimConfig, TrainConfig
from beitctl.engine import compiling
from beitctl.engine.compiling import Recompiles, prepare, rows_multiple
from beitctl.errors import SetupError, UserError
from beitctl.model import attention
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway, Packed
from beitctl.model.plan import plan_of, with_fillers

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CONFIG = TrainConfig(steps=3, optim=OptimConfig(peak_lr=1e-3), compile="on")
WIDE = ModelConfig(
    layers=2,
    width=16,
    heads=2,
    ffn=24,
    image_px=16,
    patch_px=4,
    vocabulary=40,
    text_tokens=24,
    fusion_layers=1,
)
PICTURES = ModelConfig(layers=2, width=16, heads=2, ffn=24, image_px=16, patch_px=4)


def fail(text):
    raise AssertionError(text)


def model_of(config, settings, warn=fail):
    model = Multiway(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, parameter.shape, config, 0))
    prepare(model, torch.float32, config=settings, device=CPU, warn=warn)
    return model


def batch(model, seed=0):
    """Four pictures, four pairs and four texts of random lengths, with fillers."""
    draw = np.random.default_rng(seed)
    lengths = [draw.integers(2, 24, 4).tolist() if model.config.vocabulary else [] for _ in range(2)]
    plan = plan_of(model.config.picture_tokens, 4, *lengths)
    plan = with_fillers(plan, 16) if model.config.vocabulary else plan
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (plan.tokens - plan.cuts[1],), generator=make)
    keep = torch.rand(model.config.layers, 2, plan.sequences, generator=make) + 0.5
    return Packed(model.layout(plan), torch.randn(plan.pictures, 3, 16, 16, generator=make), None, ids, keep)


def gradients(model, packed):
    model.zero_grad()
    model.encode(packed).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def quickly(monkeypatch):
    """The compiler without its last stage, which makes machine code and takes a minute."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for the kernel of a GPU, of its shapes."""
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", lambda q, k, v, cu, *_: (q + k + v) * cu.sum()
    )
    monkeypatch.setattr(attention, "_takes_splits", lambda: False)


@pytest.mark.usefixtures("quickly", "kernel")
@pytest.mark.parametrize(
    ("form", "backend", "kinds"),
    [
        (replace(WIDE, layers=3), "varlen-flash", 2),
        (replace(WIDE, layers=2, fusion_layers=0, attention="decoupled"), "padded", 1),
    ],
    ids=["variable lengths, vision-language experts above", "padded, decoupled"],
)
def test_nothing_is_compiled_after_the_first_step_over_50_steps_of_varying_lengths(form, backend, kinds):
    model, told = model_of(form, CONFIG), []
    model.attention_backend = backend
    watch, before = Recompiles(told.append), counters["stats"]["unique_graphs"]
    for step in range(1, 51):
        gradients(model, batch(model, seed=step))
        watch.check(step)
        if step == 1:
            graphs = counters["stats"]["unique_graphs"]
    assert graphs - before == kinds
    assert counters["stats"]["unique_graphs"] == graphs
    assert told == []


@pytest.mark.usefixtures("quickly")
def test_a_graph_compiled_late_is_told():
    model, told = model_of(PICTURES, CONFIG), []
    watch = Recompiles(told.append)
    for step in range(1, 5):
        gradients(model, batch(model))
        watch.check(step)
    other = replace(batch(model), layout=model.layout(plan_of(17, 2, [], [])))
    gradients(model, replace(other, pixels=other.pixels[:2], keep=other.keep[:, :, :2]))
    watch.check(5)
    assert len(told) == 1
    assert "compiled after step 3" in told[0]


def test_compiled_blocks_compute_what_plain_ones_do():
    plain = model_of(PICTURES, replace(CONFIG, compile="off"))
    compiled = model_of(PICTURES, CONFIG)
    expected, found = (gradients(model, batch(model)) for model in (plain, compiled))
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6, rtol=1e-4), name


def test_recomputed_blocks_give_the_same_gradients_and_run_twice(monkeypatch):
    plain, again = (
        model_of(WIDE, replace(CONFIG, compile="off", recompute=value)) for value in (False, True)
    )
    expected, calls = gradients(plain, batch(plain)), []
    monkeypatch.setattr(nn.functional, "gelu", lambda x, real=nn.functional.gelu: calls.append(1) or real(x))
    found = gradients(again, batch(again))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    in_lower, in_upper = 2, 3
    assert len(calls) == 2 * (in_lower + in_upper)


@pytest.mark.usefixtures("quickly")
def test_without_gradients_nothing_is_compiled_whatever_the_sizes():
    model = model_of(PICTURES, CONFIG)
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for count in range(1, 13):
            model.encode(Packed(model.layout(plan_of(17, count, [], [])), torch.zeros(count, 3, 16, 16)))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.usefixtures("quickly")
def test_a_model_of_a_later_stage_does_not_use_up_the_graphs_of_the_first():
    for count in range(4):
        model = model_of(replace(PICTURES, width=16 + 2 * count), CONFIG)
        gradients(model, batch(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    assert torch._dynamo.config.recompile_limit == 64


class Broken:
    """Stands for ``torch.compile`` where the compiler is there but cannot compile blocks."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function, **_):
        self.calls += 1
        return function if self.calls == 1 else self.fail

    @staticmethod
    def fail(*args, **kwargs):
        raise torch._dynamo.exc.TorchDynamoException("no\n\nthat cannot be")


def test_a_block_that_does_not_compile_ends_the_run(monkeypatch):
    monkeypatch.setattr(torch, "compile", Broken())
    model = model_of(PICTURES, CONFIG)
    with pytest.raises(SetupError, match=r'cannot be compiled: TorchDynamoException: no; .* compile = "off"'):
        model.encode(batch(model))


@pytest.mark.usefixtures("quickly")
def test_more_kinds_of_batches_than_torch_compiles_end_the_run_in_words(monkeypatch):
    monkeypatch.setattr(compiling, "GRAPHS", 1)
    model = model_of(PICTURES, CONFIG)
    few, more = (Packed(model.layout(plan_of(17, n, [], [])), torch.zeros(n, 3, 16, 16)) for n in (2, 5))
    model.encode(few)
    with pytest.raises(SetupError, match=r"cannot be compiled: FailOnRecompileLimitHit"):
        model.encode(more)


def test_with_try_a_block_that_does_not_compile_runs_without_and_that_is_told(monkeypatch):
    monkeypatch.setattr(torch, "compile", Broken())
    told = []
    model = model_of(PICTURES, replace(CONFIG, compile="try"), told.append)
    plain = model_of(PICTURES, replace(CONFIG, compile="off"))
    assert torch.equal(model.encode(batch(model)), plain.encode(batch(plain)))
    assert len(told) == PICTURES.layers
    assert "run slower" in told[0]


def test_a_compiler_that_is_not_there_is_found_before_the_first_step(monkeypatch):
    def absent(function, **_):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", absent)
    with pytest.raises(SetupError, match=r"RuntimeError: no g\+\+; repair the compiler"):
        model_of(PICTURES, CONFIG)
    told = []
    model = model_of(PICTURES, replace(CONFIG, compile="try"), told.append)
    assert len(told) == 1
    assert model.encode(batch(model)).shape == (4 * 17, 16)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"compile": "on"}, "compile"),
        ({"compile": "auto", "recompute": True}, "recompute"),
        ({"compile": "auto", "memory_budget": 0.5}, "memory_budget"),
        ({"compile": "auto", "attention_backend": "varlen-flash"}, "attention_backend"),
    ],
)
def test_settings_of_blocks_are_refused_where_there_are_none(settings, named):
    with pytest.raises(UserError, match=f"^{named}: this model has no Transformer blocks"):
        prepare(nn.Linear(2, 2), torch.float32, config=replace(CONFIG, **settings), device=CPU, warn=fail)


def test_a_memory_budget_without_a_compiler_is_told():
    told = []
    model_of(PICTURES, replace(CONFIG, compile="auto", memory_budget=0.5), told.append)
    assert told == ["memory_budget = 0.5 has no effect: blocks are not compiled on this device"]


@pytest.mark.parametrize("backend", ["varlen-flash", "varlen-fa3", "varlen-cudnn"])
def test_an_attention_backend_of_another_device_is_refused(backend):
    settings = replace(CONFIG, compile="off", attention_backend=backend)
    with pytest.raises(UserError, match=f'attention_backend = "{backend}" needs a CUDA device; use "auto"'):
        model_of(MODEL, settings)


def test_text_has_fillers_where_blocks_are_compiled():
    auto = replace(CONFIG, compile="auto")
    assert [rows_multiple(auto, CPU), rows_multiple(auto, GPU), rows_multiple(CONFIG, CPU)] == [1, 128, 128]


def test_only_the_compiler_of_this_process_decides():
    assert compiling.compiled(replace(CONFIG, compile="off"), GPU) is False
    assert compiling.compiled(replace(CONFIG, compile="try"), CPU) is True
