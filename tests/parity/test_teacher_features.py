"""Teachers give the features that the libraries' own code gives for the same random weights.

Tolerance 2e-5 absolute in fp32: the sums run in another order.
"""

from functools import partial

import pytest
import timm
import torch
from torch.nn import functional as F

from beitctl_plugins.teachers.named import ClipTeacher, DinoTeacher
from beitctl_plugins.teachers.open_clip import OpenClipTeacher
from beitctl_plugins.teachers.timm import TimmTeacher
from beitctl_plugins.teachers.transformers import TransformersTeacher

TOLERANCE = 2e-5
PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 32}


@pytest.fixture
def tiny(monkeypatch):
    """All of timm's Vision Transformers with two blocks of width 64."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, embed_dim=64, depth=2, num_heads=1))


def normalised(mean_std, pictures=PICTURES):
    mean, std = (torch.tensor(values)[:, None, None] for values in mean_std)
    return (pictures - mean) / std


def shaken(model):
    """The model with random norms, biases and tables too, so that none of them can go missing unseen."""
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def difference(found, expected):
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def open_clips(quick_gelu, pictures=32):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    return shaken(
        open_clip.model.CLIP(
            embed_dim=512,
            vision_cfg={"image_size": pictures, "layers": 2, "width": 64, "patch_size": 16},
            text_cfg={"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1},
            quick_gelu=quick_gelu,
        )
    )


@torch.no_grad()
def target(clip, pictures):
    """BEiT v2's: patch tokens of OpenAI's code through ``ln_post``, then times ``proj``."""
    visual = clip.visual
    x = visual.conv1(pictures).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = visual.transformer(visual.ln_pre(x))
    return (visual.ln_post(x) @ visual.proj)[:, 1:]


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_clip_of_openais_layout_is_open_clips(tiny, tmp_path, quick_gelu, half):
    clip = open_clips(quick_gelu)
    if half:  # as OpenAI published it
        clip = clip.half().float()
    state = {name: tensor.half() if half else tensor for name, tensor in clip.state_dict().items()}
    torch.save(state, tmp_path / "clip.pt")
    teacher = ClipTeacher(weights=str(tmp_path / "clip.pt"), quick_gelu=quick_gelu, input_px=32).open(2)
    assert difference(teacher(PICTURES), target(clip, normalised(OPENAI))) < TOLERANCE
    assert teacher.width == 512


def test_the_two_activations_differ_by_more_than_the_tolerance(tiny, tmp_path):
    clip = open_clips(True)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    teacher = ClipTeacher(weights=str(tmp_path / "clip.pt"), quick_gelu=False, input_px=32).open(2)
    assert difference(teacher(PICTURES), target(clip, normalised(OPENAI))) > 100 * TOLERANCE


def test_a_picture_tower_alone_is_read(tiny, tmp_path):
    clip = open_clips(True)
    torch.save(clip.visual.state_dict(), tmp_path / "visual.pt")
    teacher = ClipTeacher(weights=str(tmp_path / "visual.pt"), input_px=32).open(2)
    assert difference(teacher(PICTURES), target(clip, normalised(OPENAI))) < TOLERANCE


def test_clip_of_transformers_is_transformers(tiny, tmp_path):
    hf = pytest.importorskip("transformers")
    config = hf.CLIPVisionConfig(**SIZES, intermediate_size=256, patch_size=16, projection_dim=512)
    torch.manual_seed(0)
    model = shaken(hf.CLIPVisionModelWithProjection(config))
    model.save_pretrained(tmp_path)
    teacher = ClipTeacher(weights=str(tmp_path), input_px=32).open(2)
    with torch.no_grad():
        tower = model.vision_model
        tokens = tower.post_layernorm(tower(normalised(OPENAI)).last_hidden_state[:, 1:])
        expected = model.visual_projection(tokens)
    assert difference(teacher(PICTURES), expected) < TOLERANCE


def test_a_whole_clip_of_transformers_is_read(tiny, tmp_path):
    hf = pytest.importorskip("transformers")
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = hf.CLIPConfig(
        vision_config={**SIZES, "intermediate_size": 256, "patch_size": 16},
        text_config={**text, "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        projection_dim=512,
    )
    torch.manual_seed(0)
    model = shaken(hf.CLIPModel(config))
    model.save_pretrained(tmp_path)
    teacher = ClipTeacher(weights=str(tmp_path), input_px=32).open(2)
    with torch.no_grad():
        tower = model.vision_model
        tokens = tower.post_layernorm(tower(normalised(OPENAI)).last_hidden_state[:, 1:])
        expected = model.visual_projection(tokens)
    assert difference(teacher(PICTURES), expected) < TOLERANCE


def test_positions_of_clip_are_resampled_as_open_clip_does(tiny, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    clip, larger = open_clips(True, 64), open_clips(True, 32)
    state = clip.state_dict()
    torch.save(state, tmp_path / "clip.pt")
    open_clip.model.resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    teacher = ClipTeacher(weights=str(tmp_path / "clip.pt"), input_px=32).open(2)
    assert difference(teacher(PICTURES), target(larger, normalised(OPENAI))) < TOLERANCE


@pytest.fixture
def named(monkeypatch):
    """A small CLIP in open_clip's list of models."""
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    return open_clip


