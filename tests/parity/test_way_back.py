"""Official file -> ours -> official gives every bit again, straight and through our own files."""

from pathlib import Path

import pytest
import torch

from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.formats import FORMATS
from beitctl.checkpoints.loading import load_model, read_model, state_in
from beitctl.checkpoints.native import save_model
from beitctl.errors import UserError

FOLDER = Path(__file__).parents[3] / "shared" / "reference"
MODELS = {
    "beit12/beit_mim.pth": "unilm BEiT",
    "beit12/beit_classification.pth": "unilm BEiT",
    "beit12/beit2_mim.pth": "unilm BEiT",
    "vlmo/vlmo.pth": "unilm VLMo",
    "beit3/beit3_retrieval.pth": "unilm BEiT-3",
    "beit3/beit3_vqa.pth": "unilm BEiT-3",
    "beit3/beit3_nlvr2.pth": "unilm BEiT-3",
    "beit3/beit3_classification.pth": "unilm BEiT-3",
    "beit3/beit3_captioning.pth": "unilm BEiT-3",
}
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)


def same(found, official):
    assert set(found) == set(official)
    assert [name for name in official if not torch.equal(found[name], official[name])] == []


@pytest.mark.parametrize(("file", "form"), MODELS.items())
def test_an_official_file_comes_back(file, form):
    same(state_in(read_model(FOLDER / file, {"heads": 4}), form), read_tensors(FOLDER / file))


@pytest.mark.parametrize(("file", "form"), MODELS.items())
def test_an_official_file_comes_back_out_of_our_own(file, form, tmp_path):
    stored = read_model(FOLDER / file, {"heads": 4})
    save_model(tmp_path, stored.tensors, stored.model, unread=stored.unread)
    same(state_in(read_model(tmp_path), form), read_tensors(FOLDER / file))
    load_model(tmp_path)


def test_every_format_has_its_own_name():
    assert len({form.name for form in FORMATS}) == len(FORMATS)


def test_a_format_without_a_place_for_a_tensor_says_so():
    stored = read_model(FOLDER / "beit3/beit3_retrieval.pth", {"heads": 4})
    with pytest.raises(UserError, match=r"unilm BEiT has no place for \d+ tensors: heads.contrastive"):
        state_in(stored, "unilm BEiT")


def test_a_format_that_does_not_exist_is_named():
    stored = read_model(FOLDER / "beit12/beit_mim.pth")
    with pytest.raises(UserError, match="no format 'onnx'; there are unilm BEiT-3, unilm VLMo"):
        state_in(stored, "onnx")
