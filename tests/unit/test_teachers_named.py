"""CLIP and DINO by name: which files are read, and what is said about the others."""

import json
from argparse import Namespace
from functools import partial

import pytest
import timm
import torch
from pydantic import ValidationError

from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.teachers.named import CLIP, DINO, ClipTeacher, DinoTeacher


@pytest.fixture
def tiny(monkeypatch):
    """All of timm's Vision Transformers with two blocks of width 64."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, embed_dim=64, depth=2, num_heads=1))


@pytest.mark.parametrize("name", CLIP)
def test_timm_has_openais_clip_with_its_projection_and_its_activation(name):
    cfg = timm.get_pretrained_cfg(CLIP[name])
    assert cfg.has_weights
    assert "quickgelu" in cfg.architecture
    assert cfg.num_classes == (768 if "l/14" in name else 512)
    assert cfg.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


@pytest.mark.parametrize("name", DINO)
def test_timm_has_every_dino(name):
    cfg = timm.get_pretrained_cfg(DINO[name])
    assert cfg.has_weights
    assert cfg.mean == pytest.approx((0.485, 0.456, 0.406))
    assert cfg.num_classes == 0


def test_the_teacher_of_the_paper_is_the_default():
    assert (ClipTeacher().model, DinoTeacher().model) == ("vit-b/16", "vit-b/16")


@pytest.mark.parametrize("teacher", [ClipTeacher, DinoTeacher])
def test_an_unknown_name_gets_the_known_ones(teacher):
    with pytest.raises(ValidationError, match="vit-b/16"):
        teacher(model="vit-b/17")


def test_openais_activation_is_the_default(tiny):
    teacher = ClipTeacher(weights="random", input_px=32).open(2)
    assert type(teacher.model.blocks[0].mlp.act).__name__ == "QuickGELU"


def test_openais_weights_are_not_read_with_another_activation():
    with pytest.raises(UserError, match="OpenAI's weights need quick_gelu = true"):
        ClipTeacher(quick_gelu=False).open(2)


def clip(patch=16, drop=(), **more):
    """OpenAI's layout of a picture tower, with the text's part beside it."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "conv1.weight": (64, 3, patch, patch), "class_embedding": (64,), "positional_embedding": (5, 64),
        "ln_pre.weight": (64,), "ln_pre.bias": (64,), "ln_post.weight": (64,), "ln_post.bias": (64,),
        "proj": (64, 512),
    }  # fmt: skip
    inner = {
        "attn.in_proj_weight": (192, 64), "attn.in_proj_bias": (192,), "attn.out_proj.weight": (64, 64),
        "attn.out_proj.bias": (64,), "ln_1.weight": (64,), "ln_1.bias": (64,), "ln_2.weight": (64,),
        "ln_2.bias": (64,), "mlp.c_fc.weight": (256, 64), "mlp.c_fc.bias": (256,),
        "mlp.c_proj.weight": (64, 256), "mlp.c_proj.bias": (64,),
    }  # fmt: skip
    for block in range(2):
        shapes |= {f"transformer.resblocks.{block}.{name}": shape for name, shape in inner.items()}
    state = {f"visual.{k}": 0.1 * torch.randn(v, generator=draw) for k, v in shapes.items() if k not in drop}
    return state | {"token_embedding.weight": torch.zeros(9, 4), "logit_scale": torch.ones(())} | more


def opened(tmp_path, state, teacher=ClipTeacher, **settings):
    torch.save(state, tmp_path / "teacher.pt")
    return teacher(weights=str(tmp_path / "teacher.pt"), **{"input_px": 32} | settings).open(2)


def test_a_clip_is_as_wide_as_its_common_space(tiny, tmp_path):
    teacher = opened(tmp_path, clip())
    assert teacher(torch.rand(3, 3, 32, 32)).shape == (3, 4, teacher.width) == (3, 4, 512)


def test_a_clip_without_its_projection_is_refused(tiny, tmp_path):
    with pytest.raises(DataError, match=r"teacher.pt: .* missing: head.weight, head.bias\. Is it the file"):
        opened(tmp_path, clip(drop=["proj"]))


def test_a_clip_with_more_blocks_is_refused(tiny, tmp_path):
    more = {"visual.transformer.resblocks.2.ln_1.weight": torch.zeros(64)}
    with pytest.raises(DataError, match=r"left over: blocks.2.norm1.weight"):
        opened(tmp_path, clip(**more))


def test_a_clip_of_another_patch_is_not_resampled(tiny, tmp_path):
    with pytest.raises(DataError, match=r"has patches of \(32, 32\) px, the model patches of \(16, 16\) px"):
        opened(tmp_path, clip(patch=32))


def test_another_model_is_no_clip(tiny, tmp_path):
    with pytest.raises(DataError, match=r"its 1 tensors are not those of this VisionTransformer: missing: "):
        opened(tmp_path, {"weight": torch.zeros(3)})


def test_an_attention_of_transformers_that_lacks_a_part_is_refused(tiny, tmp_path):
    state = {
        "vision_model.embeddings.class_embedding": torch.zeros(64),
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64),
    }
    with pytest.raises(DataError, match=r"missing: pos_embed, patch_embed.proj.weight"):
        opened(tmp_path, state)


