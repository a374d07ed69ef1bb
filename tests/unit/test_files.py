"""Weight files of other people: what is read, and how."""

import argparse
import json
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weight_files import FORMATS, equal, refused, saved, state

from beitctl.checkpoints.files import FOLDER, read_tensors
from beitctl.errors import DataError


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.ckpt", "w.pkl"])
@pytest.mark.parametrize("form", FORMATS)
def test_what_torch_saved_is_read(tmp_path, form, name):
    assert equal(read_tensors(saved(tmp_path / name, state(), form)), state())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_every_pickle_protocol_is_read(tmp_path, form, protocol):
    path = saved(tmp_path / "w.pth", OrderedDict(state()), form, pickle_protocol=protocol)
    assert equal(read_tensors(path), state())


def test_safetensors_are_read(tmp_path):
    save_file(state(), tmp_path / "w.safetensors")
    assert equal(read_tensors(tmp_path / "w.safetensors"), state())


@pytest.mark.parametrize("form", [*FORMATS, "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_tensors_become_fp32(tmp_path, dtype, form):
    tensors, path = {"w": torch.tensor([0.5, -3.0, 1 / 3]).to(dtype)}, tmp_path / f"w.{form}"
    if form == "safetensors":
        save_file(tensors, path)
    else:
        saved(path, tensors, form)
    assert equal(read_tensors(path), {"w": tensors["w"].float()})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.uint16, torch.int8, torch.int32, torch.int64]
)
def test_whole_numbers_stay_as_they_are(tmp_path, dtype, form):
    tensors = {"n": torch.tensor([0, 1, 1]).to(dtype)}
    assert equal(read_tensors(saved(tmp_path / "n.pth", tensors, form)), tensors)


@pytest.mark.parametrize("form", FORMATS)
def test_parameters_views_and_empty_tensors_are_read(tmp_path, form):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"parameter": nn.Parameter(whole), "part": whole[1:, 2], "turned": whole.T, "none": whole[:0]}
    tensors["half"] = nn.Parameter(whole.half())
    tensors["named"] = nn.Parameter(whole.clone())
    tensors["named"].note = "kept as an attribute"
    found = read_tensors(saved(tmp_path / "w.pth", tensors, form))
    assert equal(found, {name: value.detach().float() for name, value in tensors.items()})
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("form", FORMATS)
def test_tied_tensors_stay_tied(tmp_path, form):
    one = torch.randn(3)
    found = read_tensors(saved(tmp_path / "w.pth", {"a": one, "b": one}, form))
    assert found["a"].data_ptr() == found["b"].data_ptr()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state},
        lambda state: {"module": state},
        lambda state: {"state_dict": state, "epoch": 3, "step": torch.tensor(3)},
        lambda state: {"model": {"module": state, "best": 0.5}},
        lambda state: {"state_dict": {"w": torch.ones(1)}, "module": state},
        lambda state: {"module": {"w": torch.ones(1)}, "model": state},
        lambda state: {"model": "beit_base", "state_dict": state},
        lambda state: {"model": {"name": "beit_base"}, "state_dict": state},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_wrappers_are_opened(tmp_path, form, wrap):
    assert equal(read_tensors(saved(tmp_path / "w.pth", wrap(state()), form)), state())


def test_a_prefix_that_not_all_names_have_stays(tmp_path):
    tensors = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert equal(read_tensors(saved(tmp_path / "w.pth", tensors)), tensors)


def test_the_prefix_is_taken_off_safetensors_too(tmp_path):
    save_file({"module.a": torch.ones(1)}, tmp_path / "w.safetensors")
    assert list(read_tensors(tmp_path / "w.safetensors")) == ["a"]


