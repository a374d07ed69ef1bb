from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beitctl.data.masking import block_mask, text_mask
from beitctl.data.order import generator
from beitctl.errors import UserError


@dataclass
class Ids:
    """What masking asks of a text tokenizer; by default XLM-R's layout, where the mask is the last id."""

    mask_id: int
    special_ids: tuple = (0, 1, 2, 3)
    size: int = 0

    def __post_init__(self):
        self.size = self.size or self.mask_id + 1


MASK = 99
IDS = np.array([0, 5, 6, 7, 8, 9, 10, 11, 12, 13, 2])


@pytest.fixture(scope="module")
def ragged():
    return np.stack([block_mask(14, 14, 75, generator("ragged", i), exact=False) for i in range(3000)])


def test_blocks_alone_reach_the_mean_count_of_beit(ragged):
    assert ragged.sum(1).mean() == pytest.approx(74.47, abs=0.1)


def test_blocks_alone_are_exact_as_often_as_in_beit(ragged):
    assert (ragged.sum(1) == 75).mean() == pytest.approx(0.666, abs=0.03)


def test_blocks_alone_have_the_percentiles_of_beit(ragged):
    assert np.percentile(ragged.sum(1), [1, 5, 25]) == pytest.approx([70, 72, 74], abs=1)


def test_blocks_alone_never_exceed_the_count(ragged):
    assert ragged.sum(1).max() == 75


@pytest.mark.parametrize(
    ("places", "share"),
    [([0, 13, 182, 195], 0.045), ([6, 7, 188, 189, 84, 97], 0.193), ([90, 91, 104, 105], 0.715)],
)
def test_the_mask_is_centre_heavy_as_in_beit(ragged, places, share):
    assert ragged[:, places].mean() == pytest.approx(share, abs=0.025)


@settings(max_examples=150, deadline=None)
@given(h=st.integers(1, 16), w=st.integers(1, 16), seed=st.integers(0, 10**6), data=st.data())
def test_the_exact_mask_hides_the_count_on_any_grid(h, w, seed, data):
    count = data.draw(st.integers(1, h * w))
    mask = block_mask(h, w, count, generator(seed))
    assert mask.shape == (h * w,)
    assert mask.sum() == count


@pytest.mark.parametrize("count", [26, 6])
def test_a_small_grid_is_still_masked_in_blocks(count):
    mask = block_mask(8, 8, count, generator(0), min_block=4).reshape(8, 8)
    beside = (mask[:, 1:] & mask[:, :-1]).sum() + (mask[1:] & mask[:-1]).sum()
    assert beside >= count / 2


def test_equal_draws_give_equal_masks():
    assert (block_mask(14, 14, 75, generator(3)) == block_mask(14, 14, 75, generator(3))).all()


def test_more_masked_patches_than_patches_are_refused():
    with pytest.raises(
        UserError, match=r"more masked patches \(17\) than patches \(16\); lower the mask ratio"
    ):
        block_mask(4, 4, 17, generator(0))


def test_no_masked_patch_is_refused():
    with pytest.raises(UserError, match=r"masked patches \(0\) must be at least 1; raise the mask ratio"):
        block_mask(4, 4, 0, generator(0))


def test_text_targets_are_the_ids_at_the_chosen_places_only():
    masked, targets = text_mask(IDS, 0.5, generator(1), Ids(MASK))
    chosen = targets >= 0
    assert (targets[chosen] == IDS[chosen]).all()
    assert (masked[~chosen] == IDS[~chosen]).all()


@pytest.mark.parametrize(("ratio", "count"), [(0.15, 1), (0.5, 4), (0.01, 1), (1.0, 9)])
def test_the_share_of_the_ordinary_tokens_is_rounded_and_at_least_one(ratio, count):
    assert (text_mask(IDS, ratio, generator(0), Ids(MASK))[1] >= 0).sum() == count


def test_special_tokens_are_never_chosen():
    for seed in range(50):
        _, targets = text_mask(np.array([0, 3, MASK, 50, 1, 2]), 1.0, generator(seed), Ids(MASK))
        assert targets.tolist() == [-1, -1, -1, 50, -1, -1]


def test_a_text_of_special_tokens_stays_as_it_is():
    masked, targets = text_mask(np.array([0, 2]), 0.5, generator(0), Ids(MASK))
    assert masked.tolist() == [0, 2]
    assert targets.tolist() == [-1, -1]


def test_four_fifths_are_masked_and_a_tenth_swapped():
    ids = np.full(20_000, 50)
    masked, _ = text_mask(ids, 1.0, generator(0), Ids(MASK))
    assert (masked == MASK).mean() == pytest.approx(0.8, abs=0.01)
    assert (masked == 50).mean() == pytest.approx(0.1 + 0.1 / 95, abs=0.01)


