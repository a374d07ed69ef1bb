"""Items of several objectives in one packed batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from beitctl.api import Item
from beitctl.config import ModelConfig
from beitctl.data.batch import Portion, collate

SMALL = ModelConfig(layers=1, width=8, heads=2, ffn=8, image_px=4, patch_px=2)


def image(value):
    """A picture of one value, with one predicted patch whose code is the value."""
    targets = np.array([-1, -1, value, -1])
    return Item(image=np.full((3, 4, 4), value, np.uint8), image_mask=targets >= 0, patch_targets=targets)


def text(*ids, label=-1):
    ids = np.array(ids)
    return Item(text=ids, text_targets=np.where(ids % 2, ids, -1), label=label)


def both(value, *ids, label=-1):
    picture, words = image(value), text(*ids)
    return Item(
        picture.image, words.text, picture.image_mask, picture.patch_targets, words.text_targets, label
    )


PORTIONS = [
    Portion("words", "text", [text(10, 11), text(13)]),
    Portion("pair", "pair", [both(3, 20, 21, 22), both(4, 23)]),
    Portion("dual", "dual", [both(5, 30, label=7), both(6, 31, 32, label=8)]),
    Portion("image", "image", [image(1), image(2)]),
]


@pytest.fixture
def batch():
    return collate(PORTIONS, SMALL)


def test_pictures_come_in_the_order_of_the_plan(batch):
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 2, 5, 6, 3, 4]
    assert batch.pixels.dtype == torch.uint8
    assert batch.image_mask.sum(1).tolist() == [1] * 6


def test_ids_come_in_the_order_of_the_plan(batch):
    assert batch.ids.tolist() == [20, 21, 22, 23, 10, 11, 13, 30, 31, 32]


def test_the_plan_knows_alone_and_joined_sequences(batch):
    assert (batch.plan.images, batch.plan.pair_lengths, batch.plan.text_lengths) == (4, (3, 1), (2, 1, 1, 2))


def rows_of(batch):
    """What stands in each row of the packed buffer: a picture's value, or an id."""
    pictures = batch.pixels[:, 0, 0, 0].long().repeat_interleave(5)
    return torch.cat([pictures, batch.ids])


@pytest.mark.parametrize(
    ("name", "values"), [("image", [1, 2]), ("pair", [3, 4]), ("dual", [5, 6]), ("words", [])]
)
def test_picture_rows_of_a_group_are_those_of_its_pictures(batch, name, values):
    found = rows_of(batch)[batch.groups[name].picture_rows]
    assert found.tolist() == [[value] * 5 for value in values]


@pytest.mark.parametrize(
    ("name", "firsts"), [("image", []), ("pair", [20, 23]), ("dual", [30, 31]), ("words", [10, 13])]
)
def test_text_rows_of_a_group_begin_its_texts(batch, name, firsts):
    assert rows_of(batch)[batch.groups[name].text_first].tolist() == firsts


@pytest.mark.parametrize(
    ("name", "patches", "ids"),
    [
        ("image", [1, 2], []),
        ("pair", [3, 4], [21, 23]),
        ("dual", [5, 6], [31]),
        ("words", [], [11, 13]),
    ],
)
def test_targets_of_a_group_stand_at_its_own_rows(batch, name, patches, ids):
    group, rows = batch.groups[name], rows_of(batch)
    assert group.patch_targets.tolist() == rows[group.patch_rows].tolist() == patches
    assert (group.patch_rows % 5).tolist() == [3] * len(patches)  # the class token comes first
    assert group.text_targets.tolist() == rows[group.text_rows].tolist() == ids


def test_labels_and_counts_are_per_group(batch):
    assert batch.groups["dual"].labels.tolist() == [7, 8]
    assert batch.groups["dual"].counts == {"patch": 2, "text": 1, "sample": 2}


def test_a_portion_without_items_has_an_empty_group():
    batch = collate([PORTIONS[0], Portion("pair", "pair", [])], SMALL)
    assert batch.groups["pair"].counts == {"patch": 0, "text": 0, "sample": 0}
    assert batch.pixels.shape == (0, 3, 4, 4)


def test_without_any_items_the_batch_is_empty():
    batch = collate([Portion("pair", "pair", [])], SMALL)
    assert batch.plan.tokens == 0
    assert batch.keep is None


def test_scales_of_stochastic_depth_follow_the_sequences_and_dual_halves_share_theirs():
    def scaled(portion, first):
        numbers = first + np.arange(len(portion.items), dtype=np.float32)
        return Portion(
            portion.name, portion.layout, portion.items, np.tile(numbers[:, None, None], (1, 3, 2))
        )

    words, pair, dual, pictures = (scaled(p, 10 * i) for i, p in enumerate(PORTIONS))
    keep = collate([words, pair, dual, pictures], SMALL).keep
    assert keep.shape == (3, 2, 10)
    assert keep[2, 1].tolist() == [30, 31, 20, 21, 10, 11, 0, 1, 20, 21]


