"""Every attention backend against attention written down from its definition, and that the check can fail."""

import pytest
import torch

from beitctl.config import ModelConfig
from beitctl.engine.measuring import selfcheck
from beitctl.engine.measuring.selfcheck import attends, require
from beitctl.errors import SetupError
from beitctl.model import attention

CPU = torch.device("cpu")
KINDS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {"12 x 64": (12, 64), "16 x 88": (16, 88), "11 x 128": (11, 128)}
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def findings(backend, device, dtype, heads, size):
    return [str(check) for check in attends(backend, device, dtype, heads, size) if not check.passed]


@pytest.mark.parametrize("dtype", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("heads", "size"), [(2, 64), (1, 88)])
def test_padded_attention_on_a_processor_is_attention(dtype, heads, size):
    assert findings("padded", CPU, dtype, heads, size) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "size"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", [pytest.param(name, marks=NEEDS_GPU) for name in attention.BACKENDS])
def test_a_backend_on_a_gpu_is_attention(backend, heads, size, dtype):
    device = torch.device("cuda")
    if reason := attention.available(backend, device, dtype, size):
        pytest.skip(reason)
    assert findings(backend, device, dtype, heads, size) == []


def test_padded_attention_in_fp64_is_exact_to_the_last_digits():
    mixed, _ = attends("padded", CPU, torch.float64, 1, 64)
    assert max(mixed.errors.values()) < 1e-14


def test_the_lengths_are_those_that_kernels_got_wrong():
    mixed, hard = (set(plan.lengths.tolist()) for plan in (selfcheck.MIXED, selfcheck.ADVERSARIAL))
    assert {0, 1, 128, 257, 385} <= mixed
    assert {64, 192, 320} <= {length for length in hard if length % 128 == 64}


def test_logits_of_the_adversarial_case_are_near_120_below_zero():
    one = ModelConfig(layers=1, width=64, heads=1, ffn=1, vocabulary=8, text_tokens=512)
    case = selfcheck._Case("padded", selfcheck.ADVERSARIAL, one, CPU, torch.float64, selfcheck.LOGIT)
    q, k, _ = case.inputs()[0].chunk(3, dim=1)
    assert (q @ k.T / 8).mean().item() == pytest.approx(-120, abs=5)


# --- the check fails on ---


def changed(monkeypatch, change):
    """Attention whose contexts (T, d) go through ``change(out, qkv, layout)``."""
    right = attention.attend

    def wrong(qkv, layout, heads, biases=None):
        return change(right(qkv, layout, heads, biases), qkv, layout)

    monkeypatch.setattr(attention, "attend", wrong)


class _BrokenBackward(torch.autograd.Function):
    """Nothing forward; NaN in one number of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        broken = grad.clone()
        broken[5, 0] = float("nan")
        return broken


def test_nan_in_one_number_of_a_gradient(monkeypatch):
    right = attention.attend
    monkeypatch.setattr(
        attention, "attend", lambda qkv, layout, heads: right(_BrokenBackward.apply(qkv), layout, heads)
    )
    mixed, hard = attends("padded", CPU, torch.float32, 1, 64)
    assert (mixed.reason, hard.reason) == ("not finite: dq", "not finite: dq")


def test_an_error_in_one_token_of_the_shortest_text(monkeypatch):
    row = int(selfcheck.MIXED.text_starts[4])  # a text of one token among 1,400 rows

    def change(out, qkv, layout):
        off = torch.zeros_like(out)
        off[row if layout.plan is selfcheck.MIXED else 0] = 0.05
        return out + off

    changed(monkeypatch, change)
    mixed, _ = attends("padded", CPU, torch.bfloat16, 1, 64)
    assert mixed.reason == "out above 1e-02"


def test_rows_that_see_another_sequence(monkeypatch):
    changed(monkeypatch, lambda out, qkv, layout: out + 0.1 * qkv[:, -out.shape[1] :].mean(0))
    mixed, _ = attends("padded", CPU, torch.bfloat16, 1, 64)
    assert not mixed.passed


def test_another_scale_of_the_logits(monkeypatch):
    right = attention.attend

    def wrong(qkv, layout, heads):
        width = qkv.shape[1] // 3
        return right(torch.cat([qkv[:, :width] * 1.05, qkv[:, width:]], dim=1), layout, heads)

    monkeypatch.setattr(attention, "attend", wrong)
    mixed, _ = attends("padded", CPU, torch.bfloat16, 1, 64)
    assert {"out above 1e-02", "dq above 2e-02"} <= set(mixed.reason.split(", "))


def test_a_kernel_that_raises_is_a_finding(monkeypatch):
    def raising(qkv, layout, heads):
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setattr(attention, "attend", raising)
    mixed, _ = attends("padded", CPU, torch.float32, 1, 64)
    assert mixed.reason == "RuntimeError: no kernel image is available"


# --- require ---


def test_a_backend_that_passes_is_let_through():
    require("padded", CPU, torch.float32, 1, 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_backend_that_cannot_run_here_is_refused_with_what_it_needs():
    with pytest.raises(SetupError, match=r'"varlen-fa3" cannot .* needs a CUDA device.* = "auto"'):
        require("varlen-fa3", CPU, torch.bfloat16)


def test_a_backend_that_errs_here_is_refused_with_the_numbers(monkeypatch):
    changed(monkeypatch, lambda out, qkv, layout: out * 1.5)
    with pytest.raises(SetupError) as refused:
        require("padded", CPU, torch.float32, 1, 64)
    text = str(refused.value)
    assert ("1 heads of 64 in float32" in text, "mixed lengths: out above 1e-05" in text) == (True, True)
    assert "out 5.0e-01" in text
