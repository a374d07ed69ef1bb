"""The codebook starts from the data, follows them, and wakes codes that nothing uses."""

import math

import pytest
import torch
from torch.nn import functional as F

from beitctl.model.codebook import (
    TEMPERATURE,
    Codebook,
    Rules,
    Upkeep,
    lloyd,
    nearest,
    perplexity,
    picked,
    spread_out,
)

PICTURES, PATCHES = 4, 8


def made(codes=4, width=2, pictures=PICTURES, **rules):
    book = Codebook(codes, width)
    found = Upkeep(book, Rules(**rules), pictures)
    book.reset_buffers()
    found.reset_buffers()
    return found


def unit(*angles):
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def cloud(seed=0, pictures=PICTURES, patches=PATCHES, width=2):
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(pictures, patches, width, generator=draw), dim=-1)


def step(upkeep, z, parts=1):
    """One step of training on (B, N, D) vectors, in several passes."""
    for places in torch.arange(len(z)).chunk(parts):
        part = z[places]
        chosen = upkeep.chosen(places, z.shape[1])
        codes = upkeep.book.assign(part.flatten(0, 1)).view(part.shape[:2]) if upkeep.awake else None
        upkeep.see(part, codes, places, chosen)
    upkeep.after_step()


def ready(upkeep, vectors):
    """The same with the given codes."""
    upkeep.book.vectors.copy_(vectors)
    upkeep.book.ready.fill_(1)
    return upkeep


def test_it_starts_on_the_clusters_of_the_data():
    found = made(pictures=50)
    centres = unit(0.0, 1.5, 3.0, 4.5)
    noise = torch.randn(50, 4, 2, generator=torch.Generator().manual_seed(0))
    step(found, F.normalize(centres + 0.01 * noise, dim=-1))
    assert len(found.book.assign(centres).unique()) == 4
    assert torch.allclose(found.book.vectors.norm(dim=-1), torch.ones(4))


def test_it_sleeps_as_long_as_it_was_told_to():
    found = made(start_after=3)
    for _ in range(2):
        step(found, cloud())
        assert not found.awake
    step(found, cloud())
    assert found.awake


def test_a_start_after_some_steps_knows_the_vectors_of_all_of_them():
    found = made(codes=4, pictures=1, start_after=4)
    for angle in (0.0, 1.5, 3.0, 4.5):
        step(found, unit(angle).view(1, 1, 2))
    assert sorted(found.book.assign(unit(0.0, 1.5, 3.0, 4.5)).tolist()) == [0, 1, 2, 3]


def test_it_starts_once():
    found = made(decay=0.9999)
    step(found, cloud(0))
    before = found.book.vectors.clone()
    step(found, cloud(1))
    assert torch.allclose(found.book.vectors, before, atol=1e-3)


def test_a_used_code_moves_toward_the_mean_and_others_stay():
    found = ready(made(codes=2, pictures=1, decay=0.9), unit(0.0, 3.0))
    z = unit(0.2, 0.4)
    step(found, z[None])
    mean = F.normalize(z.mean(0), dim=0)
    assert torch.allclose(found.book.vectors[0], F.normalize(0.9 * unit(0.0)[0] + 0.1 * mean, dim=0))
    assert torch.equal(found.book.vectors[1], unit(3.0)[0])


def test_an_idle_code_is_put_on_the_data():
    found = ready(made(codes=2, pictures=1, revive_after=4), unit(0.0, 3.0))
    z = unit(0.1, 0.2)
    for _ in range(4):
        step(found, z[None])
    assert float((found.book.vectors[1] @ z.T).max()) == pytest.approx(1.0)


def test_idle_codes_go_where_no_code_is_near():
    """Of 63 vectors beside a code and one far from all, the far one is taken."""
    found = ready(made(codes=2, pictures=1, revive_after=1), unit(0.0, -2.0))
    z = torch.cat([unit(*torch.linspace(-0.001, 0.001, 63).tolist()), unit(2.0)])
    step(found, z[None])
    assert float(found.book.vectors[1] @ unit(2.0)[0]) == pytest.approx(1.0, abs=1e-3)


def test_without_revival_an_idle_code_stays_dead():
    found = ready(made(codes=2, pictures=1), unit(0.0, 3.0))
    for _ in range(20):
        step(found, unit(0.1)[None])
    assert torch.equal(found.book.vectors[1], unit(3.0)[0])


@pytest.mark.parametrize("rules", [{}, {"start_after": 2}, {"revive_after": 1}, {"start": "random"}])
@pytest.mark.parametrize("parts", [2, 4])
def test_passes_change_nothing(rules, parts):
    whole, apart = made(codes=16, **rules), made(codes=16, **rules)
    for seed in range(5):
        step(whole, cloud(seed))
        step(apart, cloud(seed), parts)
    assert torch.allclose(whole.book.vectors, apart.book.vectors, atol=1e-6)
    assert torch.equal(whole.usage, apart.usage)
    assert torch.equal(whole.pool, apart.pool)


