import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beitctl.data.order import digest, generator, index_at, permutation, share

FEW = settings(max_examples=40, deadline=None)


@FEW
@given(n=st.integers(1, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_an_epoch_holds_every_example_exactly_once(n, seed, epoch):
    seen = [index_at(epoch * n + place, n, seed, "a") for place in range(n)]
    assert {e for e, _ in seen} == {epoch}
    assert sorted(index for _, index in seen) == list(range(n))


@FEW
@given(position=st.integers(0, 10**6), n=st.integers(1, 1000), seed=st.integers(0, 99))
def test_a_position_does_not_depend_on_what_was_asked_before(position, n, seed):
    warm = index_at(position, n, seed, "a")
    permutation.cache_clear()
    assert index_at(position, n, seed, "a") == warm


def test_epochs_seeds_and_names_are_shuffled_differently():
    orders = {permutation(50, *key).tobytes() for key in ((0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0))}
    assert len(orders) == 4


def test_the_order_of_a_seed_never_changes():
    assert [index_at(p, 10, 7, "image") for p in range(8, 12)] == [(0, 3), (0, 6), (1, 2), (1, 5)]


def test_a_kept_permutation_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        permutation(5, 0, "a", 0)[0] = 1


def test_every_index_is_equally_likely_at_the_first_place():
    counts = np.bincount([permutation(4, seed, "a", 0)[0] for seed in range(2000)])
    assert counts.min() > 430


@pytest.mark.parametrize(("position", "n"), [(-1, 5), (0, 0)])
def test_a_position_that_cannot_be_is_refused(position, n):
    with pytest.raises(ValueError, match=f"no example at position {position} of a source with {n} examples"):
        index_at(position, n, 0, "a")


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
