"""timm's models and ours give the same outputs for the same weights.

Reference: the installed timm (1.0.31 when this was written), models of small sizes built here, all parameters
random. Tolerance 2e-5 absolute in fp32: the sums run in another order. Tables of relative positions are not
compared at another size: timm resamples them linearly, unilm and beitctl with cubic splines.
"""

import pytest
import timm
import torch
from timm.models.vision_transformer import checkpoint_filter_fn

from beitctl.checkpoints import mapping
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.loading import load_model, read_model
from beitctl.checkpoints.timm import BEIT, BEIT3, VIT
from beitctl.model.multiway import Multiway

TOLERANCE = 2e-5
FORMATS = {"beit": BEIT, "beitv2": BEIT, "beit3": BEIT3, "vit": VIT, "deit": VIT}
SMALL = {"img_size": 48, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 23}
MEAN = {"global_pool": "avg"}
TOKEN = {"global_pool": "token", "use_fc_norm": False}
ABSOLUTE = {"use_abs_pos_emb": True, "use_rel_pos_bias": False}
SHARED = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}
OTHER = {
    "embed_dim": 40,
    "depth": 3,
    "num_heads": 5,
    "mlp_ratio": 3,
    "patch_size": 8,
    "num_classes": 7,
}
MODELS = {
    "beit, mean patch": ("beit_base_patch16_224", MEAN),
    "beit, class token": ("beit_base_patch16_224", TOKEN),
    "beit, other sizes": ("beit_base_patch16_224", OTHER),
    "beit, 32 x 48": ("beit_base_patch16_224", {"img_size": (32, 48)}),
    "beit, learned positions": ("beit_base_patch16_224", ABSOLUTE),
    "beit, learned positions, 32 x 48": ("beit_base_patch16_224", ABSOLUTE | {"img_size": (32, 48)}),
    "beit, one table": ("beit_base_patch16_224", SHARED),
    "beit, no layer scale": ("beit_base_patch16_224", {"init_values": None}),
    "beit v2": ("beitv2_base_patch16_224", {}),
    "beit 3": ("beit3_base_patch16_224", {}),
    "beit 3, other sizes": ("beit3_base_patch16_224", OTHER),
    "beit 3, class token": ("beit3_base_patch16_224", {"global_pool": "token"}),
    "beit 3, 48 x 32": ("beit3_base_patch16_224", {"img_size": (48, 32)}),
    "vit": ("vit_base_patch16_224", {}),
    "vit, other sizes": ("vit_base_patch16_224", OTHER),
    "vit, one channel": ("vit_base_patch16_224", {"in_chans": 1}),
    "vit, mean patch": ("vit_base_patch16_224", MEAN),
    "vit, layer scale": ("vit_base_patch16_224", {"init_values": 0.1}),
    "vit, 32 x 48": ("vit_base_patch16_224", {"img_size": (32, 48)}),
    "deit": ("deit_small_patch16_224", {}),
    "deit, distilled": ("deit_small_distilled_patch16_224", {}),
    "deit, distilled, 32 x 48": ("deit_small_distilled_patch16_224", {"img_size": (32, 48)}),
}


