"""Files of transformers' three BEiT classes give the outputs that the classes give, and go back bit for bit.

The models are built here, small and with random weights, norms, scales and tables. Tolerance 2e-5 absolute in
fp32: the sums run in another order.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from beitctl.checkpoints import mapping, resize
from beitctl.checkpoints.loading import load_model, read_model
from beitctl.checkpoints.transformers import TransformersBeit

transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
FORM = TransformersBeit()
OFFICIAL = Path(__file__).parents[3] / "shared" / "reference" / "beit12"
official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the reference outputs are not beside this checkout"
)


class Case(NamedTuple):
    """One model: its class and its configuration."""

    kind: str
    config: dict[str, Any]
    body: dict[str, Any] = {}  # noqa: RUF012


def sizes(width, layers, heads, ffn, image, patch, **more):
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": ffn, "image_size": image, "patch_size": patch, "layer_norm_eps": 1e-6, **more,
    }  # fmt: skip


MASKED = "BeitForMaskedImageModeling"
CLASSIFICATION = "BeitForImageClassification"
CASES = {
    "masked, shared table": Case(
        MASKED,
        sizes(
            48, 3, 4, 80, 48, 16, vocab_size=37, use_mask_token=True, use_shared_relative_position_bias=True
        ),
    ),
    "masked, positions, no scale": Case(
        MASKED,
        sizes(
            24, 2, 3, 96, 32, 8, vocab_size=50, use_mask_token=True, use_absolute_position_embeddings=True,
            layer_scale_init_value=0.0,
        ),
    ),
    "masked, table in each block": Case(
        MASKED,
        sizes(32, 2, 2, 64, 28, 14, vocab_size=9, use_mask_token=True, use_relative_position_bias=True),
    ),
    "classification, mean patch": Case(
        CLASSIFICATION, sizes(40, 3, 5, 60, 64, 16, num_labels=11, use_relative_position_bias=True)
    ),
    "classification, class token": Case(
        CLASSIFICATION,
        sizes(32, 2, 4, 64, 24, 8, num_labels=3, use_relative_position_bias=True, use_mean_pooling=False),
    ),
    "classification, epsilon 0.01": Case(
        CLASSIFICATION,
        sizes(32, 2, 4, 64, 24, 8, num_labels=5, use_shared_relative_position_bias=True)
        | {"layer_norm_eps": 1e-2},
    ),
    "body, mean patch": Case("BeitModel", sizes(32, 2, 2, 48, 32, 16, use_relative_position_bias=True)),
    "body, class token": Case(
        "BeitModel",
        sizes(24, 2, 6, 48, 24, 8, use_absolute_position_embeddings=True, use_mean_pooling=False),
    ),
    "body without pooler, 1 channel": Case(
        "BeitModel",
        sizes(24, 2, 6, 48, 16, 8, use_shared_relative_position_bias=True, num_channels=1),
        {"add_pooling_layer": False},
    ),
}  # fmt: skip


def build(case, **config):
    """A model in eval mode whose every parameter is random."""
    made = getattr(transformers, case.kind)(
        transformers.BeitConfig(**{**case.config, **config}), **case.body
    ).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, case.kind)) + case.config["hidden_size"])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return made


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def saved(request, tmp_path):
    """A model and the folder in which ``save_pretrained`` wrote it."""
    model = build(request.param)
    model.save_pretrained(tmp_path / "model")
    return request.param, model, tmp_path / "model"


def pictures(config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, config.num_channels, config.image_size, config.image_size, generator=generator)


@torch.no_grad()
def outputs(model, images, **more):
    found = model(images, **more)
    return found.last_hidden_state if hasattr(found, "last_hidden_state") else found.logits


@torch.no_grad()
def ours(model, images, **more):
    found = model(images, **more)
    return found["image"] if isinstance(found, dict) else found


def through_ours(state, note):
    """A state dict of transformers read and written again."""
    config = FORM.config(state, note, {})
    table = FORM.table(config, {name: value.shape for name, value in state.items()})
    assert mapping.problems(table, state) == []
    return mapping.write(table, *mapping.read(table, state))


def equal_bits(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in expected.items()
    )


def test_outputs_equal(saved):
    _, model, folder = saved
    images = pictures(model.config)
    difference = (ours(load_model(folder), images) - outputs(model, images)).abs().max()
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == MASKED])
def test_outputs_at_hidden_patches_equal(name, tmp_path):
    model = build(CASES[name])
    model.save_pretrained(tmp_path)
    images = pictures(model.config)
    hidden = torch.rand(3, (model.config.image_size // model.config.patch_size) ** 2) < 0.4
    expected = outputs(model, images, bool_masked_pos=hidden)
    assert expected.shape == (*hidden.shape, model.config.vocab_size)
    difference = (ours(load_model(tmp_path), images, image_mask=hidden) - expected).abs().max()
    assert difference < TOLERANCE


def test_hiding_patches_of_a_body_equals(tmp_path):
    model = build(CASES["body, mean patch"], use_mask_token=True)
    model.save_pretrained(tmp_path)
    images, hidden = pictures(model.config), torch.tensor([[True, False, False, True]] * 3)
    expected = outputs(model, images, bool_masked_pos=hidden)
    difference = (ours(load_model(tmp_path), images, image_mask=hidden) - expected).abs().max()
    assert difference < TOLERANCE


def test_names_and_shapes_are_those_of_the_installed_class(saved):
    _, model, folder = saved
    for state in (load_file(folder / "model.safetensors"), model.state_dict()):
        shapes = {name: value.shape for name, value in state.items()}
        table = FORM.table(read_model(folder).model, shapes)
        told = {
            name: shape
            for pair in table.pairs
            for name, shape in zip(pair.theirs, pair.shapes, strict=True)
            if not pair.group or name in shapes
        }
        assert told == {name: tuple(shape) for name, shape in shapes.items()}


def test_files_go_back_bit_for_bit(saved):
    _, model, folder = saved
    state = load_file(folder / "model.safetensors")
    assert equal_bits(through_ours(state, model.config.to_dict()), state)


def test_a_state_dict_in_memory_goes_back_into_its_class(saved):
    case, model, _ = saved
    state = model.state_dict()
    written = through_ours(state, model.config.to_dict())
    assert equal_bits(written, state)
    fresh = type(model)(model.config, **case.body)
    fresh.load_state_dict(written, strict=True)


def test_a_state_dict_saved_from_memory_gives_the_same_outputs(saved, tmp_path):
    _, model, folder = saved
    (tmp_path / "memory").mkdir()
    torch.save(model.state_dict(), tmp_path / "memory" / "weights.pth")
    (tmp_path / "memory" / "config.json").write_text((folder / "config.json").read_text())
    images = pictures(model.config)
    by_memory, by_file = load_model(tmp_path / "memory" / "weights.pth"), load_model(folder)
    assert torch.equal(ours(by_memory, images), ours(by_file, images))


def test_what_our_tensors_are_written_as_loads_into_the_class_with_nothing_missing(saved, tmp_path):
    case, model, folder = saved
    stored = read_model(folder)
    table = FORM.table(stored.model, {name: value.shape for name, value in stored.tensors.items()})
    assert mapping.untold(table, stored.tensors) == []
    (tmp_path / "out").mkdir()
    written = mapping.write(table, stored.tensors, stored.unread)
    save_file(written, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out" / "config.json").write_text((folder / "config.json").read_text())
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True, **case.body)
    assert not any(info.values())
    assert equal_bits(dict(again.state_dict()), dict(model.state_dict()))


def test_shards_give_the_same_tensors(tmp_path):
    model = build(CASES["classification, mean patch"])
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert equal_bits(read_model(tmp_path / "many").tensors, read_model(tmp_path / "one").tensors)


def test_half_precision_files_are_read_as_fp32(tmp_path):
    model = build(CASES["body, mean patch"]).half()
    model.save_pretrained(tmp_path)
    images = pictures(model.config)
    difference = (ours(load_model(tmp_path), images) - outputs(model.float(), images)).abs().max()
    assert difference < TOLERANCE


def test_epsilon_without_config_is_the_default_of_transformers(tmp_path):
    model = build(CASES["classification, mean patch"])
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert read_model(tmp_path).model.norm_eps == transformers.BeitConfig().layer_norm_eps


def test_pixels_that_fill_no_patch_are_left_out(tmp_path):
    model = build(CASES["classification, mean patch"], image_size=70)
    model.save_pretrained(tmp_path)
    images = pictures(model.config)
    found = ours(load_model(tmp_path), images[:, :, :64, :64])
    assert (found - outputs(model, images)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["classification, mean patch", "masked, shared table"])
def test_another_resolution_equals_the_class_built_for_it_with_resampled_tables(name, tmp_path):
    model = build(CASES[name])
    model.save_pretrained(tmp_path)
    side = model.config.image_size // model.config.patch_size
    larger = build(CASES[name], image_size=2 * model.config.image_size)
    state = {
        key: resize.relative(value, (side, side), (2 * side, 2 * side)) if key.endswith("_table") else value
        for key, value in model.state_dict().items()
    }
    larger.load_state_dict(state)
    images = pictures(larger.config)
    found = ours(load_model(tmp_path, image_px=larger.config.image_size), images)
    assert (found - outputs(larger, images)).abs().max() < TOLERANCE


def test_another_resolution_equals_the_positions_that_the_class_resamples_itself(tmp_path):
    name = "masked, positions, no scale"
    model = build(CASES[name])
    model.save_pretrained(tmp_path)
    images = pictures(transformers.BeitConfig(**{**CASES[name].config, "image_size": 48}))
    found = ours(load_model(tmp_path, image_px=48), images)
    assert (found - outputs(model, images)).abs().max() < TOLERANCE


def official_as_transformers(file, kind, folder, **config):
    """An official file in the class of transformers, by way of our tensors."""
    stored = read_model(OFFICIAL / file)
    table = FORM.table(stored.model, {name: value.shape for name, value in stored.tensors.items()})
    written = mapping.write(table, stored.tensors, {})
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    transformers.BeitConfig(**sizes(48, 2, 4, 192, 48, 16, **config)).save_pretrained(folder)
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model.eval()


def official_arrays(name):
    return {key: torch.from_numpy(value) for key, value in np.load(OFFICIAL / f"{name}.npz").items()}


@official
def test_an_official_pretrained_file_gives_the_official_outputs_in_the_class(tmp_path):
    model = official_as_transformers(
        "beit_mim.pth", MASKED, tmp_path,
        vocab_size=64, use_mask_token=True, use_shared_relative_position_bias=True,
    )  # fmt: skip
    inputs = official_arrays("beit_inputs")
    found = outputs(model, inputs["images"], bool_masked_pos=inputs["mask"])[inputs["mask"]]
    assert (found - official_arrays("beit_outputs")["mim.logits"]).abs().max() < TOLERANCE


@official
def test_an_official_classifier_gives_the_official_outputs_in_the_class(tmp_path):
    model = official_as_transformers(
        "beit_classification.pth", CLASSIFICATION, tmp_path, num_labels=23, use_relative_position_bias=True
    )
    found = outputs(model, official_arrays("beit_inputs")["images"])
    assert (found - official_arrays("beit_outputs")["classification.logits"]).abs().max() < TOLERANCE


def test_transformers_takes_a_table_that_is_not_square_for_another():
    case = CASES["classification, mean patch"]
    table = build(case, image_size=[32, 64]).beit.layers[0].relative_position_bias
    plain = table.relative_position_bias_table[table.generate_relative_position_index((2, 4))]
    assert (table((2, 4))[0] - plain.permute(2, 0, 1)).abs().max() > 0.01


def test_transformers_does_not_run_with_learned_positions_that_are_not_square():
    case = CASES["body, class token"]
    model = build(case, image_size=[16, 24])
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 3, 16, 24))
