"""Files of unilm's VLMo: what is recognised, what is refused and why, other resolutions, the heads."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import beitctl
from beitctl.checkpoints import mapping
from beitctl.checkpoints.loading import read_model
from beitctl.checkpoints.mapping import UNREAD
from beitctl.checkpoints.models import (
    AnswerModel,
    MaskedModel,
    MatchingModel,
    PooledModel,
    ReasoningModel,
    RetrievalModel,
    model_with,
)
from beitctl.checkpoints.unilm_vlmo import UnilmVlmo
from beitctl.config import ModelConfig
from beitctl.errors import DataError, UserError
from beitctl.model import relative
from beitctl.model.multiway import Multiway

FORM = UnilmVlmo()
BODY = ModelConfig(
    layers=3, width=8, heads=2, ffn=12, image_px=48, patch_px=16, vocabulary=20, text_tokens=196,
    fusion_layers=1, position="relative-per-block", norm="pre", key_bias=False, norm_eps=1e-6,
    layer_scale=0.1, mask_token=False, text_norm=True, token_types=2, text_first=True, init="beit",
)  # fmt: skip
ABSOLUTE = replace(BODY, position="absolute", layer_scale=0.0, text_tokens=7)
POOLER = {"pooler.linear.weight": (8, 8)}
ITC = {"contrastive.vision.weight": (8, 8)}
WORDS = {"text_tokens.out.weight": (20, 8)}
PRETRAINING = POOLER | ITC | WORDS | {"contrastive_fused.vision.weight": (8, 8), "matching.weight": (2, 8)}
ANSWERS = POOLER | {"answers.up.weight": (16, 8), "answers.out.weight": (5, 16)}
REASONING = POOLER | {"reasoning.up.weight": (16, 16), "reasoning.out.weight": (2, 16)}
USES = [
    (PRETRAINING, MatchingModel),
    (POOLER | WORDS, MaskedModel),
    (ANSWERS, AnswerModel),
    (REASONING, ReasoningModel),
    (POOLER | ITC, RetrievalModel),
    (POOLER, PooledModel),
    ({}, Multiway),
]
TABLE = "relative_position_bias_table"
INDEX = "relative_position_index"


def shapes(tensors, prefix=""):
    return {prefix + name: tensor.shape for name, tensor in tensors.items()}


def random(module, prefix=""):
    draw = torch.Generator().manual_seed(1)
    return {prefix + name: torch.randn(p.shape, generator=draw) for name, p in module.named_parameters()}


def indices(config, texts=7):
    """What released files hold besides, for texts of so many tokens."""
    pairs = relative.pair_index(texts, config)
    order = [*range(config.picture_tokens, len(pairs)), *range(config.picture_tokens)]
    return {
        INDEX: torch.from_numpy(relative.picture_index(config.grid)),
        f"text_{INDEX}": torch.from_numpy(relative.text_index(texts, config)),
        f"text_imag_{INDEX}": torch.from_numpy(pairs[order][:, order]).float(),
    }


def official(config=BODY, heads=None, **unread):
    """The state dict of a small model, with numbers in the rows that are never read."""
    module = model_with(config, {name: torch.Size(shape) for name, shape in (heads or {}).items()})
    ours = random(module) if module else random(Multiway(config), "model.")
    kept = {"text_embeddings.token_type_embeddings.weight": torch.randn(8)} | unread
    if config.position != "absolute":
        kept["text_embeddings.position_embeddings.weight"] = torch.randn(7, 8)
    return mapping.write(FORM.table(config, shapes(ours)), ours, kept)


def released(config=BODY, heads=None):
    """As ``official``, with the buffers of released files."""
    kept = {"text_embeddings.position_ids": torch.arange(7)[None]}
    return official(config, heads, **kept, **(indices(config) if config.position != "absolute" else {}))


@pytest.fixture
def file(tmp_path):
    """Saves a state dict as the official code does."""

    def save(state):
        torch.save({"state_dict": state}, tmp_path / "vlmo.pt")
        return tmp_path / "vlmo.pt"

    return save


def said(path, **settings):
    """What a file is refused with."""
    with pytest.raises(DataError, match=r"vlmo\.pt: looks like unilm VLMo, but ") as caught:
        beitctl.load_model(path, **settings)
    return str(caught.value).partition("but ")[2]


@pytest.mark.parametrize(("heads", "kind"), USES)
def test_the_heads_of_a_file_decide_what_is_loaded(file, heads, kind):
    model = beitctl.load_model(file(official(heads=heads)))
    assert type(model) is kind
    assert (model if kind is Multiway else model.model).config == BODY


@pytest.mark.parametrize("config", [BODY, replace(BODY, fusion_layers=0, token_types=3)])
@pytest.mark.parametrize("heads", [heads for heads, _ in USES])
def test_what_was_read_is_written_back_bit_for_bit(file, config, heads):
    state = released(config, heads)
    stored = read_model(file(state))
    assert stored.model == config
    written = mapping.write(FORM.table(config, shapes(stored.tensors)), stored.tensors, stored.unread)
    assert shapes(written) == shapes(state)
    assert all(torch.equal(written[name], value) for name, value in state.items())
    assert all(written[name].dtype == value.dtype for name, value in state.items())


def test_a_file_with_absolute_positions_is_written_back_bit_for_bit(file):
    state = released(ABSOLUTE, ANSWERS)
    stored = read_model(file(state), {"heads": 2})
    assert stored.model == ABSOLUTE
    assert "transformer.pos_embed" in state
    written = mapping.write(FORM.table(ABSOLUTE, shapes(stored.tensors)), stored.tensors, stored.unread)
    assert shapes(written) == shapes(state)
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_the_table_of_a_block_is_its_columns_of_the_joint_table(file):
    state = official()
    tensors = read_model(file(state)).tensors
    assert state[TABLE].shape == (25 + 3 + 2 + 2 * 196, 3 * 2)
    for block in range(3):
        found = tensors[f"model.blocks.{block}.relative.table"]
        assert torch.equal(found, state[TABLE][:, 2 * block : 2 * block + 2])


def test_only_the_first_of_berts_types_is_read(file):
    state, name = official(), "text_embeddings.token_type_embeddings.weight"
    stored = read_model(file(state))
    assert torch.equal(stored.tensors["model.text_embed.type_row"], state[name][0])
    assert torch.equal(stored.unread[name], state[name][1])


@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_berts_types_is_kept_as_well(file, rows):
    name = "text_embeddings.token_type_embeddings.weight"
    state = official() | {name: torch.randn(rows, 8)}
    stored = read_model(file(state))
    kept = shapes(stored.tensors) | shapes(stored.unread, UNREAD)
    written = mapping.write(FORM.table(BODY, kept), stored.tensors, stored.unread)
    if rows > 1:
        assert torch.equal(written[name], state[name])
    assert torch.equal(written[name][0], state[name][0])


def test_rows_that_are_never_read_are_zeros_without_a_file_to_take_them_from():
    ours = random(Multiway(BODY), "model.")
    written = mapping.write(FORM.table(BODY, shapes(ours)), ours, {})
    assert not written["text_embeddings.token_type_embeddings.weight"][1:].any()
    assert "text_embeddings.position_embeddings.weight" not in written
    assert mapping.problems(FORM.table(BODY, shapes(written)), written) == []


def test_a_mask_token_of_ours_finds_its_way_there_and_back(file):
    config = replace(BODY, mask_token=True)
    state = official(config)
    assert state["transformer.mask_token"].shape == (1, 1, 8)
    assert read_model(file(state)).model == config


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("transformer.blocks.1.mlp_imag.fc2.weight", "missing transformer.blocks.1.mlp_imag.fc2.weight"),
        ("transformer.blocks.2.norm2_vl.bias", "missing transformer.blocks.2.norm2_vl.bias"),
        ("transformer.blocks.0.gamma_2", "missing transformer.blocks.0.gamma_2"),
        ("transformer.norm.weight", "missing transformer.norm.weight"),
        ("pooler.dense.bias", "missing pooler.dense.bias"),
        ("itc_vl_text_proj.fc.weight", "missing itc_vl_text_proj.fc.weight"),
        ("mlm_score.bias", "missing mlm_score.bias"),
        (TABLE, f"there is no {TABLE}, which says a size of the model"),
        ("text_embeddings.word_embeddings.weight", "there is no text_embeddings.word_embeddings.weight"),
    ],
)
def test_a_missing_tensor_is_named(file, gone, message):
    state = official(heads=PRETRAINING)
    del state[gone]
    assert said(file(state)).startswith(message)


def test_a_missing_block_is_named(file):
    state = {name: value for name, value in official().items() if ".blocks.1." not in name}
    found = said(file(state))
    assert "missing transformer.blocks.1.norm1.weight; " in found
    assert found.endswith("and 1 more")


def test_a_head_that_reads_the_pooler_needs_it(file):
    state = {name: value for name, value in official(heads=ANSWERS).items() if not name.startswith("pooler")}
    assert said(file(state)) == "missing pooler.dense.weight; missing pooler.dense.bias"


def test_what_is_left_over_is_named(file):
    state = official() | {"transformer.blocks.0.attn.k_bias": torch.zeros(8)}
    assert said(file(state)) == "left over transformer.blocks.0.attn.k_bias"


def test_a_wrong_shape_is_named(file):
    state = official() | {"token_type_embeddings.weight": torch.zeros(2, 9)}
    assert said(file(state)) == "token_type_embeddings.weight is (2, 9), expected (2, 8)"


def test_a_tensor_with_another_number_of_axes_is_named(file):
    state = official() | {TABLE: torch.zeros(422)}
    assert said(file(state)) == f"{TABLE} is (422,), expected 2 axes"


def test_columns_that_blocks_cannot_share_are_refused(file):
    state = official() | {TABLE: torch.zeros(422, 7)}
    assert said(file(state)) == f"{TABLE} has 7 columns, which 3 blocks cannot share evenly"


@pytest.mark.parametrize("name", indices(BODY))
def test_an_index_in_another_order_is_refused(file, name):
    found = indices(BODY)[name]
    assert said(file(released() | {name: found.flip(0)})) == f"{name} is not what it always is for this model"


def test_the_index_of_another_grid_is_refused(file):
    other = indices(replace(BODY, image_px=32))[INDEX]
    assert said(file(released() | {INDEX: other})) == f"{INDEX} is not what it always is for this model"


def test_an_index_of_pairs_that_is_too_small_is_refused(file):
    name = f"text_imag_{INDEX}"
    assert name in said(file(released() | {name: torch.zeros(4, 4)}))


def test_texts_of_another_length_have_to_be_said(file):
    path = file(official(replace(BODY, text_tokens=30)))
    assert said(path) == (
        f"{TABLE} has 90 rows: with texts of 196 tokens as in all released files, 0 are left for pictures, "
        "where h x w patches need (2h-1)(2w-1) + 3; text_tokens=... must say the longest text that it is "
        "for, or image_px=(height, width) a grid that is not square"
    )
    assert beitctl.load_model(path, text_tokens=30).config == replace(BODY, text_tokens=30)


def test_a_length_of_texts_that_does_not_fit_the_table_is_refused(file):
    with pytest.raises(UserError, match=r"cannot be changed \(text_tokens: 196 to 30\)"):
        beitctl.load_model(file(official()), text_tokens=30)


def test_a_grid_that_is_not_square_has_to_be_said(file):
    config = replace(BODY, image_px=(32, 64))
    path = file(official(config))
    assert "image_px=(height, width) a grid that is not square" in said(path)
    model = beitctl.load_model(path, image_px=(32, 64))
    assert model.config == config
    assert model(torch.zeros(1, 3, 32, 64), torch.tensor([[0, 2]])).shape == (1, 2 + 9, 8)


def test_absolute_positions_of_no_square_have_to_be_said(file):
    config = replace(ABSOLUTE, image_px=(32, 64))
    path = file(official(config))
    assert said(path, heads=2) == (
        "transformer.pos_embed is for 8 patches, which are no square; image_px=(height, width) must say "
        "their grid, with patches of 16 px"
    )
    assert beitctl.load_model(path, heads=2, image_px=(32, 64)).config == config


def test_the_number_of_heads_is_asked_for_where_nothing_says_it(file):
    with pytest.raises(
        UserError,
        match=r"does not say how many attention heads .* positions are absolute\. Give heads=\.\.\. "
        r"\(1 is usual for a width of 8\)",
    ):
        beitctl.load_model(file(official(ABSOLUTE)))


def test_the_heads_of_base_plus_are_named():
    wide = ModelConfig(**(vars(ABSOLUTE) | {"layers": 1, "fusion_layers": 0, "width": 544, "heads": 16}))
    with torch.device("meta"):
        ours = {f"model.{name}": value for name, value in Multiway(wide).state_dict().items()}
    state = mapping.write(FORM.table(wide, shapes(ours)), ours, {})
    with pytest.raises(UserError, match=r"heads=\.\.\. \(16 in VLMo base plus for a width of 544\)"):
        FORM.config(state, {}, {})


def test_more_patches_leave_the_rows_of_texts_alone(file):
    state = official()
    model = beitctl.load_model(file(state), image_px=80)
    assert model.config == replace(BODY, image_px=80)
    found = torch.cat([block.relative.table for block in model.blocks], 1)
    assert len(found) == len(state[TABLE]) + 81 - 25
    assert torch.equal(found[81:], state[TABLE][25:])
    assert model(torch.zeros(1, 3, 80, 80), torch.tensor([[0, 5, 2]])).isfinite().all()


def test_the_stage_of_texts_reads_texts_alone(file):
    model = beitctl.load_model(file(official(replace(BODY, fusion_layers=0), POOLER | WORDS)))
    pad = torch.tensor([[False, False, True]])
    found = model(text=torch.tensor([[0, 2, 1]]), text_pad=pad)
    assert {name: tuple(logits.shape) for name, logits in found.items()} == {"text": (1, 3, 20)}
    assert not found["text"][pad].any()


def pooled(model, picture, text, types):
    """The pooled first token of a pair whose picture has a given type, without the model's own head code."""
    saved = model.model.token_type.weight.data.clone()
    model.model.token_type.weight.data[1] = saved[types]
    row = model.model(picture, text)[:, 0]
    model.model.token_type.weight.data.copy_(saved)
    linear = model.heads["pooler"].linear
    return torch.tanh(row @ linear.weight.T + linear.bias)


