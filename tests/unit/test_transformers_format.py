"""Files of transformers' BEiT by their names alone: what is read, what is refused, what is written."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from beitctl.checkpoints import mapping
from beitctl.checkpoints.loading import load_model, read_model
from beitctl.checkpoints.transformers import TransformersBeit
from beitctl.config import ModelConfig
from beitctl.errors import DataError, UserError
from beitctl.model.relative import picture_index

FORM = TransformersBeit()
D, F, HEADS, PATCH, CODES = 8, 12, 2, 4, 5
LAYER = "beit.encoder.layer."
TABLE = "attention.attention.relative_position_bias.relative_position_bias_table"
PROJECTION = "beit.embeddings.patch_embeddings.projection.weight"
POSITIONS = "beit.embeddings.position_embeddings"
NOTE = {
    "model_type": "beit", "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": F, "image_size": 12, "patch_size": PATCH, "layer_norm_eps": 1e-6,
}  # fmt: skip


def random(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def layer_shapes(index):
    """One block by the names of the Hub."""
    shapes = {
        "lambda_1": (D,),
        "lambda_2": (D,),
        "attention.attention.key.weight": (D, D),
        TABLE: (28, HEADS),
    }
    for name in ("layernorm_before", "layernorm_after"):
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    for name, (out, into) in {
        "attention.attention.query": (D, D), "attention.attention.value": (D, D),
        "attention.output.dense": (D, D), "intermediate.dense": (F, D), "output.dense": (D, F),
    }.items():  # fmt: skip
        shapes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    return {f"{LAYER}{index}.{name}": shape for name, shape in shapes.items()}


def classifier(layers=2):
    """BeitForImageClassification of 3 x 3 patches by the names of the Hub."""
    shapes = {
        "beit.embeddings.cls_token": (1, 1, D), PROJECTION: (D, 3, PATCH, PATCH),
        "beit.embeddings.patch_embeddings.projection.bias": (D,),
        "beit.pooler.layernorm.weight": (D,), "beit.pooler.layernorm.bias": (D,),
        "classifier.weight": (CODES, D), "classifier.bias": (CODES,),
    }  # fmt: skip
    for index in range(layers):
        shapes |= layer_shapes(index)
    return random(shapes)


def masked():
    """BeitForMaskedImageModeling with one table for all blocks."""
    state = {
        name: value
        for name, value in classifier().items()
        if "pooler" not in name and "classifier" not in name and not name.endswith(TABLE)
    }
    return state | random(
        {
            "beit.embeddings.mask_token": (1, 1, D), "layernorm.weight": (D,), "layernorm.bias": (D,),
            "beit.encoder.relative_position_bias.relative_position_bias_table": (28, HEADS),
            "lm_head.weight": (CODES, D), "lm_head.bias": (CODES,),
        }
    )  # fmt: skip


def body():
    """BeitModel: no ``beit.`` before its names, and the norm of the mean patch."""
    return {k.removeprefix("beit."): v for k, v in classifier().items() if "classifier" not in k}


def absolute():
    """A classifier with learned positions."""
    state = {name: value for name, value in classifier().items() if not name.endswith(TABLE)}
    return state | random({POSITIONS: (1, 10, D)})


def index(grid=(3, 3)):
    """The buffer that older versions saved."""
    return torch.from_numpy(np.array(picture_index(grid)))


def with_indices(state):
    """The file as older versions wrote it."""
    tables = [name for name in state if name.endswith("_table")]
    return state | {name.replace("_bias_table", "_index"): index() for name in tables}


@pytest.fixture
def write(tmp_path):
    def folder(state, note=NOTE):
        save_file(state, tmp_path / "model.safetensors")
        if note is not None:
            (tmp_path / "config.json").write_text(json.dumps(note))
        return tmp_path

    return folder


def refused(path, *parts, error=DataError, **settings):
    """Loading fails and says all of ``parts``."""
    with pytest.raises(error) as caught:
        load_model(path, **settings)
    for part in parts:
        assert part in str(caught.value)


def roundtrip(state):
    config = FORM.config(state, NOTE, {})
    table = FORM.table(config, {name: value.shape for name, value in state.items()})
    return mapping.write(table, *mapping.read(table, state))


def written_anew(state):
    """Names that follow from our tensors alone."""
    config = FORM.config(state, NOTE, {})
    tensors, unread = mapping.read(FORM.table(config, {k: v.shape for k, v in state.items()}), state)
    table = FORM.table(config, {name: value.shape for name, value in tensors.items()})
    return mapping.write(table, tensors, unread)


def equal_bits(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("make", [classifier, masked, body, absolute])
def test_the_names_of_the_hub_are_read_and_go_back(make):
    assert equal_bits(roundtrip(make()), make())


@pytest.mark.parametrize("make", [classifier, masked, body])
def test_the_names_of_older_versions_are_read_and_go_back(make):
    assert equal_bits(roundtrip(with_indices(make())), with_indices(make()))


@pytest.mark.parametrize("make", [classifier, masked, body, absolute])
def test_our_tensors_are_written_without_index_buffers(make):
    assert equal_bits(written_anew(with_indices(make())), make())


def test_an_index_buffer_changes_nothing(write, tmp_path):
    plain = read_model(write(classifier()))
    torch.save(with_indices(classifier()), tmp_path / "pytorch_model.bin")
    older = read_model(tmp_path / "pytorch_model.bin")
    assert older.model == plain.model
    assert equal_bits(older.tensors, plain.tensors)


def test_settings_come_from_shapes_and_config(write):
    found = read_model(write(classifier())).model
    assert found == ModelConfig(
        layers=2, width=D, heads=HEADS, ffn=F, image_px=12, patch_px=PATCH, position="relative-per-block",
        norm="pre", key_bias=False, norm_eps=1e-6, final_norm=False, layer_scale=0.1, mask_token=False,
        init="beit",
    )  # fmt: skip


def test_a_masked_model_ends_in_a_norm_and_can_hide_patches(write):
    found = read_model(write(masked())).model
    assert (found.final_norm, found.mask_token, found.position) == (True, True, "relative-shared")


def test_without_scales_there_is_no_layer_scale(write):
    state = {name: value for name, value in classifier().items() if "lambda" not in name}
    assert read_model(write(state)).model.layer_scale == 0


def test_from_24_layers_scales_begin_smaller(write):
    found = read_model(write(classifier(24), {**NOTE, "num_hidden_layers": 24})).model
    assert found.layer_scale == 1e-5


def test_the_norm_of_the_mean_patch_of_a_body_is_kept_unread(write):
    stored = read_model(write(body()))
    assert set(stored.unread) == {"pooler.layernorm.weight", "pooler.layernorm.bias"}


def test_a_body_without_its_pooler_is_read(write):
    state = {name: value for name, value in body().items() if "pooler" not in name}
    assert read_model(write(state)).unread == {}


def test_a_body_under_its_prefix_is_read(write):
    state = {name: value for name, value in classifier().items() if not name.startswith("classifier")}
    assert type(load_model(write(state))).__name__ == "Multiway"


def test_nothing_of_transformers_is_needed(write):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import beitctl\n"
        "sys.stdout.write(type(beitctl.load_model(sys.argv[1])).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, write(classifier())], capture_output=True, text=True, check=True
    )
    assert done.stdout == "ClassificationModel"


def test_epsilon_comes_from_config(write):
    assert read_model(write(classifier(), {**NOTE, "layer_norm_eps": 1e-3})).model.norm_eps == 1e-3


@pytest.mark.parametrize("note", [None, {"architecture": "other", "layer_norm_eps": 1e-6}])
def test_epsilon_is_the_default_of_transformers_without_its_config(note, write):
    assert read_model(write(classifier(), note)).model.norm_eps == 1e-12


def test_heads_come_from_config_without_a_table(write):
    assert read_model(write(absolute(), {**NOTE, "num_attention_heads": 4})).model.heads == 4


def test_heads_can_be_given(write):
    assert load_model(write(absolute(), None), heads=4).model.config.heads == 4


def test_missing_heads_name_the_setting(write):
    parts = ("transformers BEiT", "does not store the number of attention heads", "heads=1 for the width 8")
    refused(write(absolute(), None), *parts, error=UserError)


def test_a_missing_tensor_is_named(write):
    state = classifier()
    del state[f"{LAYER}1.attention.attention.key.weight"]
    refused(write(state), f"missing {LAYER}1.attention.attention.key.weight")


@pytest.mark.parametrize(
    "name",
    [f"{LAYER}0.intermediate.dense.weight", f"{LAYER}1.lambda_2", "beit.pooler.layernorm.bias", PROJECTION],
)  # fmt: skip
def test_no_file_is_read_in_part(name, write):
    state = classifier()
    del state[name]
    with pytest.raises(DataError):
        load_model(write(state))


def test_a_last_block_that_is_missing_is_told_by_config(write):
    refused(write(classifier(1)), "num_hidden_layers 2, the tensors 1")


def test_a_block_missing_in_between_is_named(write):
    state = {k: v for k, v in classifier(3).items() if not k.startswith(f"{LAYER}1.")}
    refused(write(state), f"missing {LAYER}1.lambda_1", f"left over {LAYER}2.attention")


def test_a_head_that_no_model_has_is_left_over(write):
    state = classifier() | random({"question_head.weight": (3, D, 1, 1)})
    refused(write(state), "left over question_head.weight")


def test_both_spellings_in_one_file_are_left_over(write):
    state = classifier() | random({"beit.layers.0.mlp.fc1.weight": (F, D)})
    refused(write(state), "left over beit.layers.0.mlp.fc1.weight")


def test_a_wrong_shape_is_named(write):
    state = classifier() | random({f"{LAYER}1.output.dense.weight": (D, F + 1)})
    refused(write(state), f"{LAYER}1.output.dense.weight is (8, 13), expected (8, 12)")


def test_a_wrong_width_is_named(write):
    state = classifier() | random({"beit.embeddings.cls_token": (1, 1, D + 1)})
    refused(write(state), "beit.embeddings.cls_token is (1, 1, 9), expected (1, 1, 8)")


def test_a_size_with_other_axes_is_named(write):
    refused(write(classifier() | random({PROJECTION: (D, 48)})), f"{PROJECTION} is (8, 48), expected 4 axes")


def test_tables_of_two_grids_are_named(write):
    name = f"{LAYER}1.{TABLE}"
    refused(write(classifier() | random({name: (12, HEADS)})), f"{name} is (12, 2), expected (28, 2)")


def test_an_index_of_another_grid_is_named(write):
    name = f"{LAYER}1.{TABLE}".replace("_bias_table", "_index")
    refused(write(classifier() | {name: index((2, 2))}), f"{name} is not what it always is")


def test_patches_that_are_not_square_are_refused(write):
    refused(write(classifier() | random({PROJECTION: (D, 3, 4, 2)})), "patches are 4 x 2 px")


@pytest.mark.parametrize(
    ("make", "name", "shape"),
    [(classifier, f"{LAYER}0.{TABLE}", (18, HEADS)), (classifier, f"{LAYER}0.{TABLE}", (19, HEADS)),
     (absolute, POSITIONS, (1, 9, D)), (absolute, POSITIONS, (1, 1, D))],
)  # fmt: skip
def test_positions_of_no_square_are_refused(make, name, shape, write):
    rows = shape[0] if len(shape) == 2 else shape[1]
    refused(write(make() | random({name: shape})), f"({rows} rows) are not those of square pictures")


def test_positions_of_two_kinds_are_refused(write):
    state = classifier() | random({POSITIONS: (1, 10, D)})
    refused(write(state), f"it holds {POSITIONS} and {LAYER}0.{TABLE}", "use_shared_relative_position_bias")


def test_no_positions_are_refused(write):
    state = {name: value for name, value in classifier().items() if not name.endswith(TABLE)}
    refused(write(state), "it holds no positions", "use_absolute_position_embeddings")


def test_two_norms_at_the_end_are_refused(write):
    state = masked() | random({"beit.layernorm.weight": (D,), "beit.layernorm.bias": (D,)})
    refused(write(state), "ends in two LayerNorms (use_mean_pooling = false")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", 16, "hidden_size 16, the tensors 8"),
        ("num_attention_heads", 4, "num_attention_heads 4, the tensors 2"),
        ("intermediate_size", 8, "intermediate_size 8, the tensors 12"),
        ("patch_size", [2, 2], "patch_size [2, 2], the tensors 4"),
        ("num_channels", 1, "num_channels 1, the tensors 3"),
        ("image_size", 16, "image_size 16, the tensors 12"),
        ("image_size", [12, 16], "image_size [12, 16], the tensors 12"),
        ("image_size", "12", "image_size '12', the tensors 12"),
        ("use_mean_pooling", False, "use_mean_pooling False, the tensors True"),
        ("hidden_act", "relu", "hidden_act 'relu'; BEiT has 'gelu'"),
        ("model_type", "data2vec-vision", "model_type 'data2vec-vision'; BEiT has 'beit'"),
        (
            "layer_norm_eps",
            "tiny",
            "layer_norm_eps is 'tiny' in config.json or the settings, expected a number",
        ),
    ],
)
def test_a_config_of_another_model_is_refused(key, value, said, write):
    refused(write(classifier(), {**NOTE, key: value}), "config.json", said)


def test_heads_that_are_no_number_are_refused(write):
    note = {**NOTE, "num_attention_heads": None}
    refused(write(absolute(), note), "num_attention_heads is None", "expected a number")


@pytest.mark.parametrize("value", [12, [12, 12], 15])
def test_ways_to_say_the_same_size_are_read(value, write):
    assert read_model(write(classifier(), {**NOTE, "image_size": value})).model.size == (12, 12)


def test_keys_with_a_bias_are_not_beit(write):
    state = classifier() | random({f"{LAYER}0.attention.attention.key.bias": (D,)})
    refused(write(state), "not a model of this family")


def test_grids_that_are_not_square_are_not_written():
    config = ModelConfig(layers=1, width=D, heads=HEADS, ffn=F, image_px=(12, 16), patch_px=PATCH)
    with pytest.raises(ValueError, match=r"transformers reads no BEiT for pictures of 12 x 16 px"):
        FORM.table(config, {})