def test_the_pool_keeps_the_latest_vectors():
    found = made(codes=2, pictures=1, pool=8)
    for angle in torch.linspace(0, 6, 20):
        step(found, unit(float(angle)).view(1, 1, 2))
    expected = unit(*torch.linspace(0, 6, 20)[-8:].tolist())
    assert torch.allclose(torch.sort(found.pool[:, 0])[0], torch.sort(expected[:, 0])[0])


def test_numbers_that_are_not_finite_leave_the_codes_alone():
    found = ready(made(codes=2, pictures=1), unit(0.0, 3.0))
    step(found, torch.full((1, 8, 2), math.nan))
    assert torch.equal(found.book.vectors, unit(0.0, 3.0))


def test_it_goes_on_from_its_buffers():
    whole, first, second = (made(codes=8, revive_after=2, start_after=2) for _ in range(3))
    for seed in range(6):
        step(whole, cloud(seed))
    for seed in range(3):
        step(first, cloud(seed))
    second.load_state_dict(first.state_dict())
    second.book.load_state_dict(first.book.state_dict())
    for seed in range(3, 6):
        step(second, cloud(seed))
    assert torch.equal(whole.book.vectors, second.book.vectors)
    assert torch.equal(whole.pool, second.pool)


def test_after_a_return_to_an_earlier_state_it_starts_again_from_that_state():
    found = made(start_after=3)
    step(found, cloud(1))
    before = {name: value.clone() for name, value in [*found.named_buffers(), *found.book.named_buffers()]}
    for seed in (2, 3):
        step(found, cloud(seed))
    once = found.book.vectors.clone()
    found.see(cloud(9), None, torch.arange(PICTURES), found.chosen(torch.arange(PICTURES), PATCHES))
    for name, value in [*found.named_buffers(), *found.book.named_buffers()]:
        value.copy_(before[name])
    found.loaded()
    assert not found.awake
    for seed in (2, 3):
        step(found, cloud(seed))
    assert found.awake
    assert torch.equal(found.book.vectors, once)


def test_crowded_codes_cost_more_than_rare_ones():
    found = ready(made(codes=2, pictures=1), unit(0.0, 3.0))
    found.share.copy_(torch.tensor([0.9, 0.1]))
    crowded, rare = found.unevenness(unit(0.0, 3.0)).tolist()
    assert crowded > 0 > rare


def test_the_running_share_is_that_of_soft_assignments():
    found = ready(made(codes=2, pictures=1), unit(0.0, 3.0))
    z = unit(0.1, 0.2)[None]
    found.unevenness(z[0])
    step(found, z)
    assert found.share.tolist() == pytest.approx([0.55, 0.45], abs=1e-3)


def test_the_entropy_term_has_the_gradient_of_the_negative_entropy():
    """While the running share is the mean soft assignment itself."""
    found = ready(made(codes=4, width=2), unit(0.0, 1.0, 2.0, 4.0))
    z = unit(0.1, 0.2, 1.2, 3.9).requires_grad_(True)
    soft = (z @ found.book.vectors.T / TEMPERATURE).softmax(-1).mean(0)
    found.share.copy_(soft.detach())
    (wanted,) = torch.autograd.grad(-torch.special.entr(soft).sum(), z)
    (got,) = torch.autograd.grad(found.unevenness(z).mean(), z)
    assert torch.allclose(got, wanted, atol=1e-2 * float(wanted.abs().max()))


def test_the_spread_out_start_finds_small_clusters():
    """Four groups, one of 5 among 1005 vectors: k-means++ has a centre in each of them."""
    angles = [*torch.linspace(0, 0.02, 1000).tolist(), *torch.linspace(2, 2.01, 5).tolist()]
    known = unit(*angles, *([1.0] * 100), *([4.0] * 100))
    centres = spread_out(known, 4, torch.Generator().manual_seed(0))
    assert len(nearest(unit(0.0, 1.0, 2.0, 4.0), lloyd(known, centres))[0].unique()) == 4


def test_random_centres_are_distinct_while_there_are_enough():
    known = cloud(0, 1, 40)[0]
    assert len(picked(known, 40, torch.Generator().manual_seed(0)).unique(dim=0)) == 40
    assert len(picked(known, 50, torch.Generator().manual_seed(0))) == 50


def test_fewer_vectors_than_codes_are_enough_to_start():
    found = made(codes=64, pictures=1)
    step(found, cloud(0, 1, 4))
    assert torch.isfinite(found.book.vectors).all()


def test_perplexity_counts_codes_in_even_use():
    assert perplexity(torch.tensor([5.0, 5.0, 5.0, 5.0, 0.0])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([9.0, 0.0])) == pytest.approx(1.0)
