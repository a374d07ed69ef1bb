"""Our own models, and the files that ``load_model`` reads, as teachers."""

from dataclasses import replace

import pytest
import torch
from model_files import BEIT, file, native, official
from small import MODEL, weights

from beitctl.checkpoints.loading import load_model
from beitctl.errors import DataError, UserError
from beitctl.model.multiway import Multiway
from beitctl_plugins.teachers.own import OwnTeacher

PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DEEP = replace(MODEL, layers=3)


def saved(folder, config=DEEP):
    return native(folder, config, weights(Multiway(config), "model.", config))


def opened(path, grid=4, **settings):
    return OwnTeacher(path=str(path), **{"input_px": 16} | settings).open(grid)


@pytest.mark.parametrize("config", [DEEP, BEIT, replace(DEEP, attention="decoupled")])
def test_the_patches_of_the_model_are_the_features(tmp_path, config):
    path = saved(tmp_path, config)
    with torch.no_grad():
        expected = load_model(path)(image=PICTURES * 2 - 1)[:, 1:]
    assert torch.allclose(opened(path)(PICTURES), expected, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_features_of_some_blocks_have_no_norm(tmp_path, blocks):
    path = saved(tmp_path)
    with torch.no_grad():
        expected = load_model(path).patches(PICTURES * 2 - 1, blocks)
        final = load_model(path).patches(PICTURES * 2 - 1)
    found = opened(path, blocks=blocks)(PICTURES)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, final, atol=1e-2)


def test_pictures_are_normalised_as_the_model_was_trained(tmp_path):
    path = saved(tmp_path, replace(DEEP, pixels="imagenet"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = load_model(path).patches((PICTURES - mean[:, None, None]) / std[:, None, None])
    assert torch.allclose(opened(path)(PICTURES), expected, atol=1e-5)


def test_both_class_tokens_of_a_deit_are_dropped(tmp_path):
    path = saved(tmp_path, replace(DEEP, distill_token=True))
    with torch.no_grad():
        expected = load_model(path)(image=PICTURES * 2 - 1)[:, 2:]
    assert torch.allclose(opened(path)(PICTURES), expected, atol=1e-6)


def test_a_classifier_is_read_without_its_head(tmp_path):
    native(tmp_path)
    with torch.no_grad():
        expected = load_model(tmp_path).model.patches(PICTURES * 2 - 1)
    assert torch.allclose(opened(tmp_path)(PICTURES), expected, atol=1e-6)


def test_an_official_file_is_a_teacher(tmp_path):
    path = file(tmp_path, {"model": official()})
    with torch.no_grad():
        expected = load_model(path).model.patches(PICTURES * 2 - 1)
    assert torch.allclose(opened(path)(PICTURES), expected, atol=1e-6)


def test_positions_are_resampled_to_the_size_that_is_asked_for(tmp_path):
    teacher = opened(saved(tmp_path), grid=6, input_px=24)
    assert teacher(torch.rand(1, 3, 24, 24)).shape == (1, 36, DEEP.width)


def test_features_are_resampled_to_the_patch_grid(tmp_path):
    assert opened(saved(tmp_path), grid=7)(PICTURES).shape == (2, 49, DEEP.width)


def test_a_block_that_the_model_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match="has 3 blocks, blocks = 4 is beyond them"):
        opened(saved(tmp_path), blocks=4)


def test_a_model_of_other_channels_is_refused(tmp_path):
    with pytest.raises(UserError, match="reads pictures of 1 channels; a teacher sees 3"):
        opened(saved(tmp_path, replace(DEEP, channels=1)))


def test_a_size_that_is_no_multiple_of_the_patch_is_named(tmp_path):
    with pytest.raises(UserError, match=r"image_px \(18\) must be a multiple of patch_px \(4\)"):
        opened(saved(tmp_path), input_px=18)


def test_the_size_has_one_name(tmp_path):
    with pytest.raises(UserError, match=r"is input_px, not settings.image_px"):
        opened(saved(tmp_path), settings={"image_px": 16})


def test_a_file_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"model.pth: not a model of this family"):
        opened(file(tmp_path, {"weight": torch.zeros(2, 2)}))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tensors = weights(Multiway(DEEP), "model.", DEEP)
    tensors["model.norm.shared.weight"][0] = float("nan")
    with pytest.raises(DataError, match="finite"):
        opened(native(tmp_path, DEEP, tensors))