@pytest.mark.parametrize("form", FORMATS)
def test_what_training_code_keeps_beside_the_weights_is_no_obstacle(tmp_path, form):
    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(1, 3)).sum().backward()
    optimizer.step()
    lists = defaultdict(list)
    lists["loss"].append(0.5)
    tree = {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "_growth_tracker": 0},
        "args": argparse.Namespace(data_path=Path("/data"), device=torch.device("cpu"), window=(14, 14)),
        "numbers": [np.float64(0.5), np.int64(3), np.arange(3.0), np.dtype("int8"), np.array(["a", "b"])],
        "collections": [lists, Counter("aab"), deque([1, 2], 5), {1, 2}, frozenset("a"), b"bytes"],
        "others": [PurePosixPath("a"), torch.Size((1, 2)), torch.float16, 1j, bytearray(b"a")],
    }
    assert equal(read_tensors(saved(tmp_path / "w.pth", tree, form)), module.state_dict())


def test_what_is_beside_the_weights_is_not_even_read(tmp_path):
    saved(tmp_path / "w.pth", {"model": {"a": torch.ones(2)}, "optimizer": {"b": torch.zeros(3)}})
    with zipfile.ZipFile(tmp_path / "w.pth") as full, zipfile.ZipFile(tmp_path / "less.pth", "w") as less:
        for name in full.namelist():
            if not name.endswith("/data/1"):
                less.writestr(name, full.read(name))
    assert equal(read_tensors(tmp_path / "less.pth"), {"a": torch.ones(2)})


@pytest.fixture
def sharded(tmp_path):
    """``sharded(**changes)``: a model in two shards, with changes to what the index says."""

    def make(**changes):
        places = {
            "table": "model-1.safetensors",
            "scale": "model-2.safetensors",
            "index": "model-2.safetensors",
        }
        for file in set(places.values()):
            save_file({n: state()[n] for n, place in places.items() if place == file}, tmp_path / file)
        places = {name: place for name, place in (places | changes).items() if place}
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 100}, "weight_map": places}))
        return index

    return make


def test_shards_are_put_together(sharded):
    assert equal(read_tensors(sharded()), state())


def test_a_missing_shard_is_an_error(sharded):
    index = sharded()
    (index.parent / "model-2.safetensors").unlink()
    with pytest.raises(DataError, match=r"model-2.safetensors: no such file or folder"):
        read_tensors(index)


def test_a_shard_that_lacks_a_tensor_is_an_error(sharded):
    with pytest.raises(
        DataError, match=r"model-1.safetensors: not what model.safetensors.index.json lists: more is"
    ):
        read_tensors(sharded(more="model-1.safetensors"))


def test_a_shard_with_a_tensor_more_is_an_error(sharded):
    with pytest.raises(DataError, match=r"model-2.safetensors: .* lists: scale is not in the index"):
        read_tensors(sharded(scale=None))


@pytest.mark.parametrize("place", ["../w.safetensors", "/etc/passwd", "sub/w.safetensors"])
def test_a_shard_outside_of_the_folder_is_not_read(sharded, place):
    assert f"FILE: names files outside of its folder: {place}; they are not read" in refused(
        sharded(table=place)
    )


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_an_index_of_another_kind_is_an_error(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert "FILE: not an index of shards (" in refused(index)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file_is_read(tmp_path, name):
    save_file(state(), tmp_path / name) if name == FOLDER[0] else saved(tmp_path / name, state())
    assert equal(read_tensors(tmp_path), state())


def test_a_folder_of_shards_is_read(sharded):
    assert equal(read_tensors(sharded().parent), state())


def test_a_folder_of_torch_shards_is_read(tmp_path):
    saved(tmp_path / "a.bin", state())
    index = {"weight_map": dict.fromkeys(state(), "a.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert equal(read_tensors(tmp_path), state())


def test_safetensors_come_first_in_a_folder(tmp_path):
    save_file({"first": torch.ones(1)}, tmp_path / "model.safetensors")
    saved(tmp_path / "pytorch_model.bin", {"second": torch.ones(1)})
    assert list(read_tensors(tmp_path)) == ["first"]


def test_a_folder_without_weights_is_an_error(tmp_path):
    saved(tmp_path / "other.pth", state())
    assert refused(tmp_path) == (
        "FILE: no weights in this folder; expected one of model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin, pytorch_model.bin.index.json, or name a file"
    )
