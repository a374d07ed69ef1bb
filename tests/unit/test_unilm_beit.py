"""Files of unilm's BEiT that do not fit are refused as a whole; sizes come from shapes."""

import pytest
import torch

from beitctl.checkpoints import mapping
from beitctl.checkpoints.loading import load_model, read_model
from beitctl.checkpoints.unilm_beit import UnilmBeit
from beitctl.errors import DataError, UserError
from beitctl.model.multiway import Multiway
from beitctl.model.relative import picture_index, picture_rows

D, F, HEADS, PATCH = 8, 16, 2, 4


def official(grid=(3, 3), layers=2, position="relative-per-block", head=("fc_norm", 5), scaled=True):
    """Random numbers under the official names; ``head``: the norm that is there and the number of classes."""
    shapes = {
        "cls_token": (1, 1, D),
        "patch_embed.proj.weight": (D, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (D,),
    }
    index = torch.from_numpy(picture_index(grid))
    rows, indices = picture_rows(grid), {}
    if position == "absolute":
        shapes["pos_embed"] = (1, grid[0] * grid[1] + 1, D)
    if position == "relative-shared":
        shapes["rel_pos_bias.relative_position_bias_table"] = (rows, HEADS)
        indices["rel_pos_bias.relative_position_index"] = index
    for block in (f"blocks.{number}" for number in range(layers)):
        shapes |= {
            f"{block}.norm1.weight": (D,), f"{block}.norm1.bias": (D,),
            f"{block}.attn.q_bias": (D,), f"{block}.attn.v_bias": (D,),
            f"{block}.attn.qkv.weight": (3 * D, D),
            f"{block}.attn.proj.weight": (D, D), f"{block}.attn.proj.bias": (D,),
            f"{block}.norm2.weight": (D,), f"{block}.norm2.bias": (D,),
            f"{block}.mlp.fc1.weight": (F, D), f"{block}.mlp.fc1.bias": (F,),
            f"{block}.mlp.fc2.weight": (D, F), f"{block}.mlp.fc2.bias": (D,),
        }  # fmt: skip
        if scaled:
            shapes |= {f"{block}.gamma_1": (D,), f"{block}.gamma_2": (D,)}
        if position == "relative-per-block":
            shapes[f"{block}.attn.relative_position_bias_table"] = (rows, HEADS)
            indices[f"{block}.attn.relative_position_index"] = index.clone()
    norm, classes = head
    if norm:
        shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
    if classes:
        shapes |= {"head.weight": (classes, D), "head.bias": (classes,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | indices


@pytest.fixture
def saved(tmp_path):
    def save(state):
        torch.save({"model": state}, tmp_path / "beit.pth")
        return tmp_path / "beit.pth"

    return save


def refused(path, **settings):
    with pytest.raises(DataError, match="looks like unilm BEiT, but") as caught:
        load_model(path, **settings)
    return str(caught.value)


def without(state, beginning):
    return {name: value for name, value in state.items() if not name.startswith(beginning)}


def test_a_missing_block_is_an_error_that_lists_its_tensors(saved):
    message = refused(saved(without(official(layers=3), "blocks.1.")))
    assert "missing blocks.1.norm1.weight" in message
    assert "blocks.0." not in message


def test_a_single_missing_tensor_is_an_error(saved):
    message = refused(saved(without(official(), "blocks.1.attn.v_bias")))
    assert "missing blocks.1.attn.v_bias" in message


def test_one_gamma_that_is_missing_is_an_error(saved):
    message = refused(saved(without(official(), "blocks.0.gamma_1")))
    assert "missing blocks.0.gamma_1" in message


def test_a_left_over_name_is_an_error_that_lists_it(saved):
    message = refused(saved(official() | {"blocks.0.attn.qkv.bias": torch.zeros(3 * D)}))
    assert "left over blocks.0.attn.qkv.bias" in message


def test_an_unshared_head_of_the_bottleneck_is_left_over(saved):
    state = official(position="relative-shared", head=("norm", 0))
    state |= {
        "lm_head.weight": torch.zeros(6, D),
        "lm_head.bias": torch.zeros(6),
        "mask_token": torch.zeros(1, 1, D),
    }
    message = refused(saved(state | {"cls_pt_lm_head.weight": torch.zeros(6, D)}))
    assert "left over cls_pt_lm_head.weight" in message


def test_a_wrong_shape_is_an_error_that_says_both(saved):
    message = refused(saved(official() | {"blocks.1.mlp.fc2.weight": torch.zeros(D, F + 1)}))
    assert f"blocks.1.mlp.fc2.weight is ({D}, {F + 1}), expected ({D}, {F})" in message


def test_a_wrong_width_of_one_tensor_is_an_error(saved):
    message = refused(saved(official() | {"cls_token": torch.zeros(1, 1, D + 1)}))
    assert f"cls_token is (1, 1, {D + 1}), expected (1, 1, {D})" in message


def test_a_wrong_width_of_the_patch_projection_is_an_error(saved):
    message = refused(saved(official() | {"patch_embed.proj.weight": torch.zeros(D + 2, 3, PATCH, PATCH)}))
    assert f"cls_token is (1, 1, {D}), expected (1, 1, {D + 2})" in message


def test_a_head_without_its_norm_is_an_error(saved):
    assert "missing fc_norm.weight" in refused(saved(without(official(), "fc_norm.")))


def test_patches_that_are_not_square_are_an_error(saved):
    message = refused(saved(official() | {"patch_embed.proj.weight": torch.zeros(D, 3, PATCH, PATCH + 1)}))
    assert "its patches are 4 x 5 pixels; only square ones are read" in message


def test_a_patch_projection_that_is_no_convolution_is_an_error(saved):
    message = refused(saved(official() | {"patch_embed.proj.weight": torch.zeros(D, 48)}))
    assert "patch_embed.proj.weight is (8, 48), expected 4 axes" in message


def test_no_expert_at_all_is_an_error(saved):
    state = {name: value for name, value in official().items() if ".mlp." not in name}
    assert "there is no blocks.0.mlp.fc1.weight, which says a size of the model" in refused(saved(state))


def test_no_positions_at_all_are_an_error(saved):
    state = without(official(position="absolute"), "pos_embed") | {"mask_token": torch.zeros(1, 1, D)}
    assert "it holds no positions: neither pos_embed nor a relative_position_bias_table" in refused(
        saved(state)
    )


def test_an_index_of_another_grid_is_an_error(saved):
    state = official()
    state["blocks.1.attn.relative_position_index"] = torch.from_numpy(picture_index((2, 2)))
    message = refused(saved(state))
    assert "blocks.1.attn.relative_position_index is not what it always is for this model" in message


def test_heads_that_a_file_does_not_say_are_asked_for(saved):
    path = saved(official(position="absolute", head=("norm", 0)) | {"mask_token": torch.zeros(1, 1, D)})
    with pytest.raises(
        UserError, match=r"beit\.pth: the file does not say how many attention heads .*heads=\.\.\."
    ):
        load_model(path)
    assert load_model(path, heads=4).config.heads == 4


def test_the_usual_number_of_heads_is_in_the_error():
    state = {"patch_embed.proj.weight": torch.zeros(192, 3, 4, 4), "pos_embed": torch.zeros(1, 10, 192)}
    with pytest.raises(UserError, match="3 is usual for a width of 192"):
        UnilmBeit().config(state, {}, {})


def test_other_heads_than_the_table_has_are_an_error(saved):
    with pytest.raises(UserError, match="heads: 2 to 4"):
        load_model(saved(official()), heads=4)


def test_positions_of_no_square_ask_for_the_size(saved):
    message = refused(saved(official(grid=(2, 3))))
    assert "positions are not those of a square grid of patches: give image_px=(height, width)" in message


@pytest.mark.parametrize("position", ["absolute", "relative-shared", "relative-per-block"])
def test_the_size_that_is_given_says_a_grid_that_is_not_square(saved, position):
    path = saved(official(grid=(2, 3), position=position) | {"mask_token": torch.zeros(1, 1, D)})
    model = load_model(path, image_px=(8, 12), heads=HEADS)
    assert model.model.config.grid == (2, 3)
    assert model(torch.zeros(1, 3, 8, 12)).shape == (1, 5)


def test_a_given_size_that_does_not_fit_the_positions_is_an_error(saved):
    assert "not those of a square grid" in refused(saved(official(grid=(2, 3))), image_px=(8, 16))


def test_a_class_token_classifier_ends_in_the_final_norm(saved):
    model = load_model(saved(official(head=("norm", 5))))
    assert model.model.config.final_norm
    assert model.heads["classifier"].norm is None


def test_a_file_without_heads_is_a_bare_model(saved):
    model = load_model(saved(official(head=("norm", 0))))
    assert isinstance(model, Multiway)
    assert model.config.final_norm


def test_a_norm_of_the_mean_patch_without_classifier_is_kept_for_the_way_back(saved):
    state = official(head=("fc_norm", 0))
    stored = read_model(saved(state))
    assert set(stored.unread) == {"fc_norm.weight", "fc_norm.bias"}
    assert not stored.model.final_norm
    table = UnilmBeit().table(stored.model, {name: value.shape for name, value in stored.tensors.items()})
    written = mapping.write(table, stored.tensors, stored.unread)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_half_of_an_unread_norm_is_an_error(saved):
    assert "missing fc_norm.bias" in refused(saved(without(official(head=("fc_norm", 0)), "fc_norm.bias")))


def test_without_gammas_there_is_no_layer_scale(saved):
    assert load_model(saved(official(scaled=False))).model.config.layer_scale == 0


@pytest.mark.parametrize(("layers", "scale"), [(23, 0.1), (24, 1e-5)])
def test_deep_models_began_with_a_small_layer_scale(layers, scale):
    state = official(layers=layers)
    assert UnilmBeit().config(state, {}, {}).layer_scale == scale


def test_the_way_back_keeps_the_block_behind_which_the_bottleneck_begins():
    state = official(layers=2, position="relative-shared", head=("norm", 0)) | {
        "mask_token": torch.zeros(1, 1, D)
    }
    extra = {
        name.replace("blocks.0", "cls_pt_layers.0"): value
        for name, value in state.items()
        if "blocks.0" in name
    }
    state |= extra | {"lm_head.weight": torch.zeros(6, D), "lm_head.bias": torch.zeros(6)}
    form = UnilmBeit()
    config = form.config(state, {}, {})
    tensors, _ = mapping.read(form.table(config, {name: value.shape for name, value in state.items()}), state)
    later = {
        name.replace("aggregation.blocks.1", "aggregation.blocks.2"): value for name, value in tensors.items()
    }
    written = mapping.write(
        form.table(config, {name: value.shape for name, value in later.items()}), later, {}
    )
    assert "heads.aggregation.blocks.2.ffn.vision.fc1.weight" in later
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())