def built(name, **changes):
    """A timm model in eval mode, all parameters random: gains and scales around one, the rest around zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | changes)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            scale = "gamma" in key or ("norm" in key and key.endswith("weight"))
            parameter.normal_(1.0 if scale else 0.0, 0.1)
    return model


def saved(model, folder):
    """The model as timm saves it for the Hub: weights and ``config.json``."""
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


def pictures(model):
    return torch.randn(3, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


def difference(found, expected):
    return (found - expected).abs().max().item()


@pytest.fixture(params=MODELS)
def theirs(request):
    name, changes = MODELS[request.param]
    return built(name, **changes)


def test_logits_equal(theirs, tmp_path):
    ours = load_model(saved(theirs, tmp_path))
    x = pictures(theirs)
    assert difference(ours(x), theirs(x)) < TOLERANCE


def test_a_file_is_written_back_bit_for_bit(theirs, tmp_path):
    official = read_tensors(saved(theirs, tmp_path))
    stored = read_model(tmp_path)
    form = FORMATS[theirs.pretrained_cfg["architecture"].split("_")[0]]
    table = form.table(stored.model, {name: value.shape for name, value in stored.tensors.items()})
    written = mapping.write(table, stored.tensors, stored.unread)
    assert sorted(written) == sorted(official)
    assert all(torch.equal(written[name], value) for name, value in official.items())
    assert mapping.untold(table, stored.tensors) == []


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beit3_base_patch16_224", "vit_base_patch16_224"])
def test_logits_equal_where_tokens_are_as_small_as_the_epsilon_of_a_norm(name, tmp_path):
    theirs = built(name)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter.mul_(1.0 if key.startswith(("blocks", "fc_norm", "norm", "head")) else 1e-4)
    ours = load_model(saved(theirs, tmp_path))
    x = pictures(theirs)
    assert difference(ours(x), theirs(x)) < TOLERANCE


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beit3_base_patch16_224", "vit_base_patch16_224"])
@pytest.mark.parametrize("pooling", ["avg", "token"])
def test_features_of_a_file_without_classifier_equal(name, pooling, tmp_path):
    theirs = built(name, num_classes=0, global_pool=pooling)
    ours = load_model(saved(theirs, tmp_path))
    x = pictures(theirs)
    assert isinstance(ours, Multiway)
    assert difference(ours(x), theirs.forward_features(x)) < TOLERANCE


def test_the_norm_of_a_mean_patch_without_classifier_is_kept_for_the_way_back(tmp_path):
    official = read_tensors(saved(built("beit3_base_patch16_224", num_classes=0), tmp_path))
    stored = read_model(tmp_path)
    table = BEIT3.table(stored.model, {name: value.shape for name, value in stored.tensors.items()})
    written = mapping.write(table, stored.tensors, stored.unread)
    assert set(stored.unread) == {"fc_norm.weight", "fc_norm.bias"}
    assert sorted(written) == sorted(official)
    assert all(torch.equal(written[name], value) for name, value in official.items())


def test_distilled_features_without_classifier_equal(tmp_path):
    theirs = built("deit_small_distilled_patch16_224", num_classes=0)
    ours = load_model(saved(theirs, tmp_path))
    x = pictures(theirs)
    assert difference(ours(x), theirs.forward_features(x)) < TOLERANCE


def test_both_heads_of_deit_equal(tmp_path):
    theirs = built("deit_small_distilled_patch16_224")
    ours = load_model(saved(theirs, tmp_path))
    x = pictures(theirs)
    by_class, by_teacher = ours.heads["classifier"].both(ours.model(x))
    features = theirs.forward_features(x)
    assert difference(by_class, theirs.head(features[:, 0])) < TOLERANCE
    assert difference(by_teacher, theirs.head_dist(features[:, 1])) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "deit_small_distilled_patch16_224", "beit3_base_patch16_224"]
)
@pytest.mark.parametrize("size", [96, 32, (64, 48)])
def test_learned_positions_of_another_size_equal_bicubic_resampling(name, size, tmp_path):
    small, large = built(name), built(name, img_size=size)
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large, antialias=False))
    ours = load_model(saved(small, tmp_path), image_px=size)
    x = pictures(large)
    assert difference(ours(x), large(x)) < TOLERANCE


@pytest.mark.parametrize("size", [32, 96, (64, 48)])
def test_tables_of_another_size_give_finite_logits(size, tmp_path):
    ours = load_model(saved(built("beit_base_patch16_224"), tmp_path), image_px=size)
    logits = ours(torch.randn(2, 3, *ours.model.config.size))
    assert logits.shape == (2, 23)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_base_patch16_224"])
def test_the_same_size_changes_nothing(name, tmp_path):
    saved(built(name), tmp_path)
    before, after = load_model(tmp_path).state_dict(), load_model(tmp_path, image_px=48).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