def by_hand(head, x):
    x = F.gelu(F.layer_norm(head.up(x), (16,), head.inner_norm.weight, head.inner_norm.bias, 1e-5))
    return x @ head.out.weight.T + head.out.bias


@torch.no_grad()
def test_answers_are_read_from_the_first_token_of_the_text(file):
    model = beitctl.load_model(file(official(heads=ANSWERS)))
    picture, text = torch.randn(2, 3, 48, 48), torch.tensor([[0, 5, 2], [0, 7, 2]])
    expected = by_hand(model.heads["answers"], pooled(model, picture, text, 1))
    assert torch.allclose(model(picture, text), expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("types", [2, 3])
def test_the_second_picture_of_a_reasoning_model_has_a_type_of_its_own(file, types):
    state = official(replace(BODY, token_types=types), REASONING)
    model = beitctl.load_model(file(state), token_types=3)  # as the official code, 2 become 3
    if types == 2:
        state["token_type_embeddings.weight"] = state["token_type_embeddings.weight"][[0, 1, 1]]
    assert torch.equal(model.model.token_type.weight, state["token_type_embeddings.weight"])
    pictures, text = torch.randn(2, 1, 3, 48, 48), torch.tensor([[0, 5, 2]])
    both = [pooled(model, picture, text, which) for which, picture in enumerate(pictures, 1)]
    expected = by_hand(model.heads["reasoning"], torch.cat(both, -1))
    found = model(pictures[0], text, image2=pictures[1])
    assert torch.allclose(found, expected, atol=1e-6)


@torch.no_grad()
def test_a_body_with_a_pooler_gives_one_vector(file):
    model = beitctl.load_model(file(official(heads=POOLER)))
    picture, text = torch.randn(1, 3, 48, 48), torch.tensor([[0, 5, 2]])
    assert torch.allclose(model(picture, text), pooled(model, picture, text, 1), atol=1e-6)
    linear, alone = model.heads["pooler"].linear, model.model(picture)[:, 0]
    assert torch.allclose(model(picture), torch.tanh(linear(alone)), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "image_px", "rows", "columns"), [("base", 224, 1126, 144), ("large", 384, 2606, 384)]
)
def test_settings_of_the_released_sizes_follow_from_their_shapes(size, image_px, rows, columns):
    layers, width, heads, fused = {"base": (12, 768, 12, 2), "large": (24, 1024, 16, 3)}[size]
    config = replace(
        BODY, layers=layers, width=width, heads=heads, ffn=4 * width, image_px=image_px, vocabulary=30522,
        fusion_layers=fused,
    )  # fmt: skip
    with torch.device("meta"):
        ours = {f"model.{name}": value for name, value in Multiway(config).state_dict().items()}
    state = mapping.write(FORM.table(config, shapes(ours)), ours, {})
    assert state[TABLE].shape == (rows, columns)
    assert FORM.config(state, {}, {}) == config
