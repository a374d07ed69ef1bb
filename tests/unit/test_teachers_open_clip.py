"""open_clip's models as teachers: names, tags, files, and what is refused."""

import sys

import pytest
import torch

from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.teachers.open_clip import OpenClipTeacher

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TEXT = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def library(monkeypatch):
    """open_clip with three small models."""
    open_clip = pytest.importorskip("open_clip")
    plain = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    trunk = {"timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    for name, vision, more in (
        ("tiny", plain, {}),
        ("tiny-quickgelu", plain, {"quick_gelu": True}),
        ("tiny-coca", plain | {"attentional_pool": True, "attn_pooler_heads": 2}, {}),
        ("tiny-resnet", {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, {}),
        ("tiny-timm", trunk, {"custom_text": True}),
    ):
        config = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": TEXT, **more}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    return open_clip


def tagged(monkeypatch, library, name, looks, **more):
    tags = {
        f"tag{number}": {"url": "https://nowhere/x.pt", "mean": mean, "std": std, **more}
        for number, (mean, std) in enumerate(looks)
    }
    monkeypatch.setitem(library.pretrained._PRETRAINED, name, tags)


def kept(library, folder, name="tiny"):
    torch.manual_seed(0)
    model = library.create_model(name)
    torch.save(model.state_dict(), folder / "clip.pt")
    return str(folder / "clip.pt")


def opened(name="tiny", **settings):
    return OpenClipTeacher(model=name, **{"input_px": 32, "weights": "random"} | settings).open(2)


def test_features_are_as_wide_as_the_common_space(library):
    assert opened()(PICTURES).shape == (2, 4, 48)


def test_a_file_of_weights_is_read(library, tmp_path):
    path = kept(library, tmp_path)
    found = opened(weights=path).model.state_dict()
    state = torch.load(path)
    assert all(torch.equal(value, state[f"visual.{name}"]) for name, value in found.items())


def test_the_text_tower_is_not_kept(library):
    assert not any("text" in name or "token_embedding" in name for name, _ in opened().named_parameters())


def test_a_tower_of_timm_gives_its_patches(library, tmp_path):
    teacher = opened("tiny-timm", weights=kept(library, tmp_path, "tiny-timm"), input_px=160)
    pictures = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        trunk = teacher.model.trunk
        expected = trunk.forward_features((pictures - teacher.mean) / teacher.std)[:, 1:]
    assert teacher.width == trunk.num_features
    grid = expected.transpose(1, 2).unflatten(2, (10, 10))
    expected = torch.nn.functional.interpolate(grid, (2, 2), mode="bilinear", antialias=True)
    assert torch.allclose(teacher(pictures), expected.flatten(2).transpose(1, 2), atol=1e-5)


def test_an_unknown_model_gets_similar_names(library):
    with pytest.raises(UserError, match=r"open_clip has no model 'ViT-B-15'; similar: .*ViT-B-16"):
        opened("ViT-B-15")


def test_a_tag_that_does_not_exist_gets_those_that_do(library):
    with pytest.raises(UserError, match=r"no weights 'laion9' for ViT-B-16-quickgelu: .*openai"):
        opened("ViT-B-16-quickgelu", weights="laion9")


def test_weights_that_fit_in_part_are_refused(library, tmp_path):
    path = kept(library, tmp_path)
    state = torch.load(path)
    del state["visual.ln_post.bias"]
    torch.save(state, path)
    with pytest.raises(
        DataError, match=r"clip.pt: .* not those of this VisionTransformer: missing: ln_post.bias"
    ):
        opened(weights=path)


def test_weights_that_are_no_clip_are_refused(library, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "clip.pt")
    with pytest.raises(DataError, match=r"its 0 tensors are not those of this VisionTransformer"):
        opened(weights=str(tmp_path / "clip.pt"))


@pytest.mark.parametrize("name", ["tiny-coca", "tiny-resnet"])
def test_a_tower_that_pools_by_attention_is_refused(library, name):
    with pytest.raises(UserError, match=r"pools its picture by attention"):
        opened(name)


def test_a_file_has_the_normalisation_of_the_models_tags(library, monkeypatch, tmp_path):
    tagged(monkeypatch, library, "tiny", [HALF, HALF])
    teacher = opened(weights=kept(library, tmp_path))
    assert teacher.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_a_model_without_tags_is_normalised_as_open_clip_does(library):
    assert torch.allclose(opened().mean.flatten(), torch.tensor(OPENAI[0]))


def test_a_file_whose_normalisation_is_not_known_needs_it(library, monkeypatch, tmp_path):
    tagged(monkeypatch, library, "tiny", [HALF, OPENAI])
    path = kept(library, tmp_path)
    with pytest.raises(UserError, match=r"different means and deviations: .*; set mean and std"):
        opened(weights=path)
    teacher = opened(weights=path, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert torch.allclose(teacher.std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_weights_of_a_tag_have_their_own_activation(library, monkeypatch, tmp_path, quick_gelu):
    tagged(monkeypatch, library, "tiny", [OPENAI], quick_gelu=quick_gelu)
    path = kept(library, tmp_path)
    monkeypatch.setattr(library.factory, "download_pretrained", lambda *given, **settings: path)
    teacher = opened(weights="tag0")
    activation = type(teacher.model.transformer.resblocks[0].mlp.gelu).__name__
    assert activation == ("QuickGELU" if quick_gelu else "GELU")


def test_a_model_with_another_activation_than_its_tag_is_refused(library, monkeypatch):
    tagged(monkeypatch, library, "tiny-quickgelu", [OPENAI])
    with pytest.raises(UserError, match=r"trained with the exact GELU, .*; name the model tiny$"):
        opened("tiny-quickgelu", weights="tag0")


def test_weights_that_cannot_be_fetched_are_a_matter_of_setup(library, monkeypatch):
    def offline(*given, **settings):
        raise OSError("no route to host")

    tagged(monkeypatch, library, "tiny", [OPENAI])
    monkeypatch.setattr(library.factory, "download_pretrained", offline)
    with pytest.raises(SetupError, match=r"the weights tag0 of tiny cannot be fetched, .*no route to host"):
        opened(weights="tag0")


def test_open_clip_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SetupError, match=r"needs the package open_clip .*: pip install open_clip_torch"):
        opened()