WORDS = replace(SMALL, vocabulary=40, text_tokens=5)


def test_fillers_stand_behind_the_texts_of_both_segments_and_no_target_names_them():
    batch, filled = collate(PORTIONS, WORDS), collate(PORTIONS, WORDS, 8)
    assert filled.plan.fillers == (4, 2)
    assert filled.ids.tolist() == [20, 21, 22, 23, 0, 0, 0, 0, 10, 11, 13, 30, 31, 32, 0, 0]
    nv = filled.plan.cuts[1]
    for name, group in filled.groups.items():
        assert torch.equal(filled.ids[group.text_rows - nv], batch.ids[batch.groups[name].text_rows - nv])
        assert torch.equal(group.patch_rows, batch.groups[name].patch_rows)


def test_fillers_are_never_dropped_by_stochastic_depth():
    portions = [replace(p, keep=np.zeros((len(p.items), 1, 2), np.float32)) for p in PORTIONS]
    keep = collate(portions, WORDS, 8).keep
    assert keep[0, 0].tolist() == [0] * 4 + [0, 0, 1] + [0] * 4 + [1]


def test_a_model_without_text_has_no_fillers():
    assert collate([PORTIONS[3]], SMALL, 8).plan.fillers is None


def test_a_batch_moves_with_all_its_groups(batch):
    moved = batch.to(torch.device("meta"))
    tensors = [moved.pixels, moved.ids, moved.image_mask]
    for group in moved.groups.values():
        tensors += [value for key, value in vars(group).items() if key not in ("extra", "step")]
        tensors += [tensor for extra in group.extra for tensor in extra.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.plan is batch.plan


def test_every_tensor_of_a_batch_is_pinned(batch, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    same = batch.pin_memory()
    assert {id(tensor) for tensor in pinned} >= {id(batch.pixels), id(batch.ids), id(batch.image_mask)}
    assert {id(batch.groups["pair"].patch_rows), id(batch.groups["image"].patch_targets)} <= set(
        map(id, pinned)
    )
    assert same.pixels is batch.pixels


def twice(first, second, *ids, label=-1):
    return replace(both(first, *ids, label=label), second=np.full((3, 4, 4), second, np.uint8))


NLVR2 = Portion("two", "two-pairs", [twice(7, 8, 40, 41, label=1), twice(9, 10, 42, label=0)])


def test_two_pairs_are_all_first_pictures_then_all_second_ones_with_the_same_text():
    batch = collate([PORTIONS[1], NLVR2, PORTIONS[3]], SMALL)
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 7, 9, 8, 10]
    assert batch.ids.tolist() == [20, 21, 22, 23, 40, 41, 42, 40, 41, 42]
    assert batch.picture_types.tolist() == [1, 1, 1, 1, 1, 1, 2, 2]
    group = batch.groups["two"]
    assert group.labels.tolist() == [1, 0]
    assert (group.picture_rows[:, 0] // batch.plan.picture_tokens).tolist() == [4, 5, 6, 7]
    assert (group.text_first - batch.plan.cuts[1]).tolist() == [4, 6, 7, 9]


def test_two_pairs_share_their_stochastic_depth():
    keep = np.arange(4, dtype=np.float32).reshape(2, 1, 2)
    batch = collate([replace(NLVR2, keep=keep)], SMALL)
    assert batch.keep[0, 0].tolist() == [0, 2, 0, 2]


def test_batches_without_second_pictures_have_no_picture_types(batch):
    assert batch.picture_types is None


def test_causal_text_is_that_of_the_batch():
    causal = replace(PORTIONS[1], causal_text=True)
    assert collate([causal, PORTIONS[0]], SMALL).plan.causal_text
    assert not collate([PORTIONS[1]], SMALL).plan.causal_text


def test_captions_and_other_pairs_do_not_mix():
    with pytest.raises(ValueError, match="captioning and other pairs cannot share a batch"):
        collate([replace(PORTIONS[1], causal_text=True), NLVR2], SMALL)


def test_extra_arrays_come_along_item_by_item():
    items = [replace(image(n), extra={"scores": np.full(n, 0.5, np.float32)}) for n in (1, 3)]
    group = collate([Portion("image", "image", items)], SMALL).groups["image"]
    assert [one["scores"].tolist() for one in group.extra] == [[0.5], [0.5] * 3]


def test_a_batch_knows_the_step_that_it_belongs_to():
    assert collate(PORTIONS, SMALL, step=7).groups["words"].step == 7