def test_swapped_tokens_are_ordinary_ids_below_the_mask():
    masked, _ = text_mask(np.full(5000, 50), 1.0, generator(0), Ids(60), mask_share=0, random_share=1)
    assert set(masked.tolist()) == set(range(4, 60))


def test_all_chosen_tokens_become_the_mask_if_asked():
    masked, _ = text_mask(IDS, 1.0, generator(0), Ids(MASK), mask_share=1, random_share=0)
    assert masked.tolist() == [0, *[MASK] * 9, 2]


def test_the_ids_given_are_not_changed():
    before = IDS.copy()
    text_mask(IDS, 1.0, generator(0), Ids(MASK))
    assert (before == IDS).all()


@pytest.mark.parametrize("ratio", [0, 1.1, float("nan")])
def test_a_share_of_masked_tokens_outside_of_0_to_1_is_refused(ratio):
    with pytest.raises(UserError, match=rf"share of masked tokens \({ratio}\) must be above 0 and at most 1"):
        text_mask(IDS, ratio, generator(0), Ids(MASK))


@pytest.mark.parametrize("shares", [(0.8, 0.3), (-0.1, 0.1)])
def test_shares_that_do_not_add_up_are_refused(shares):
    with pytest.raises(UserError, match=r"must add up to at most 1"):
        text_mask(IDS, 0.5, generator(0), Ids(MASK), mask_share=shares[0], random_share=shares[1])


def test_no_block_spans_the_grid():
    assert not block_mask(4, 30, 16, generator(0), min_block=16, min_aspect=1, exact=False).any()


WORDS = np.array([0, 10, 11, 12, 20, 21, 30, 40, 2])
STARTS = np.array([True, True, False, False, True, False, True, True, True])


def test_whole_words_are_hidden_together():
    for seed in range(50):
        _, targets = text_mask(WORDS, 0.4, np.random.default_rng(seed), Ids(99), starts=STARTS)
        hidden = set(np.flatnonzero(targets >= 0).tolist())
        assert all(set(word) <= hidden or not set(word) & hidden for word in ((1, 2, 3), (4, 5), (6,), (7,)))
        assert hidden


def test_whole_words_keep_to_the_share_unless_the_first_is_longer():
    counts = [
        int((text_mask(WORDS, 0.3, np.random.default_rng(s), Ids(99), starts=STARTS)[1] >= 0).sum())
        for s in range(200)
    ]
    assert set(counts) == {2, 3}


def test_a_text_without_words_stays_as_it_is_when_words_are_hidden_whole():
    ids = np.array([0, 2])
    masked, targets = text_mask(ids, 0.5, generator(0), Ids(99), starts=np.array([True, True]))
    assert masked.tolist() == [0, 2]
    assert (targets == -1).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), mask=st.integers(5, 500), length=st.integers(0, 40))
def test_the_draws_in_the_layout_of_xlm_r_are_those_of_ids_from_4_to_the_mask(seed, mask, length):
    ids = np.array([0, *np.random.default_rng(seed).integers(3, mask + 1, length), 2])
    draw = generator("plain", seed)
    ordinary = np.flatnonzero((ids >= 4) & (ids != mask))
    chosen = draw.choice(ordinary, min(max(round(0.5 * len(ordinary)), 1), len(ordinary)), replace=False)
    fate = draw.random(len(chosen))
    expected = ids.copy()
    expected[chosen[fate < 0.8]] = mask
    swapped = chosen[(fate >= 0.8) & (fate < 0.9)]
    expected[swapped] = draw.integers(4, mask, size=len(swapped))
    masked, _ = text_mask(ids, 0.5, generator("plain", seed), Ids(mask))
    assert masked.tolist() == expected.tolist()


BERT = (0, 100, 101, 102, 103)


def test_swapped_tokens_are_any_but_special_ids_wherever_those_are():
    ids = np.full(20_000, 50)
    masked, _ = text_mask(ids, 1.0, generator(0), Ids(103, BERT, 120), mask_share=0, random_share=1)
    assert set(masked.tolist()) == set(range(120)) - set(BERT)


def test_special_ids_are_never_chosen_wherever_they_are():
    for seed in range(20):
        _, targets = text_mask(
            np.array([101, 0, 100, 103, 7, 102]), 1.0, generator(seed), Ids(103, BERT, 120)
        )
        assert targets.tolist() == [-1, -1, -1, -1, 7, -1]


@pytest.mark.parametrize("special", [range(10), (9,), (0,), (5, 3, 3, 9, 40)])
def test_any_set_of_special_ids_is_left_out_of_the_draw(special):
    given = [id for id in range(10) if id not in special][:1] * 2000
    masked, _ = text_mask(
        np.array(given, dtype=np.int64), 1.0, generator(1), Ids(9, tuple(special), 10),
        mask_share=0, random_share=1,
    )  # fmt: skip
    assert set(masked.tolist()) == set(range(9)) - set(special)