def test_open_clip_is_open_clip(named, tmp_path):
    torch.manual_seed(0)
    clip = shaken(named.create_model("tiny", force_image_size=32))
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    teacher = OpenClipTeacher(model="tiny", weights=str(tmp_path / "clip.pt"), input_px=32).open(2)
    assert difference(teacher(PICTURES), target(clip, normalised(OPENAI))) < TOLERANCE


def test_positions_of_open_clip_are_resampled(named, tmp_path):
    torch.manual_seed(0)
    clip = shaken(named.create_model("tiny"))
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "clip.pt")
    smaller = named.create_model("tiny", pretrained=str(tmp_path / "clip.pt"), force_image_size=32).eval()
    teacher = OpenClipTeacher(model="tiny", weights=str(tmp_path / "clip.pt"), input_px=32).open(2)
    assert difference(teacher(PICTURES), target(smaller, normalised(OPENAI))) < TOLERANCE


DINOS = {
    "vit-b/16": {"num_classes": 0},
    "dinov2-vit-b/14": {"init_values": 1e-5},
    "dinov2-vit-b/14-reg": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
}


@pytest.mark.parametrize("name", DINOS)
def test_dino_is_timms_plain_forward_pass(tiny, tmp_path, name):
    patch = int(name.partition("/")[2][:2])
    size = {"img_size": 3 * patch, "patch_size": patch}
    torch.manual_seed(0)
    vit = shaken(timm.models.VisionTransformer(
        embed_dim=64, depth=2, num_heads=1, **size, **{"num_classes": 0} | DINOS[name]
    ))  # fmt: skip
    torch.save(vit.state_dict(), tmp_path / "dino.pth")
    pictures = F.interpolate(PICTURES, 3 * patch)
    teacher = DinoTeacher(model=name, weights=str(tmp_path / "dino.pth"), input_px=3 * patch).open(3)
    with torch.no_grad():
        expected = vit.forward_features(normalised(IMAGENET, pictures))[:, vit.num_prefix_tokens :]
    assert difference(teacher(pictures), expected) < TOLERANCE
    assert vit.num_prefix_tokens == (5 if "reg" in name else 1)


def test_a_final_output_of_timm_is_after_the_last_norm(tmp_path):
    torch.manual_seed(0)
    vit = shaken(timm.create_model("test_vit", img_size=64))
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    cfg, pictures = vit.pretrained_cfg, F.interpolate(PICTURES, 64)
    settings = {"model": "test_vit", "weights": str(tmp_path / "vit.pt"), "input_px": 64}
    final, stage = (TimmTeacher(**settings, output=output).open(4)(pictures) for output in ("final", "stage"))
    with torch.no_grad():
        expected = vit.forward_features(normalised((cfg["mean"], cfg["std"]), pictures))[:, 1:]
        assert difference(final, expected) < TOLERANCE
        assert difference(vit.norm(stage), expected) < TOLERANCE


def vision_models():
    plain = {**SIZES, "patch_size": 8, "intermediate_size": 64}
    return {
        "ViTModel": ("ViTConfig", plain, 1),
        "BeitModel": ("BeitConfig", plain, 1),
        "DeiTModel": ("DeiTConfig", plain, 2),
        "Dinov2Model": ("Dinov2Config", {**SIZES, "patch_size": 8, "mlp_ratio": 2}, 1),
        "Dinov2WithRegistersModel": (
            "Dinov2WithRegistersConfig", {**SIZES, "patch_size": 8, "mlp_ratio": 2}, 5
        ),
        "CLIPVisionModel": ("CLIPVisionConfig", plain, 1),
        "SiglipVisionModel": ("SiglipVisionConfig", plain, 0),
        "SwinModel": (
            "SwinConfig",
            {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2, "image_size": 32,
             "patch_size": 4},
            0,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", vision_models())
def test_transformers_is_transformers(tmp_path, kind):
    hf = pytest.importorskip("transformers")
    config, settings, prefix = vision_models()[kind]
    torch.manual_seed(0)
    model = shaken(getattr(hf, kind)(getattr(hf, config)(**settings)))
    model.save_pretrained(tmp_path)
    teacher = TransformersTeacher(
        model=str(tmp_path), input_px=32, mean=IMAGENET[0], std=IMAGENET[1]
    ).open(4)  # fmt: skip
    with torch.no_grad():
        expected = model(normalised(IMAGENET)).last_hidden_state[:, prefix:]
    assert difference(teacher(PICTURES), expected) < TOLERANCE
