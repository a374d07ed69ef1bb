"""Files of unilm's BEiT-3: what is recognised, what is refused and why, other resolutions."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import beitctl
from beitctl.checkpoints import mapping
from beitctl.checkpoints.loading import read_model
from beitctl.checkpoints.models import (
    AnswerModel,
    CaptioningModel,
    ClassificationModel,
    MaskedModel,
    MatchingModel,
    ReasoningModel,
    RetrievalModel,
    model_with,
)
from beitctl.checkpoints.unilm_beit3 import UnilmBeit3
from beitctl.config import ModelConfig
from beitctl.errors import DataError, UserError
from beitctl.model.multiway import Multiway

FORM = UnilmBeit3()
BODY = ModelConfig(
    layers=2, width=8, heads=2, ffn=12, image_px=48, patch_px=16, vocabulary=20, text_tokens=6,
    attention="decoupled", init="released",
)  # fmt: skip
CLASSES = {"classifier.linear.weight": (5, 8)}
CAPTIONS = {"captions.weight": (20, 8)}
CONTRAST = {"contrastive.vision.weight": (8, 8)}
PRETRAINING = {"text_tokens.weight": (20, 8), "image_codes.weight": (9, 8)}
CONTRAST_AND_WORDS = CONTRAST | {"text_tokens.weight": (20, 8)}
ANSWERS = {
    "pooler.norm.weight": (8,), "pooler.linear.weight": (8, 8),
    "answers.up.weight": (16, 8), "answers.out.weight": (7, 16),
}  # fmt: skip
REASONING = {"reasoning.norm.weight": (32,), "reasoning.up.weight": (16, 32), "reasoning.out.weight": (2, 16)}
NORMS = [f"beit3.encoder.layer_norm.{x}.{part}" for x in "AB" for part in ("weight", "bias")]


def shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def random(module, prefix=""):
    draw = torch.Generator().manual_seed(1)
    return {prefix + name: torch.randn(p.shape, generator=draw) for name, p in module.named_parameters()}


def official(heads=None, final_norm=True, image_px=48):
    """The state dict of a small model, with numbers in the rows that are never read."""
    config = ModelConfig(**(vars(BODY) | {"final_norm": final_norm, "image_px": image_px}))
    module = model_with(config, {name: torch.Size(shape) for name, shape in (heads or {}).items()})
    ours = random(module) if module else random(Multiway(config), "model.")
    rows = {f"beit3.encoder.embed_positions.{x}.weight": torch.randn(2, 8) for x in "AB"}
    return mapping.write(FORM.table(config, shapes(ours)), ours, rows)


@pytest.fixture
def file(tmp_path):
    """Saves a state dict as unilm does."""

    def save(state):
        torch.save({"model": state}, tmp_path / "beit3.pth")
        return tmp_path / "beit3.pth"

    return save


def said(path, **settings):
    """What a file is refused with."""
    with pytest.raises(DataError, match=r"beit3\.pth: looks like unilm BEiT-3, but ") as caught:
        beitctl.load_model(path, **{"heads": 2} | settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("heads", "final_norm", "kind"),
    [
        (None, True, Multiway),
        (None, False, Multiway),
        (CLASSES, False, ClassificationModel),
        (ANSWERS, False, AnswerModel),
        (REASONING, True, ReasoningModel),
        (CAPTIONS, True, CaptioningModel),
        (CONTRAST, True, RetrievalModel),
        (CONTRAST_AND_WORDS, True, MatchingModel),
        (PRETRAINING, True, MaskedModel),
        ({"image_codes.weight": (9, 8)}, True, MaskedModel),
    ],
)
def test_the_heads_of_a_file_decide_what_is_loaded(file, heads, final_norm, kind):
    model = beitctl.load_model(file(official(heads, final_norm)), heads=2)
    assert type(model) is kind
    body = model if kind is Multiway else model.model
    assert body.config == ModelConfig(**(vars(BODY) | {"final_norm": final_norm}))


@pytest.mark.parametrize("heads", [None, CAPTIONS, CONTRAST, CONTRAST_AND_WORDS, PRETRAINING])
def test_what_was_read_is_written_back_bit_for_bit(file, heads):
    state = official(heads)
    stored = read_model(file(state), {"heads": 2})
    written = mapping.write(FORM.table(stored.model, shapes(stored.tensors)), stored.tensors, stored.unread)
    assert shapes(written) == shapes(state)
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_rows_that_are_never_read_are_zeros_without_a_file_to_take_them_from():
    ours = random(Multiway(BODY), "model.")
    written = mapping.write(FORM.table(BODY, shapes(ours)), ours, {})
    table = written["beit3.encoder.embed_positions.B.weight"]
    assert table.shape == (8, 8)
    assert not table[:2].any()
    assert torch.equal(table[2:], ours["model.text_embed.position.weight"])


def test_a_pretraining_file_gives_codes_of_patches_and_words(file):
    model = beitctl.load_model(file(official(PRETRAINING)), heads=2)
    found = model(torch.zeros(1, 3, 48, 48), torch.tensor([[0, 5, 2]]))
    assert {name: tuple(logits.shape) for name, logits in found.items()} == {
        "image": (1, 9, 9),
        "text": (1, 3, 20),
    }


def test_a_classifier_does_not_read_the_final_norm_that_its_file_may_hold(file):
    state, images = official(CLASSES, final_norm=False), torch.randn(2, 3, 48, 48)
    without = beitctl.load_model(file(state), heads=2)(images)
    state |= {name: torch.randn(8) for name in NORMS}
    assert torch.equal(beitctl.load_model(file(state), heads=2)(images), without)
    assert set(NORMS) <= set(read_model(file(state), {"heads": 2}).unread)


@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_missing_branch_of_a_layer_is_listed_name_by_name(file, layer, letter):
    state = official(CAPTIONS)
    gone = [name for name in state if f".layers.{layer}." in name and f".{letter}." in name]
    message = said(file({name: value for name, value in state.items() if name not in gone}))
    assert len(gone) == 20
    assert all(f"missing {name}" in message for name in gone)


def test_a_tensor_that_has_no_place_is_left_over(file):
    message = said(file(official() | {"beit3.encoder.layers.0.ffn.C.fc1.weight": torch.zeros(12, 8)}))
    assert message.endswith("but left over beit3.encoder.layers.0.ffn.C.fc1.weight")


def test_a_tensor_of_another_shape_is_named_with_both(file):
    message = said(file(official() | {"beit3.encoder.layers.1.ffn.B.fc2.weight": torch.zeros(8, 13)}))
    assert message.endswith("but beit3.encoder.layers.1.ffn.B.fc2.weight is (8, 13), expected (8, 12)")


def test_a_caption_head_for_another_vocabulary_is_refused(file):
    state = official(CAPTIONS) | {"mlm_head.weight": torch.zeros(19, 8), "mlm_head.bias": torch.zeros(19)}
    message = said(file(state))
    assert "mlm_head.weight is (19, 8), expected (20, 8)" in message
    assert "mlm_head.bias is (19,), expected (20,)" in message


@pytest.mark.parametrize(
    ("heads", "part"),
    [
        (CLASSES, "fc_norm.weight"),
        (CLASSES, "head.weight"),
        (CLASSES, "head.bias"),
        (ANSWERS, "pooler.dense.bias"),
        (ANSWERS, "head.3.weight"),
        (REASONING, "head.norm1.weight"),
        (CONTRAST, "logit_scale"),
        (CONTRAST, "vision_head.weight"),
        (CAPTIONS, "mlm_head.weight"),
        (PRETRAINING, "mim_head.bias"),
    ],
)
def test_half_a_head_is_refused(file, heads, part):
    state = official(heads, final_norm=heads not in (CLASSES, ANSWERS))
    del state[part]
    assert f"missing {part}" in said(file(state))


@pytest.mark.parametrize("heads", [CAPTIONS, CONTRAST, PRETRAINING])
def test_heads_that_read_the_final_norm_need_it(file, heads):
    message = said(file({name: value for name, value in official(heads).items() if name not in NORMS}))
    assert all(f"missing {name}" in message for name in NORMS)


@pytest.mark.parametrize(
    "name",
    [
        "beit3.text_embed.weight",
        "beit3.vision_embed.proj.weight",
        "beit3.encoder.embed_positions.A.weight",
        "beit3.encoder.embed_positions.B.weight",
    ],
)
def test_a_file_without_a_tensor_that_says_a_size_is_refused(file, name):
    state = official()
    del state[name]
    assert f"there is no {name}" in said(file(state))


def test_a_file_without_layers_is_refused(file):
    state = {name: value for name, value in official().items() if ".layers." not in name}
    assert "there is no beit3.encoder.layers.0.ffn.A.fc1.weight" in said(file(state))


def test_the_number_of_heads_must_be_given(file):
    with pytest.raises(
        UserError,
        match=r"beit3\.pth: a unilm BEiT-3 file does not say the number of attention heads: give heads=, "
        r"for its width 8 usually heads=1 \(64 channels each\)",
    ):
        beitctl.load_model(file(official()))


def test_heads_that_do_not_divide_the_width_are_refused(file):
    with pytest.raises(UserError, match=r"width \(8\) must be a multiple of heads \(3\)"):
        beitctl.load_model(file(official()), heads=3)


def test_positions_of_no_square_need_the_size_of_the_pictures(file):
    message = said(file(official(image_px=(32, 48))))
    assert (
        "its vision positions are for 6 patches, which make no square: give image_px=(height, width)"
        in message
    )


def test_the_settings_say_which_pictures_positions_of_no_square_are_for(file):
    state = official(image_px=(32, 48))
    model = beitctl.load_model(file(state), heads=2, image_px=(32, 48))
    assert torch.equal(model.vision_embed.position, state["beit3.encoder.embed_positions.A.weight"][2:])
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 7, 8)


def resampled(state, grid):
    """Official positions of 3 x 3 patches for another grid: class token, then patches row by row."""
    table = state["beit3.encoder.embed_positions.A.weight"][2:]
    picture = table[1:].T.reshape(1, 8, 3, 3)
    picture = F.interpolate(picture, grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:1], picture.reshape(8, -1).T])


@pytest.mark.parametrize(("image_px", "grid"), [(96, (6, 6)), ((48, 96), (3, 6)), (32, (2, 2))])
def test_positions_are_resampled_for_another_resolution(file, image_px, grid):
    state = official(CLASSES, final_norm=False)
    model = beitctl.load_model(file(state), heads=2, image_px=image_px)
    assert torch.allclose(model.model.vision_embed.position, resampled(state, grid), atol=1e-6)
    assert model.model.config.grid == grid
    assert model(torch.zeros(1, 3, grid[0] * 16, grid[1] * 16)).shape == (1, 5)


def test_the_same_resolution_keeps_the_positions_bit_for_bit(file):
    state = official()
    model = beitctl.load_model(file(state), heads=2, image_px=48)
    assert torch.equal(model.vision_embed.position, state["beit3.encoder.embed_positions.A.weight"][2:])


def test_another_resolution_leaves_the_text_positions_alone(file):
    state = official()
    model = beitctl.load_model(file(state), heads=2, image_px=96)
    assert torch.equal(model.text_embed.position.weight, state["beit3.encoder.embed_positions.B.weight"][2:])


def test_a_resolution_that_patches_do_not_divide_is_refused(file):
    with pytest.raises(UserError, match=r"image_px \(50\) must be a multiple of patch_px \(16\)"):
        beitctl.load_model(file(official()), heads=2, image_px=50)


def test_names_of_other_models_are_not_taken_for_beit3():
    assert not FORM.matches(nn.Linear(2, 2).state_dict())
    assert not FORM.matches({"blocks.0.attn.qkv.weight": torch.zeros(1)})


def test_a_size_of_as_many_patches_is_a_change_of_size_and_not_the_files_own():
    file = Path(__file__).parents[3] / "shared" / "reference" / "beit3" / "beit3_retrieval.pth"
    if not file.is_file():
        pytest.skip("the reference outputs are not beside this checkout")
    square, wide = beitctl.load_model(file, heads=4), beitctl.load_model(file, heads=4, image_px=(16, 144))
    assert wide.model.vision_embed.position.shape == square.model.vision_embed.position.shape
    assert not torch.equal(wide.model.vision_embed.position, square.model.vision_embed.position)
