"""Cross-entropy of the predicted rows, and the gather over ranks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from beitctl.engine.dist import start
from beitctl.engine.losses import gather_rows, masked_cross_entropy


@pytest.fixture
def head():
    torch.manual_seed(0)
    return nn.Linear(4, 7)


def test_the_sum_is_that_of_torch_on_the_selected_rows(head):
    rows, targets = torch.randn(9, 4), torch.tensor([2, 6, 0])
    chosen = torch.tensor([1, 5, 8])
    total, _ = masked_cross_entropy(rows[chosen], targets, head)
    expected = sum(F.cross_entropy(head(rows[i]), t) for i, t in zip(chosen, targets, strict=True))
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_rows_that_are_not_selected_get_no_gradient(head):
    rows = torch.randn(5, 4, requires_grad=True)
    masked_cross_entropy(rows[[1, 3]], torch.tensor([2, 6]), head)[0].backward()
    assert rows.grad.abs().sum(1).ne(0).tolist() == [False, True, False, True, False]


def test_right_predictions_are_counted():
    head = nn.Identity()
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert masked_cross_entropy(logits, torch.tensor([1, 1, 1]), head)[1].item() == 2


def test_the_loss_of_bf16_logits_is_fp32():
    logits = torch.randn(3, 5, dtype=torch.bfloat16)
    assert masked_cross_entropy(logits, torch.tensor([0, 1, 2]), nn.Identity())[0].dtype == torch.float32


def test_no_rows_give_no_loss_and_gradients_of_zero(head):
    rows = torch.randn(5, 4, requires_grad=True)
    total, right = masked_cross_entropy(rows[:0], torch.zeros(0, dtype=torch.int64), head)
    total.backward()
    assert (total.item(), right.item()) == (0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in (rows, *head.parameters()))


def test_chunks_give_the_loss_hits_and_gradients_of_the_whole(head):
    targets = torch.arange(10) % 7
    found = []
    for most in (7 * 10, 7 * 4, 1):
        rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
        head.zero_grad()
        total, right = masked_cross_entropy(rows, targets, head, most)
        total.backward()
        found.append([total.detach(), right.float(), rows.grad, *(p.grad.clone() for p in head.parameters())])
    for chunked in found[1:]:
        for one, whole in zip(chunked, found[0], strict=True):
            assert torch.allclose(one, whole, atol=1e-5)


def test_chunks_keep_no_more_logits_than_asked_for():
    seen, head = [], nn.Linear(4, 7)
    head.register_forward_hook(lambda module, given, out: seen.append(out.numel()))
    masked_cross_entropy(torch.randn(10, 4, requires_grad=True), torch.zeros(10).long(), head, 7 * 4)
    assert seen == [28, 28, 14]


def test_one_process_gathers_its_own_rows():
    x = torch.randn(3, 2)
    found, first = gather_rows(x)
    assert found is x
    assert first == 0


def table():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def contrast(mine, everything, first):
    """A loss in which every row meets all rows: each rank's share of a sum."""
    targets = first + torch.arange(len(mine))
    return F.cross_entropy(mine @ everything.T, targets, reduction="sum")


def gradient_as_ranks():
    ranks = start()
    share = 6 // ranks.world
    mine = table()[ranks.rank * share : (ranks.rank + 1) * share].requires_grad_()
    everything, first = gather_rows(mine)
    contrast(mine, everything, first).backward()
    found = [everything.detach().tolist(), first, mine.grad.tolist()]
    ranks.stop()
    return found


@pytest.fixture
def gathered(on_ranks):
    return on_ranks(gradient_as_ranks, 2)


def test_two_ranks_gather_as_one_process_does(gathered):
    rows = table().requires_grad_()
    contrast(rows, rows, 0).backward()
    (all_0, first_0, grad_0), (all_1, first_1, grad_1) = gathered
    assert all_0 == all_1 == rows.tolist()
    assert (first_0, first_1) == (0, 3)
    assert torch.allclose(torch.tensor(grad_0 + grad_1, dtype=torch.float64), rows.grad, atol=1e-12)
