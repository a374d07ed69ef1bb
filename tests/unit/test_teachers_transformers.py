"""Vision models of transformers as teachers: normalisation, layers, and what is refused."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.teachers.transformers import TransformersTeacher

hf = pytest.importorskip("transformers")

PLAIN = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
COLOURS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}


def saved(folder, kind="ViT", note=COLOURS, **settings):
    """A model of transformers in a folder, with what its image processor would say."""
    torch.manual_seed(0)
    sizes = settings or PLAIN | {"image_size": 32, "patch_size": 8}
    model = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**sizes)).eval()
    model.save_pretrained(folder)
    if note is not None:
        named = {"image_processor_type": "ViTImageProcessor", **note}
        (folder / "preprocessor_config.json").write_text(json.dumps(named))
    return model


def opened(folder, grid=4, **settings):
    return TransformersTeacher(model=str(folder), **{"input_px": 32} | settings).open(grid)


def shown(mean, std):
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    return (PICTURES - mean) / std


@torch.no_grad()
def same(teacher, model, mean=COLOURS["image_mean"], std=COLOURS["image_std"]):
    expected = model(shown(mean, std)).last_hidden_state[:, 1:]
    return torch.allclose(teacher(PICTURES), expected, atol=1e-5)


def test_pictures_are_normalised_as_the_image_processor_says(tmp_path):
    model = saved(tmp_path)
    assert same(opened(tmp_path), model)


def test_mean_and_std_of_the_table_come_first(tmp_path):
    model = saved(tmp_path)
    teacher = opened(tmp_path, mean=(0.3, 0.3, 0.3), std=(0.2, 0.2, 0.2))
    assert same(teacher, model, [0.3] * 3, [0.2] * 3)


def test_a_processor_that_does_not_normalise_leaves_the_picture(tmp_path):
    model = saved(tmp_path, note=COLOURS | {"do_normalize": False})
    assert same(opened(tmp_path), model, [0.0] * 3, [1.0] * 3)


def test_a_processor_that_does_not_rescale_reads_0_to_255(tmp_path):
    model = saved(tmp_path, note=COLOURS | {"do_rescale": False})
    mean, std = ([value / 255 for value in COLOURS[key]] for key in ("image_mean", "image_std"))
    assert same(opened(tmp_path), model, mean, std)


def test_a_processor_that_rescales_to_2_is_followed(tmp_path):
    model = saved(tmp_path, note=COLOURS | {"rescale_factor": 1 / 127.5})
    mean, std = ([value / 2 for value in COLOURS[key]] for key in ("image_mean", "image_std"))
    assert same(opened(tmp_path), model, mean, std)


def test_a_model_that_does_not_say_how_it_normalises_is_refused(tmp_path):
    saved(tmp_path, note=None)
    with pytest.raises(DataError, match=r"how its pictures are normalised .* set the teacher's mean and std"):
        opened(tmp_path)


def test_means_that_are_no_three_numbers_are_refused(tmp_path):
    saved(tmp_path, note=COLOURS | {"image_mean": [0.1]})
    with pytest.raises(DataError, match=r"normalises with .0\.1,?., expected 3 numbers"):
        opened(tmp_path)


@pytest.mark.parametrize("layer", [0, 1, -2])
def test_a_layer_is_one_of_the_hidden_states(tmp_path, layer):
    model = saved(tmp_path)
    with torch.no_grad():
        pixels = shown(COLOURS["image_mean"], COLOURS["image_std"])
        expected = model(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
    assert torch.allclose(opened(tmp_path, layer=layer)(PICTURES), expected, atol=1e-5)


def test_a_layer_that_the_model_lacks_is_named(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match=r"has no layer 9, or reads no pictures of input_px = 32"):
        opened(tmp_path, layer=9)


@pytest.mark.parametrize("kind", ["ConvNext", "ResNet"])
def test_feature_maps_are_read_as_they_are(tmp_path, kind):
    sizes = {
        "ConvNext": {"hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4},
    }
    model = saved(tmp_path, kind, **sizes[kind])
    teacher = opened(tmp_path, grid=2, input_px=64)
    pictures = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(COLOURS[f"image_{key}"])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = model((pictures - mean) / std).last_hidden_state.flatten(2).transpose(1, 2)
    assert torch.allclose(teacher(pictures), expected, atol=1e-5)


def test_positions_are_resampled_to_the_size_that_is_asked_for(tmp_path):
    saved(tmp_path)
    assert opened(tmp_path, grid=6, input_px=48)(torch.rand(1, 3, 48, 48)).shape == (1, 36, 16)


def test_the_picture_tower_of_a_model_with_two_is_read(tmp_path):
    torch.manual_seed(0)
    text = PLAIN | {"vocab_size": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = hf.CLIPModel(
        hf.CLIPConfig(vision_config=PLAIN | {"image_size": 32, "patch_size": 8}, text_config=text)
    ).eval()
    model.save_pretrained(tmp_path)
    teacher = opened(tmp_path, mean=COLOURS["image_mean"], std=COLOURS["image_std"])
    assert same(teacher, model.vision_model)
    assert sum(p.numel() for p in teacher.parameters()) < sum(p.numel() for p in model.parameters()) / 2 + 2e4


def test_a_model_that_hides_patches_is_refused(tmp_path):
    sizes = PLAIN | {"image_size": 32, "patch_size": 8}
    saved(tmp_path, "ViTMAE", **sizes)
    with pytest.raises(UserError, match=r"gives 5 tokens where its patches make a grid of 4 x 4 .*MAE"):
        opened(tmp_path)


def test_a_model_of_videos_is_refused(tmp_path):
    saved(tmp_path, "VideoMAE", **PLAIN, image_size=32, patch_size=8, num_frames=2)
    with pytest.raises(UserError, match="reads no pictures of input_px = 32"):
        opened(tmp_path)


def test_a_model_of_texts_is_refused(tmp_path):
    saved(tmp_path, "Bert", **PLAIN, vocab_size=16)
    with pytest.raises(UserError, match="BertModel reads no pictures; name a vision model"):
        opened(tmp_path)


def test_missing_tensors_are_named(tmp_path):
    saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["layernorm.bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"1 tensors of ViTModel are not in its files: layernorm.bias; they"):
        opened(tmp_path)


def test_a_pooler_may_be_missing(tmp_path):
    model = saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("pooler.")}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    assert same(opened(tmp_path), model)


def test_weights_of_half_precision_are_read_as_fp32(tmp_path):
    saved(tmp_path).half().save_pretrained(tmp_path)
    assert {p.dtype for p in opened(tmp_path).parameters()} == {torch.float32}


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = saved(tmp_path)
    model.layernorm.bias.data[0] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="its features of random pictures are not finite"):
        opened(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00" * 64])
def test_a_damaged_file_is_refused(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="transformers cannot read a model there"):
        opened(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "nothing"}', '{"model_type": "vit"'])
def test_a_damaged_config_is_refused(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match="transformers cannot read a model there"):
        opened(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    saved(tmp_path)
    note = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(note))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(DataError, match="transformers cannot read a model there"):
        opened(tmp_path)
    assert not (tmp_path / "run").exists()


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_a_pickle_is_not_run(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"layernorm.bias": Harm()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="transformers cannot read a model there"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(name):
    with pytest.raises(DataError, match="no such folder; expected one with a config"):
        opened(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="no such folder"):
        opened(tmp_path / "model.safetensors")


def test_a_model_that_cannot_be_fetched_is_a_matter_of_setup(monkeypatch):
    def offline(name, **settings):
        raise OSError("no route to host")

    monkeypatch.setattr(hf.AutoModel, "from_pretrained", offline)
    with pytest.raises(SetupError, match="google/vit: cannot be fetched from the Hugging Face Hub: no route"):
        opened("google/vit")


def test_transformers_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SetupError, match=r"needs the package transformers .*: pip install 'beitctl\[hf\]'"):
        opened("google/vit")
