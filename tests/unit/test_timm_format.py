"""Files of timm are recognised by their names, and refused as a whole when they do not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from beitctl.checkpoints.formats import FORMATS
from beitctl.checkpoints.loading import load_model, read_model
from beitctl.checkpoints.timm import BEIT, BEIT3, VIT
from beitctl.errors import DataError, UserError

D, F, HEADS, PATCH, PATCHES = 8, 16, 2, 4, 9
KINDS = {"beit": BEIT, "beit3": BEIT3, "vit": VIT, "deit": VIT}


def official(kind="vit", layers=2, norm="norm", classes=5):
    """Random numbers under timm's names, for a grid of 3 x 3."""
    shapes = {
        "cls_token": (1, 1, D),
        "patch_embed.proj.weight": (D, 3, PATCH, PATCH), "patch_embed.proj.bias": (D,),
        f"{norm}.weight": (D,), f"{norm}.bias": (D,), "head.weight": (classes, D), "head.bias": (classes,),
    }  # fmt: skip
    if kind == "deit":
        shapes |= {"dist_token": (1, 1, D), "head_dist.weight": (classes, D), "head_dist.bias": (classes,)}
    if kind != "beit":
        shapes["pos_embed"] = (1, PATCHES + (2 if kind == "deit" else 1), D)
    for block in (f"blocks.{number}" for number in range(layers)):
        for name in ("norm1", "norm2"):
            shapes |= {f"{block}.{name}.weight": (D,), f"{block}.{name}.bias": (D,)}
        for name, out, into in (("attn.proj", D, D), ("mlp.fc1", F, D), ("mlp.fc2", D, F)):
            shapes |= {f"{block}.{name}.weight": (out, into), f"{block}.{name}.bias": (out,)}
        shapes[f"{block}.attn.qkv.weight"] = (3 * D, D)
        if kind == "beit":
            shapes |= {f"{block}.attn.q_bias": (D,), f"{block}.attn.v_bias": (D,)}
            shapes[f"{block}.attn.relative_position_bias_table"] = (28, HEADS)
        else:
            shapes[f"{block}.attn.qkv.bias"] = (3 * D,)
        if kind == "beit3":
            shapes |= {f"{block}.attn.norm.weight": (D,), f"{block}.attn.norm.bias": (D,)}
            shapes |= {f"{block}.mlp.norm.weight": (F,), f"{block}.mlp.norm.bias": (F,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path):
    def save(state, **note):
        save_file(state, tmp_path / "model.safetensors")
        if note:
            (tmp_path / "config.json").write_text(json.dumps(note))
        return tmp_path

    return save


def refused(path, **settings):
    with pytest.raises(DataError, match="looks like timm") as caught:
        load_model(path, **settings)
    return str(caught.value)


def without(state, beginning):
    return {name: value for name, value in state.items() if not name.startswith(beginning)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_format_is_recognised_from_the_names(kind):
    state = official(kind)
    assert next(form for form in FORMATS if form.matches(state)) is KINDS[kind]


def test_a_beit_with_indices_is_unilms():
    state = official("beit") | {"blocks.0.attn.relative_position_index": torch.zeros(10, 10)}
    assert next(form.name for form in FORMATS if form.matches(state)) == "unilm BEiT"


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_block_is_an_error_that_lists_its_tensors(saved, kind):
    message = refused(saved(without(official(kind, layers=3), "blocks.1.")), heads=HEADS)
    assert f"looks like {KINDS[kind].name}, but" in message
    assert "missing blocks.1.norm1.weight" in message
    assert "blocks.0." not in message


@pytest.mark.parametrize("kind", KINDS)
def test_a_left_over_name_is_an_error_that_lists_it(saved, kind):
    message = refused(saved(official(kind) | {"reg_token": torch.zeros(1, 4, D)}), heads=HEADS)
    assert message.endswith("left over reg_token")


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_shape_is_an_error_that_says_both(saved, kind):
    message = refused(saved(official(kind) | {"head.bias": torch.zeros(6)}), heads=HEADS)
    assert message.endswith("head.bias is (6,), expected (5,)")


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_width_of_one_tensor_is_an_error(saved, kind):
    message = refused(saved(official(kind) | {"cls_token": torch.zeros(1, 1, D + 1)}), heads=HEADS)
    assert message.endswith(f"cls_token is (1, 1, {D + 1}), expected (1, 1, {D})")


def test_one_of_the_inner_norms_that_is_missing_is_an_error(saved):
    message = refused(saved(without(official("beit3"), "blocks.1.mlp.norm.weight")), heads=HEADS)
    assert message.endswith("but missing blocks.1.mlp.norm.weight")


def test_the_second_head_of_deit_that_is_missing_is_an_error(saved):
    assert "missing head_dist.weight" in refused(saved(without(official("deit"), "head_dist")), heads=HEADS)


def test_positions_without_the_class_token_are_an_error(saved):
    state = official() | {"pos_embed": torch.zeros(1, PATCHES, D)}
    assert "its 9 positions are not those of a square grid" in refused(saved(state), heads=HEADS)


@pytest.mark.parametrize("kind", ["beit3", "vit", "deit"])
def test_heads_that_a_file_does_not_say_are_asked_for(saved, kind):
    with pytest.raises(UserError, match="does not say how many attention heads the model has: give heads="):
        load_model(saved(official(kind)))


def test_the_table_of_relative_positions_says_the_heads(saved):
    assert read_model(saved(official("beit"))).model.heads == HEADS


def test_config_json_says_the_heads(saved):
    assert read_model(saved(official(), model_args={"num_heads": 4})).model.heads == 4


def test_config_json_says_a_size_that_is_not_square(saved):
    state = official() | {"pos_embed": torch.zeros(1, 7, D)}
    path = saved(state, pretrained_cfg={"input_size": [3, 8, 12]})
    assert read_model(path, {"heads": HEADS}).model.image_px == (8, 12)


def test_a_config_json_of_something_else_is_not_heeded(saved):
    path = saved(
        official(), model_args=[1], pretrained_cfg={"input_size": 224, "mean": 0.5}, global_pool=None
    )
    assert read_model(path, {"heads": HEADS}).model.image_px == 12


@pytest.mark.parametrize(("first", "pixels"), [(0.5, "half"), (0.485, "imagenet"), (0.48145466, "clip")])
def test_config_json_says_the_normalisation(saved, first, pixels):
    path = saved(official(), pretrained_cfg={"mean": [first, 0.4, 0.4]})
    assert read_model(path, {"heads": HEADS}).model.pixels == pixels


@pytest.mark.parametrize(
    ("kind", "pixels"), [("beit", "half"), ("beit3", "imagenet"), ("vit", "half"), ("deit", "imagenet")]
)
def test_without_config_json_the_normalisation_is_that_of_the_published_models(saved, kind, pixels):
    assert read_model(saved(official(kind)), {"heads": HEADS}).model.pixels == pixels


def test_an_unknown_normalisation_asks_for_a_known_one(saved):
    path = saved(official("beit"), pretrained_cfg={"mean": [0.1, 0.2, 0.3]})
    assert "with the mean [0.1, 0.2, 0.3], which no model here does: give pixels=, one of half" in refused(
        path
    )
    assert load_model(path, pixels="clip").model.config.pixels == "clip"


@pytest.mark.parametrize(("norm", "pooling"), [("norm", "avg"), ("fc_norm", "token"), ("fc_norm", "max")])
def test_a_classifier_that_pools_otherwise_is_an_error(saved, norm, pooling):
    message = refused(saved(official(norm=norm), global_pool=pooling), heads=HEADS)
    assert (
        f'its config.json says global_pool "{pooling}" and it holds {norm}; what is read: fc_norm with'
        in message
    )


@pytest.mark.parametrize(("norm", "pooling"), [("norm", "token"), ("fc_norm", "avg")])
def test_the_pooling_that_config_json_says_is_read(saved, norm, pooling):
    model = load_model(saved(official(norm=norm), global_pool=pooling), heads=HEADS)
    assert model.model.config.final_norm == (norm == "norm")


@pytest.mark.parametrize(("kind", "eps"), [("beit", 1e-6), ("beit3", 1e-5), ("vit", 1e-6)])
def test_norms_have_the_epsilon_of_the_class(saved, kind, eps):
    assert read_model(saved(official(kind)), {"heads": HEADS}).model.norm_eps == eps


def test_the_vision_branch_of_beit_3_keeps_its_name(saved):
    stored = read_model(saved(official("beit3")), {"heads": HEADS})
    assert "model.blocks.0.attention.vision.qkv.bias" in stored.tensors
    assert not stored.model.mask_token