@pytest.mark.parametrize("note", [{"vision_config": {"hidden_act": "gelu"}}, {"hidden_act": "gelu"}])
def test_the_activation_that_a_config_names_must_be_the_settings(tiny, tmp_path, note):
    (tmp_path / "config.json").write_text(json.dumps(note))
    with pytest.raises(UserError, match=r"says hidden_act = 'gelu': set quick_gelu = false"):
        opened(tmp_path, clip())
    assert opened(tmp_path, clip(), quick_gelu=False).width == 512


def test_the_heads_that_a_config_names_must_be_the_models(tiny, tmp_path):
    (tmp_path / "config.json").write_text('{"vision_config": {"num_attention_heads": 4}}')
    with pytest.raises(DataError, match=r"says 4 attention heads, vit-b/16 has 1; name the file's own model"):
        opened(tmp_path, clip())


@pytest.mark.parametrize("note", ["", "[1]", '{"vision_config": 3}', "\x00"])
def test_a_config_that_is_none_of_transformers_is_passed_over(tiny, tmp_path, note):
    (tmp_path / "config.json").write_text(note)
    assert opened(tmp_path, clip()).width == 512


def test_openais_own_download_is_refused_with_the_command_that_saves_its_tensors(tmp_path, tiny):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(DataError, match=r"ViT-B-16.pt: a TorchScript archive.*torch.jit.load"):
        ClipTeacher(weights=str(tmp_path / "ViT-B-16.pt"), input_px=32).open(2)


def test_weights_that_cannot_be_fetched_are_a_matter_of_setup(monkeypatch):
    def offline(name, pretrained, **settings):
        assert pretrained
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    for teacher in (ClipTeacher(), DinoTeacher()):
        with pytest.raises(
            SetupError, match=r"the weights of vit_base.* cannot be fetched: no route to host"
        ):
            teacher.open(14)


def dino(seed=0, **settings):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(
        embed_dim=64, depth=2, num_heads=1, img_size=32, num_classes=0, **settings
    ).state_dict()


def prefixed(state, prefix, **heads):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()} | heads


HEAD = {"head.mlp.0.weight": torch.zeros(2, 2), "head.last_layer.weight_g": torch.zeros(2, 1)}
LAYOUTS = {
    "backbone": lambda state: state,
    "prefixed": lambda state: prefixed(state, "backbone.", **HEAD),
    "module": lambda state: prefixed(
        state, "module.backbone.", **{f"module.{k}": v for k, v in HEAD.items()}
    ),
    "training": lambda state: {
        "student": prefixed(dino(1), "module.backbone."),
        "teacher": prefixed(state, "backbone.", **HEAD),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": Namespace(arch="vit_base"),
        "fp16_scaler": None,
    },
    "teacher of DINOv2": lambda state: {
        "teacher": prefixed(state, "backbone.", **{"dino_head.a": HEAD["head.mlp.0.weight"]})
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dinos_files_are_read(tiny, tmp_path, layout):
    teacher = opened(tmp_path, LAYOUTS[layout](dino()), DinoTeacher)
    found = teacher.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in dino().items())


def test_dinov2_with_registers_is_read_in_the_official_layout(tiny, tmp_path):
    draw = torch.Generator().manual_seed(0)
    state = dino(init_values=1.0, patch_size=14)
    state |= {"mask_token": torch.zeros(1, 64), "register_tokens": torch.randn(1, 4, 64, generator=draw)}
    state["pos_embed"] = torch.randn(1, 10, 64, generator=draw)
    state["cls_token"] = torch.randn(1, 1, 64, generator=draw)
    teacher = opened(tmp_path, state, DinoTeacher, model="dinov2-vit-b/14-reg", input_px=42)
    found = teacher.model.state_dict()
    assert torch.equal(found["reg_token"], state["register_tokens"])
    assert torch.equal(found["pos_embed"], state["pos_embed"][:, 1:])
    assert torch.equal(found["cls_token"], state["cls_token"] + state["pos_embed"][:, :1])
    assert teacher(torch.rand(1, 3, 42, 42)).shape == (1, 4, 64)


def test_a_dino_that_lacks_a_tensor_is_refused(tiny, tmp_path):
    state = dino()
    del state["norm.weight"]
    with pytest.raises(DataError, match=r"not those of this VisionTransformer: missing: norm.weight\."):
        opened(tmp_path, state, DinoTeacher)


def test_a_checkpoint_without_a_teacher_is_refused(tiny, tmp_path):
    with pytest.raises(DataError, match="no tensors inside; found dict with the keys student, epoch"):
        opened(tmp_path, {"student": {}, "epoch": 3}, DinoTeacher)


def test_dinos_positions_are_resampled(tiny, tmp_path):
    teacher = opened(tmp_path, dino(), DinoTeacher, input_px=64)
    assert teacher(torch.rand(1, 3, 64, 64)).shape == (1, 4, 64)
    assert teacher.model.pos_embed.shape == (1, 17, 64)


def test_a_size_that_is_no_multiple_of_the_patch_is_named(tiny):
    with pytest.raises(UserError, match=r"patches of 14 x 14 px, input_px = 32 is no multiple of that"):
        DinoTeacher(model="dinov2-vit-b/14", weights="random", input_px=32).open(2)
