"""VLMo equals the official code on small random weights: pairs, both unimodal paths, all pretraining heads.

Reference: outputs of microsoft/unilm 768a3c8 in shared/reference/vlmo. Tolerance 2e-5 absolute in fp32: the
sums run in another order. Our texts stand without their padding, so rows at padding are not compared.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import beitctl
from beitctl.checkpoints import mapping
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.loading import read_model
from beitctl.checkpoints.mapping import UNREAD
from beitctl.checkpoints.unilm_vlmo import UnilmVlmo

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "vlmo"
TOLERANCE = 2e-5
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)


@pytest.fixture(scope="module")
def model():
    return beitctl.load_model(FOLDER / "vlmo.pth")


@pytest.fixture(scope="module")
def inputs():
    """Pictures, ids, and True at padding."""
    found = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "inputs.npz").items()}
    return found["images"], found["ids"], found["text_mask"] == 0


@pytest.fixture(scope="module")
def expected():
    return {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "outputs.npz").items()}


@torch.no_grad()
def pair_rows(model, inputs):
    images, ids, pad = inputs
    found = model.model(images, ids, text_pad=pad)
    return {"text_feats": found[:, : ids.shape[1]][~pad], "image_feats": found[:, ids.shape[1] :]}


def difference(found, expected):
    assert found.shape == expected.shape
    return (found - expected).abs().max()


def test_some_text_is_padded(inputs):
    assert inputs[2].any()
    assert not inputs[2].all(1).any()


def test_texts_of_pairs_equal_and_stand_first(model, inputs, expected):
    found = pair_rows(model, inputs)["text_feats"]
    assert difference(found, expected["pair.text_feats"][~inputs[2]]) < TOLERANCE


def test_pictures_of_pairs_equal(model, inputs, expected):
    assert difference(pair_rows(model, inputs)["image_feats"], expected["pair.image_feats"]) < TOLERANCE


@torch.no_grad()
def test_pooled_pairs_equal(model, inputs, expected):
    assert difference(model.pooled(*inputs), expected["pair.cls_feats"]) < TOLERANCE


@torch.no_grad()
def test_matching_logits_equal(model, inputs, expected):
    images, ids, pad = inputs
    found = model(images, ids, text_pad=pad)["match"]
    assert difference(found, expected["pair.itm"]) < TOLERANCE


@torch.no_grad()
def test_logits_of_words_equal_and_are_zero_at_padding(model, inputs, expected):
    images, ids, pad = inputs
    found = model(images, ids, text_pad=pad)["text"]
    assert difference(found[~pad], expected["pair.mlm"][~pad]) < TOLERANCE
    assert not found[pad].any()


@torch.no_grad()
def test_texts_alone_equal(model, inputs, expected):
    _, ids, pad = inputs
    found = model.model(text=ids, text_pad=pad)
    assert difference(found[~pad], expected["text.feats"][~pad]) < TOLERANCE


@torch.no_grad()
def test_pictures_alone_equal(model, inputs, expected):
    assert difference(model.model(inputs[0]), expected["image.feats"]) < TOLERANCE


@torch.no_grad()
def test_vectors_of_texts_equal(model, inputs, expected):
    assert difference(model.embed_text(*inputs[1:]), expected["text.cls_feats"]) < TOLERANCE


@torch.no_grad()
def test_vectors_of_pictures_equal(model, inputs, expected):
    assert difference(model.embed_image(inputs[0]), expected["image.cls_feats"]) < TOLERANCE


@torch.no_grad()
def test_vectors_of_texts_through_the_experts_of_pairs_equal(model, inputs, expected):
    found = model.embed_fused(text=inputs[1], text_pad=inputs[2])
    assert difference(found, expected["text.cls_vlffn_feats"]) < TOLERANCE


@torch.no_grad()
def test_vectors_of_pictures_through_the_experts_of_pairs_equal(model, inputs, expected):
    assert difference(model.embed_fused(inputs[0]), expected["image.cls_vlffn_feats"]) < TOLERANCE


def test_positions_that_the_official_model_does_not_add_are_kept_unread():
    unread = read_model(FOLDER / "vlmo.pth").unread
    names = [f"text_embeddings.{name}_embeddings.weight" for name in ("position", "token_type")]
    assert {name: value.numel() for name, value in unread.items()} == {names[0]: 9 * 48, names[1]: 48}


@pytest.mark.parametrize("with_unread", [True, False])
def test_the_file_is_written_back_bit_for_bit(with_unread):
    official, stored = read_tensors(FOLDER / "vlmo.pth"), read_model(FOLDER / "vlmo.pth")
    kept = {UNREAD + name: value for name, value in stored.unread.items()} if with_unread else {}
    shapes = {name: value.shape for name, value in (stored.tensors | kept).items()}
    table = UnilmVlmo().table(stored.model, shapes)
    written = mapping.write(table, stored.tensors, stored.unread)
    assert written.keys() == official.keys()
    assert all(torch.equal(written[name], value) for name, value in official.items())
    assert mapping.untold(table, stored.tensors) == []
