"""Masked data modelling: what is hidden, what is to be predicted, what the user is told."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from small import MODEL, Codes, Letters, coloured, png, rng, tools
from torch import nn

from beitctl.api import Example
from beitctl.data.batch import Portion, collate
from beitctl.errors import DataError, UserError
from beitctl_plugins.tasks.masked import MaskedImage, MaskedPair, MaskedText
from beitctl_plugins.tasks.preparing import framed, window

PICTURE = Example("p", png(), ("a red square on a table",))
PROSE = Example("t", text="words")


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 1.0), st.integers(1, 16), st.integers(0, 9))
def test_exactly_the_share_of_patches_is_hidden(ratio, min_block, seed):
    task = MaskedImage(mask_ratio=ratio, min_block=min_block)
    item = task.prepare(PICTURE, rng(seed), tools())
    assert item.image_mask.sum() == max(1, round(ratio * 16))


def test_a_share_of_one_hides_all():
    assert MaskedImage(mask_ratio=1.0).prepare(PICTURE, rng(), tools()).image_mask.all()


@pytest.mark.parametrize("task", [MaskedImage(), MaskedPair()])
def test_targets_are_the_codes_of_the_view_at_hidden_patches_and_nothing_elsewhere(task):
    seen = set()
    for seed in range(8):
        item = task.prepare(PICTURE, rng(seed), tools())
        view = int(item.patch_targets.max() >= 20)
        seen.add(view)
        assert (
            item.patch_targets.tolist() == np.where(item.image_mask, np.arange(16) + 20 * view, -1).tolist()
        )
    assert seen == {0, 1}


def test_the_picture_shows_the_crop_of_the_view():
    class Corner(Codes):
        def view(self, id, number):
            crop, codes = super().view(id, number)
            return replace(crop, height=10, width=10), codes

    stream, picture = io.BytesIO(), Image.new("RGB", (20, 20), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 12, 12))
    picture.save(stream, "PNG")
    item = MaskedImage().prepare(Example("p", stream.getvalue()), rng(), tools(tokens=Corner()))
    assert item.image.shape == (3, 16, 16)
    assert item.image[2].max() < 128


def test_a_masked_picture_has_no_text():
    assert MaskedImage().prepare(PICTURE, rng(), tools()).text is None


@settings(max_examples=30, deadline=None)
@given(st.text("abcdefgh ", min_size=1), st.floats(0.01, 1.0), st.integers(0, 9))
def test_hidden_captions_never_hide_start_or_end(caption, ratio, seed):
    task = MaskedPair(text_mask_ratio=ratio)
    item = task.prepare(Example("p", png(), (caption,)), rng(seed), tools())
    assert (item.text[0], item.text[-1]) == (0, 2)
    assert (item.text_targets[0], item.text_targets[-1]) == (-1, -1)


def test_the_share_of_the_captions_tokens_is_hidden():
    item = MaskedPair(text_mask_ratio=0.5).prepare(Example("p", png(), ("eight li",)), rng(), tools())
    assert (item.text_targets >= 0).sum() == 4


def test_text_targets_are_the_ids_that_were_there():
    item = MaskedText(mask_ratio=0.6).prepare(PROSE, rng(), tools())
    true = np.array([0, *Letters().encode("words"), 2])
    hidden = item.text_targets >= 0
    assert hidden.sum() == 3
    assert (item.text_targets[hidden] == true[hidden]).all()
    assert (item.text[~hidden] == true[~hidden]).all()


def test_the_last_id_of_the_tokenizer_hides_a_token():
    items = [MaskedText(mask_ratio=1.0).prepare(PROSE, rng(seed), tools()) for seed in range(8)]
    assert (np.concatenate([item.text for item in items]) == 51).sum() > 20


def test_a_caption_is_cut_to_the_models_length():
    item = MaskedPair().prepare(PICTURE, rng(), tools())
    assert len(item.text) == MODEL.text_tokens
    assert item.text[-1] == 2


def test_a_long_text_is_read_from_anywhere():
    longest = Example("t", text="".join(chr(97 + i % 26) for i in range(40)))
    starts = {
        int(MaskedText().prepare(longest, rng(seed), tools()).text_targets.argmax()) for seed in range(9)
    }
    windows = {tuple(window(list(range(30)), 8, rng(seed))) for seed in range(20)}
    assert len(starts) > 1
    assert all(list(found) == list(range(found[0], found[0] + 8)) for found in windows)
    assert len(windows) > 5


def test_a_text_that_fits_is_read_whole():
    assert window([5, 6, 7], 3, rng()) == [5, 6, 7]


def test_a_frame_is_start_and_end():
    assert framed([7, 8], Letters()).tolist() == [0, 7, 8, 2]


@pytest.mark.parametrize(("train", "expected"), [(True, 3), (False, 1)])
def test_training_draws_any_caption_and_evaluation_takes_the_first(train, expected):
    example = Example("p", png(), ("a", "b", "c"))
    task, used = MaskedPair(text_mask_ratio=1.0), set()
    for seed in range(20):
        used.add(int(task.prepare(example, rng(seed), tools(train=train)).text_targets.max()))
    assert len(used) == expected


@pytest.mark.parametrize("task", [MaskedImage(), MaskedText(), MaskedPair()])
def test_equal_draws_prepare_equal_items(task):
    example = Example("x", png(), ("a caption",), text="some prose")
    first, second = (task.prepare(example, rng(5), tools()) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_a_pair_without_hidden_patches_has_no_loss_on_them():
    task = MaskedPair(image_mask_ratio=0)
    assert list(task.terms()) == [""]
    assert list(task.heads(tools())) == ["text_tokens"]
    item = task.prepare(PICTURE, rng(), replace(tools(), tokens=None))
    assert item.image is not None
    assert item.image_mask is None
    assert item.patch_targets is None


def test_the_weight_of_a_pairs_patches_is_that_of_the_recipe():
    assert MaskedPair(image_weight=0.25).terms()["image"].weight == 0.25


@pytest.mark.parametrize(
    ("task", "sizes"),
    [
        (MaskedImage(), {"image_codes": 40}),
        (MaskedText(), {"text_tokens": 52}),
        (MaskedPair(), {"text_tokens": 52, "image_codes": 40}),
    ],
)
def test_heads_have_a_row_for_every_code_and_id(task, sizes):
    assert {name: head.out_features for name, head in task.heads(tools()).items()} == sizes


def test_the_loss_looks_at_predicted_rows_only_and_equals_torch():
    task, made = MaskedPair(text_mask_ratio=0.5), tools()
    items = [task.prepare(PICTURE, rng(seed), made) for seed in range(2)]
    group = collate([Portion("pair", "pair", items)], MODEL).groups["pair"]
    torch.manual_seed(0)
    heads = nn.ModuleDict(task.heads(made))
    rows = torch.randn(2 * 17 + 2 * 10, 8)
    found = task.loss(SimpleNamespace(rows=rows), group, heads)
    for name, head, at, targets in (
        ("", "text_tokens", group.text_rows, group.text_targets),
        ("image", "image_codes", group.patch_rows, group.patch_targets),
    ):
        expected = nn.functional.cross_entropy(heads[head](rows)[at], targets, reduction="sum")
        assert found[name][0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_outputs_are_the_likeliest_ids_of_predicted_rows():
    task = MaskedImage()
    group = collate([Portion("i", "image", [task.prepare(PICTURE, rng(), tools())])], MODEL).groups["i"]
    rows = torch.zeros(17, 40)
    rows[group.patch_rows, group.patch_targets] = 1
    assert task.output(SimpleNamespace(rows=rows), group, {"image_codes": nn.Identity()})["patch"].equal(
        group.patch_targets
    )


NEITHER = Example("nothing-here")


@pytest.mark.parametrize(
    ("task", "example", "message"),
    [
        (MaskedImage(), NEITHER, "nothing-here: no picture"),
        (MaskedText(), NEITHER, "nothing-here: no text"),
        (MaskedText(), Example("empty", text=""), "empty: no text"),
        (MaskedPair(), Example("mute", png()), "mute: no caption"),
        (MaskedPair(), Example("blind", captions=("a",)), "blind: no picture"),
        (MaskedImage(), Example("torn", png()[:60]), "torn: not a readable picture"),
    ],
)
def test_an_example_that_lacks_something_is_named(task, example, message):
    with pytest.raises(DataError, match=message):
        task.prepare(example, rng(), tools())


@pytest.mark.parametrize("task", [MaskedImage(), MaskedPair()])
def test_without_a_token_store_the_setting_is_named(task):
    with pytest.raises(
        UserError, match=r'predicts image codes: set tokens, for example to "@tokenize-images"'
    ):
        task.heads(tools(tokens=None))


def test_a_token_store_of_another_grid_is_refused():
    class Fine(Codes):
        grid = 8

    with pytest.raises(
        UserError,
        match="the token store has 8 x 8 codes a picture, the model 4 x 4 patches; make image_px / patch_px",
    ):
        MaskedImage().heads(tools(tokens=Fine()))


@pytest.mark.parametrize(("task", "example"), [(MaskedText(), PROSE), (MaskedPair(), PICTURE)])
def test_without_a_text_tokenizer_the_setting_is_named(task, example):
    with pytest.raises(UserError, match=r'set text_tokenizer, for example to "@train-tokenizer.text"'):
        task.prepare(example, rng(), tools(tokenizer=None))


def test_a_vocabulary_that_is_too_small_is_named():
    small = tools(model=replace(MODEL, vocabulary=51))
    with pytest.raises(
        UserError,
        match=r"vocabulary \(51\) is smaller than the 52 ids of the text tokenizer; raise vocabulary",
    ):
        MaskedText().prepare(PROSE, rng(), small)


def test_a_vocabulary_with_rows_to_spare_is_fine():
    spare = tools(model=replace(MODEL, vocabulary=60))
    assert MaskedText().prepare(PROSE, rng(), spare).text is not None


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        (MaskedImage, {"mask_ratio": 0}),
        (MaskedImage, {"mask_ratio": 1.1}),
        (MaskedImage, {"min_block": 0}),
        (MaskedText, {"mask_ratio": 1.5}),
        (MaskedPair, {"text_mask_ratio": 0}),
        (MaskedPair, {"image_mask_ratio": 2}),
        (MaskedPair, {"image_weight": -1}),
    ],
)
def test_impossible_shares_are_refused(task, settings):
    with pytest.raises(ValidationError, match=r"Input should be (greater|less)"):
        task(**settings)


def test_codes_belong_to_the_picture_of_the_example():
    asked = []

    class Asked(Codes):
        def view(self, id, number):
            asked.append(id)
            return super().view(id, number)

    examples = coloured("blue", "red").open()
    for example in examples.rows:
        MaskedImage().prepare(example, rng(), tools(tokens=Asked()))
    assert asked == ["0-blue", "1-red"]
