"""Names, shapes and parameter counts of the ten full-size models of BEiT-1 and BEiT v2, without weights.

Reference: microsoft/unilm 768a3c8, in shared/reference/official_keys; counts: shared/design/model-spec.md
1.1, 1.2 and 6.1.
"""

import ast
from pathlib import Path

import pytest
import torch

from beitctl.checkpoints import mapping
from beitctl.checkpoints.models import model_with
from beitctl.checkpoints.unilm_beit import INDEX, UnilmBeit

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "official_keys"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the official names are not beside this checkout")
MODELS = {  # name: entries of the file, parameters
    "beit1_pretrain_base": (190, 91_965_776),
    "beit1_pretrain_large": (370, 311_534_016),
    "beit1_pretrain_base_pt1k_800ep_style": (165, 92_089_856),
    "beit1_ft_base_224": (211, 86_530_984),
    "beit1_ft_base_384": (211, 86_744_104),
    "beit1_ft_large_224": (415, 304_430_568),
    "beit1_ft_large_384": (415, 304_998_888),
    "beit1_ft_large_512": (415, 305_674_728),
    "beit2_pretrain_base_cls_pt": (220, 106_143_056),
    "beit2_pretrain_large_cls_pt": (400, 336_728_512),
}


def official(name):
    """The state dict of an official model on the meta device."""
    lines = [line.split("\t") for line in (FOLDER / f"{name}.tsv").read_text().splitlines()]
    state = {}
    for key, shape in lines:
        dtype = torch.int64 if key.endswith(INDEX) else torch.float32
        state[key] = torch.empty(ast.literal_eval(shape), device="meta", dtype=dtype)
    return state


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def state(name):
    return official(name)


@pytest.fixture
def config(state):
    return UnilmBeit().config(state, {}, {"heads": state["cls_token"].shape[-1] // 64})


@pytest.fixture
def table(state, config):
    return UnilmBeit().table(config, {key: value.shape for key, value in state.items()})


def build(config, tensors):
    """Our model with the heads that the tensors belong to, on the meta device."""
    heads = {key.removeprefix("heads."): t.shape for key, t in tensors.items() if key.startswith("heads.")}
    with torch.device("meta"):
        return model_with(config, heads)


def test_all_official_models_are_here():
    assert {file.stem for file in FOLDER.glob("beit[12]_*.tsv")} == set(MODELS)


def test_the_file_has_as_many_entries_as_the_specification_says(name, state):
    assert len(state) == MODELS[name][0]


def test_it_is_recognised(state):
    assert UnilmBeit().matches(state)


def test_it_is_read_completely(state, table):
    assert mapping.problems(table, state) == []


def test_names_and_shapes_are_those_of_our_model(state, config, table):
    tensors, unread = mapping.read(table, state)
    assert shapes(tensors) == shapes(build(config, tensors).state_dict())
    assert unread == {}


def test_parameters_are_as_many_as_the_official_ones(name, state, config, table):
    tensors, _ = mapping.read(table, state)
    assert sum(p.numel() for p in build(config, tensors).parameters()) == MODELS[name][1]


def test_names_and_shapes_are_written_back(state, config, table):
    tensors, unread = mapping.read(table, state)
    ours = UnilmBeit().table(config, {key: value.shape for key, value in tensors.items()})
    assert shapes(mapping.write(ours, tensors, unread)) == shapes(state)


def test_settings_are_the_published_ones(name, config):
    large = "large" in name
    assert (config.layers, config.width, config.ffn, config.heads) == (
        (24, 1024, 4096, 16) if large else (12, 768, 3072, 12)
    )
    assert config.layer_scale == (0.0 if "800ep" in name else 1e-5 if large else 0.1)
    assert config.image_px == (int(name[-3:]) if "_ft_" in name else 224)


def test_bottleneck_of_beit_v2_begins_where_it_was_published():
    for size, early in (("base", 9), ("large", 21)):
        state = official(f"beit2_pretrain_{size}_cls_pt")
        config = UnilmBeit().config(state, {}, {})
        table = UnilmBeit().table(config, {key: value.shape for key, value in state.items()})
        tensors, _ = mapping.read(table, state)
        assert build(config, tensors).heads["aggregation"].early_layers == early


def test_the_intermediate_classes_of_imagenet_22k_are_read():
    state = official("beit1_ft_base_224")
    state["head.weight"] = torch.empty(21841, 768, device="meta")
    state["head.bias"] = torch.empty(21841, device="meta")
    config = UnilmBeit().config(state, {}, {})
    table = UnilmBeit().table(config, {key: value.shape for key, value in state.items()})
    assert mapping.problems(table, state) == []
    assert mapping.read(table, state)[0]["heads.classifier.linear.weight"].shape == (21841, 768)
