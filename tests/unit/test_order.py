import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import beitctl.data.order as order_module
from beitctl.data.order import BLOCK, Order, Part, digest, generator, permutation, share, snake

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def orders(draw):
    """A sequence over one or several parts, some of them in shards."""
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        shards = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=8)))
        weight = draw(st.floats(0.05, 20))
        count = sum(shards) or draw(st.integers(1, 200))
        parts.append(Part(count, shards if sum(shards) else (), weight, draw(st.integers(0, 20))))
    return Order(parts, draw(st.sampled_from(["image", "pair"])))


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(order_module, "WINDOW", 16)


@FEW
@given(orders=orders(), seed=st.integers(0, 2**40), start=st.integers(0, 20_000))
def test_each_part_holds_every_example_exactly_once_an_epoch(orders, seed, start):
    seen = {}
    for position in range(start, start + 3000):
        epoch, index = orders.at(position, seed)
        part = int(np.searchsorted(orders.starts, index, side="right")) - 1
        seen.setdefault((part, epoch), []).append(index - orders.starts[part])
    for (part, epoch), found in seen.items():
        assert len(found) == len(set(found))
        whole = min(e for p, e in seen if p == part) < epoch < max(e for p, e in seen if p == part)
        if whole:
            assert sorted(found) == list(range(orders.parts[part].count))


@FEW
@given(orders=orders(), position=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_a_position_does_not_depend_on_what_was_asked_before(orders, position, seed):
    warm = [orders.at(position + offset, seed) for offset in range(5)]
    fresh = Order(orders.parts, orders.name)
    assert [fresh.at(position + offset, seed) for offset in (4, 3, 2, 1, 0)] == warm[::-1]


@FEW
@given(orders=orders(), seed=st.integers(0, 99))
def test_every_part_of_a_mixture_has_its_share_of_every_block(orders, seed):
    epochs = np.zeros(len(orders.parts), np.int64)
    for position in range(BLOCK):
        _, index = orders.at(BLOCK * 7 + position, seed)
        epochs[int(np.searchsorted(orders.starts, index, side="right")) - 1] += 1
    weights = np.array([part.weight for part in orders.parts])
    assert np.abs(epochs - weights / weights.sum() * BLOCK).max() < 1


def test_examples_in_shards_are_read_from_few_shards_at_a_time():
    order = Order([Part(1000, (10,) * 100)], "a")
    for first in range(0, 992, 16):
        assert len({order.at(first + offset, 0)[1] // 10 for offset in range(16)}) <= 3
    assert len({order.at(position, 0)[1] // 10 for position in range(1000)}) == 100


def test_a_source_may_mix_fewer_examples_at_a_time():
    order = Order([Part(1000, (10,) * 100, window=5)], "a")
    for first in range(0, 1000, 5):
        assert len({order.at(first + offset, 0)[1] // 10 for offset in range(5)}) == 1


def test_shards_are_shuffled_anew_in_every_epoch():
    order = Order([Part(1000, (10,) * 100)], "a")
    assert [order.at(p, 0)[1] for p in range(1000)] != [order.at(1000 + p, 0)[1] for p in range(1000)]


@pytest.mark.parametrize("parts", [[Part(0)], [Part(5, (2, 2))], [Part(5, weight=1.0), Part(5, weight=1e5)]])
def test_parts_that_cannot_be_are_refused(parts):
    with pytest.raises(ValueError, match=r"a part (of|has)"):
        Order(parts, "a")


def test_epochs_seeds_and_names_are_shuffled_differently():
    orders = {permutation(50, *key).tobytes() for key in ((0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0))}
    assert len(orders) == 4


def test_the_order_of_a_seed_never_changes():
    assert [Order([Part(10)], "image").at(p, 7) for p in range(8, 12)] == [(0, 3), (0, 6), (1, 2), (1, 5)]
    shards = Order([Part(10, (4, 3, 3))], "image")
    assert [shards.at(p, 7) for p in range(8, 12)] == [(0, 7), (0, 2), (1, 6), (1, 7)]
    mixed = Order([Part(10), Part(7, (3, 4), 2.0)], "image")
    assert [mixed.at(p, 7) for p in range(8, 12)] == [(0, 8), (0, 16), (0, 2), (0, 15)]


def test_a_kept_permutation_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        permutation(5, 0, "a", 0)[0] = 1


def test_every_index_is_equally_likely_at_the_first_place():
    counts = np.bincount([permutation(4, seed, "a", 0)[0] for seed in range(2000)])
    assert counts.min() > 430


def test_a_negative_position_is_refused():
    with pytest.raises(ValueError, match="no example at position -1"):
        Order([Part(5)], "a").at(-1, 0)


@FEW
@given(costs=st.lists(st.integers(0, 100), max_size=200), parts=st.integers(1, 16))
def test_a_snake_deals_every_place_once_and_evenly(costs, parts):
    dealt = [snake(np.array(costs), parts, part) for part in range(parts)]
    assert sorted(place for mine in dealt for place in mine) == list(range(len(costs)))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    sums = [sum(costs[place] for place in mine) for mine in dealt]
    assert max(sums) - min(sums) <= 2 * max(costs, default=0)


def test_a_snake_balances_better_than_contiguous_shares():
    costs = np.random.default_rng(0).integers(3, 64, 256)

    def spread(parts):
        sums = [costs[list(part)].sum() for part in parts]
        return max(sums) / min(sums)

    snakes = spread([snake(costs, 8, part) for part in range(8)])
    assert snakes < 1.02 < spread([share(256, 8, part) for part in range(8)])


@pytest.mark.parametrize("part", [-1, 3])
def test_a_part_of_a_snake_that_is_not_there_is_refused(part):
    with pytest.raises(ValueError, match=rf"part \({part}\) must lie in 0..2"):
        snake(np.arange(10), 3, part)


@FEW
@given(total=st.integers(0, 10_000), parts=st.integers(1, 64))
def test_shares_are_contiguous_balanced_and_complete(total, parts):
    ranges = [share(total, parts, part) for part in range(parts)]
    assert [i for r in ranges for i in r] == list(range(total))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("part", [-1, 3])
def test_a_part_that_is_not_there_is_refused(part):
    with pytest.raises(ValueError, match=rf"part \({part}\) must lie in 0..2"):
        share(10, 3, part)


def test_equal_keys_give_equal_numbers():
    assert generator(1, "mask", 2, 3).random() == generator(np.int64(1), "mask", 2, 3).random()


def test_keys_that_read_alike_give_different_numbers():
    keys = [(1, 23), (12, 3), ("1", 23), (1, "23"), ("ab", "c"), ("a", "bc"), (123,), (-1, 23)]
    assert len({generator(*key).random() for key in keys}) == len(keys)


def test_bytes_and_text_hash_differently():
    assert digest(b"a") != digest("a")
