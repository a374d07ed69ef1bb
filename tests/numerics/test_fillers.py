"""Fillers change nothing, and reading sequences in their own order equals reading padded grids, in fp64.

The kernel of the variable-length backends needs a GPU; here its definition stands in for it, so that what is
compared is all that beitctl does around it. Tolerance 1e-12: the order of sums differs.
"""

import itertools
import math

import pytest
import torch
from test_packed import CASES, MODELS, inputs, model_of

from beitctl.model import attention
from beitctl.model.attention import Layout, attend
from beitctl.model.multiway import Packed
from beitctl.model.plan import with_fillers

TOLERANCE = 1e-12
MULTIPLE = 8


def by_definition(q, k, v, cu, cu_k, longest, longest_k):
    """What ``varlen_attn`` computes, sequence by sequence."""
    assert cu is cu_k
    bounds = cu.tolist()
    assert max(b - a for a, b in itertools.pairwise(bounds)) <= longest == longest_k
    parts = []
    for a, b in itertools.pairwise(bounds):
        logits = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) / math.sqrt(q.shape[-1])
        parts.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[a:b]))
    return torch.cat(parts)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_definition)
    monkeypatch.setattr(attention, "_takes_splits", lambda: False)


def filled(case):
    """A batch with fillers, and True where a row of C or D is none."""

    def make(model):
        plan, pixels, mask, ids, keep = inputs(model, case)
        made = with_fillers(plan, MULTIPLE)
        behind_pairs, behind_texts = made.fillers
        pairs, texts = sum(plan.pair_lengths), sum(plan.text_lengths)
        real = torch.tensor(
            [True] * (plan.cuts[1] + pairs) + [False] * behind_pairs + [True] * texts + [False] * behind_texts
        )
        all_ids = torch.full((made.tokens - made.cuts[1],), 7)
        all_ids[real[made.cuts[1] :]] = ids
        scale = torch.full((3, 2, made.sequences), 0.25, dtype=torch.float64)
        before = plan.images + plan.pairs
        scale[:, :, :before], scale[:, :, before + 1 : -1] = keep[:, :, :before], keep[:, :, before:]
        return made, pixels, mask, all_ids, scale, real

    return make


def gradients(model, packed, real):
    """Rows that are no fillers, and the gradients of a weighted sum of them."""
    model.zero_grad()
    rows = model.encode(packed)[real]
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (rows * weights).sum().backward()
    return rows.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def differences(one, other):
    (rows, grads), (others, other_grads) = one, other
    return {"rows": (rows - others).abs().max()} | {
        name: (0 if grad is None else grad)
        .sub(0 if other_grads[name] is None else other_grads[name])
        .abs()
        .max()
        for name, grad in grads.items()
        if grad is not None or other_grads[name] is not None
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", MODELS)
def test_fillers_change_neither_rows_nor_gradients(settings, case):
    model = model_of(MODELS[settings])
    plan, pixels, mask, ids, keep = inputs(model, CASES[case])
    expected = gradients(model, Packed(model.layout(plan), pixels, mask, ids, keep), slice(None))
    made, pixels, mask, ids, keep, real = filled(CASES[case])(model)
    found = gradients(model, Packed(model.layout(made), pixels, mask, ids, keep), real)
    assert max(differences(found, expected).values()) < 100 * TOLERANCE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", MODELS)
@pytest.mark.usefixtures("kernel")
def test_variable_length_attention_equals_padded_attention(settings, case):
    model = model_of(MODELS[settings])
    made, pixels, mask, ids, keep, real = filled(CASES[case])(model)
    expected = gradients(model, Packed(model.layout(made), pixels, mask, ids, keep), real)
    model.attention_backend = "varlen-flash"
    layout = model.layout(made)
    assert layout.grids == ()
    found = gradients(model, Packed(layout, pixels, mask, ids, keep), real)
    assert max(differences(found, expected).values()) < 100 * TOLERANCE


@pytest.mark.usefixtures("kernel")
def test_the_backward_pass_of_reordering_gathers_and_never_scatters():
    model = model_of(MODELS["decoupled"])
    plan = inputs(model, CASES["all"])[0]
    layout = Layout.of(plan, model.config, torch.device("cpu"), "varlen-flash")
    qkv = torch.randn(plan.tokens, 72, dtype=torch.float64, requires_grad=True)
    with torch.profiler.profile() as seen:
        attend(qkv, layout, 3).sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert "aten::index_select" in names
    assert not names & {
        "aten::index_add_",
        "aten::scatter_add_",
        "aten::index_put_",
        "aten::_index_put_impl_",
    }


def test_rows_of_batches_without_pairs_lie_in_order_already():
    model = model_of(MODELS["shared"])
    for case, in_order in (("images only", True), ("no pairs", True), ("all", False)):
        made = filled(CASES[case])(model)[0]
        assert made.in_order is in_order
        assert (made.perm.tolist() == list(range(made.tokens))) is in_order


def test_both_text_segments_get_a_multiple_of_rows_and_two_fillers_at_least():
    model = model_of(MODELS["shared"])
    for case in CASES.values():
        _, nv, b1, total = filled(case)(model)[0].cuts
        assert ((b1 - nv) % MULTIPLE, (total - b1) % MULTIPLE) == (0, 0)
        assert min(filled(case)(model)[0].fillers) >= 2


def test_text_that_sees_no_later_words_is_read_padded():
    model = model_of(MODELS["shared"])
    model.attention_backend = "varlen-flash"
    packed, _ = model.pack(
        torch.randn(2, 3, 12, 12, dtype=torch.float64), torch.randint(0, 30, (2, 5)), causal_text=True
    )
    assert packed.layout.backend == "padded"


@pytest.mark.parametrize("position", ["relative-shared", "relative-per-block"])
def test_fillers_longer_than_a_text_change_nothing_where_positions_are_relative(position):
    model = model_of({"attention": "shared", "position": position})
    plan, pixels, mask, ids, keep = inputs(model, CASES["all"])
    expected = gradients(model, Packed(model.layout(plan), pixels, mask, ids, keep), slice(None))
    made = with_fillers(plan, 64)
    assert min(made.fillers) > model.config.text_tokens + 3
    pairs, texts = sum(plan.pair_lengths), sum(plan.text_lengths)
    all_ids = torch.cat(
        [ids[:pairs], ids.new_zeros(made.fillers[0]), ids[pairs:], ids.new_zeros(made.fillers[1])]
    )
    real = torch.ones(made.tokens, dtype=torch.bool)
    real[plan.cuts[1] + pairs : made.cuts[2]] = False
    real[made.cuts[2] + texts :] = False
    before = plan.images + plan.pairs
    one = torch.ones(3, 2, 1, dtype=torch.float64)
    keep = torch.cat([keep[:, :, :before], one, keep[:, :, before:], one], 2)
    found = gradients(model, Packed(model.layout(made), pixels, mask, all_ids, keep), real)
    assert max(differences(found, expected).values()) < 100 * TOLERANCE
