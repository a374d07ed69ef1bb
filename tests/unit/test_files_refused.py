"""Weight files of other people: what is refused, and why."""

import argparse
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from weight_files import FORMATS, equal, refused, saved, state, written

from beitctl.checkpoints import pickled
from beitctl.checkpoints.files import read_tensors


class Evil:
    """Would create a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Harmless:
    """A class that comes with the code that wrote the file."""


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_with_code_is_refused_and_its_code_does_not_run(tmp_path, form, protocol):
    trap = tmp_path / "trap"
    path = saved(tmp_path / "w.pth", {"model": state(), "args": Evil(trap)}, form, pickle_protocol=protocol)
    message = refused(path)
    assert not trap.exists()
    assert message.startswith("FILE: refused, because it wants ")
    assert "Only tensors are ever read, and no code that a file names is run" in message
    assert (
        "safetensors.torch.save_file(model.state_dict(), ...) or torch.save(model.state_dict(), ...)"
        in message
    )
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap works"


def test_a_bare_pickle_with_code_is_refused(tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "trap")))
    assert "it wants pathlib.Path.touch. Only" in refused(tmp_path / "w.pkl")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "builtins.eval", "__builtin__.exec", "builtins.getattr", "torch.load", "torch.hub.load",
        "torch._utils._import_dotted_name", "numpy.load", "functools.partial", "operator.attrgetter",
        "__torch__.Net", "timm.models.beit.Beit", "torch.nn.modules.linear.Linear", "argparse.ArgumentParser",
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", FORMATS)
def test_any_name_that_tensors_do_not_need_is_refused_by_name(tmp_path, form, name):
    module, _, attribute = name.rpartition(".")
    path = written(tmp_path / "w.pth", f"\x80\x02c{module}\n{attribute}\n.".encode("latin1"), form)
    assert f"it wants {name.replace('__builtin__', 'builtins')}. Only" in refused(path)


def test_a_part_of_an_allowed_class_is_refused(tmp_path):
    path = written(tmp_path / "w.pth", b"\x80\x04\x8c\x08argparse\x8c\x12Namespace.__init__\x93.")
    assert "it wants argparse.Namespace.__init__" in refused(path)


def test_a_whole_module_is_refused_by_its_class(tmp_path):
    assert "it wants torch.nn.modules.linear.Linear" in refused(saved(tmp_path / "w.pth", nn.Linear(2, 2)))


def test_a_class_of_the_code_that_wrote_the_file_is_refused(tmp_path):
    path = saved(tmp_path / "w.pth", {"model": state(), "config": Harmless()})
    assert f"it wants {__name__}.Harmless" in refused(path)


def changing(target):
    """A pickle that sets attributes of a class, both ways that there are: in its dict, and with setattr."""
    change = b"}X\x01\x00\x00\x00xK\x01s"
    return [b"\x80\x02c" + target + change + b"b.", b"\x80\x02c" + target + b"N" + change + b"\x86b."]


@pytest.mark.parametrize(
    "name",
    [
        b"argparse\nNamespace\n", b"collections\nOrderedDict\n", b"collections\ndeque\n", b"builtins\nset\n",
        b"torch\nFloatStorage\n", b"torch._utils\n_rebuild_tensor_v2\n",
        b"torch._utils\n_rebuild_parameter\n", b"torch._utils\n_rebuild_sparse_tensor\n",
        b"torch._tensor\n_rebuild_from_type_v2\n",
        b"dall_e.encoder\nEncoder\n",
    ],
)  # fmt: skip
def test_a_file_cannot_change_what_it_names(tmp_path, name):
    for tree in changing(name):
        assert "FILE: " in refused(written(tmp_path / "w.pth", tree))
    assert not any(hasattr(stand_in, "x") for stand_in in pickled.STANDS_FOR.values())


def test_no_real_class_or_function_of_another_library_is_handed_out():
    given = pickled.STANDS_FOR.values()
    real = {repr(item) for item in given if type(item).__name__ not in ("_Sealed", "dtype")}
    assert real == {"<class 'set'>", "<class 'frozenset'>"}


def test_a_missing_file_is_an_error(tmp_path):
    assert refused(tmp_path / "w.pth") == "FILE: no such file or folder"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "model.safetensors.index.json"])
def test_an_empty_file_is_an_error(tmp_path, name):
    (tmp_path / name).touch()
    assert refused(tmp_path / name) == "FILE: the file is empty; download or copy it again"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    assert "FILE: a Git LFS pointer, not the weights; run 'git lfs pull'" in refused(tmp_path / name)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_cut_short_is_an_error(tmp_path, form, share):
    path = saved(tmp_path / "w.pth", {"a": torch.randn(100), "b": torch.randn(100)}, form)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    message = refused(path)
    assert message.startswith("FILE: cannot be read as a file of torch.save (")
    assert message.endswith("it may be cut short or of another kind: download or copy it again")


@pytest.mark.parametrize("lost", [1, 400, 407, 408, 409, 412])
def test_a_stream_that_ends_within_its_tensors_is_an_error(tmp_path, lost):
    path = saved(tmp_path / "w.pth", {"a": torch.randn(100)}, "stream")
    path.write_bytes(path.read_bytes()[:-lost])
    assert "cannot be read as a file of torch.save" in refused(path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_safetensors_that_are_cut_short_are_an_error(tmp_path, share):
    path = tmp_path / "w.safetensors"
    save_file(state(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "FILE: cannot be read as safetensors (" in refused(path)


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html></html>", b"PK\x03\x04 and no more", b"\x80\x02."]
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_of_another_kind_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "it may be cut short or of another kind: download or copy it again" in refused(tmp_path / name)


def test_changed_bytes_are_noticed(tmp_path):
    path = saved(tmp_path / "w.pth", {"a": torch.full((1000,), 0.5)})
    path.write_bytes(path.read_bytes().replace(b"\x00\x00\x00\x3f" * 3, b"\x00\x00\x10\x3f" * 3, 1))
    assert "FILE: a cannot be read (BadZipFile: Bad CRC-32 for file" in refused(path)


class Claim:
    """Pickled as a tensor of another size than its storage has."""

    def __init__(self, size, offset):
        self.storage, self.size, self.offset = torch.ones(4).untyped_storage(), size, offset

    def __reduce__(self):
        arguments = (self.storage, self.offset, self.size, (1,), False, {}, torch.float32)
        return torch._utils._rebuild_tensor_v3, arguments


@pytest.mark.parametrize(("size", "offset"), [((5,), 0), ((4,), 1), ((-1,), 0), ((4,), -1), ("four", 0)])
@pytest.mark.parametrize("form", FORMATS)
def test_a_tensor_larger_than_its_bytes_is_an_error(tmp_path, form, size, offset):
    assert "FILE: w cannot be read (" in refused(saved(tmp_path / "w.pth", {"w": Claim(size, offset)}, form))


def test_fewer_bytes_than_a_tensor_needs_are_an_error(tmp_path):
    saved(tmp_path / "w.pth", {"w": torch.ones(4)})
    with zipfile.ZipFile(tmp_path / "w.pth") as full, zipfile.ZipFile(tmp_path / "less.pth", "w") as less:
        for name in full.namelist():
            less.writestr(name, full.read(name)[:12] if name.endswith("/data/0") else full.read(name))
    assert "FILE: w cannot be read (ValueError: only 12 bytes are there)" in refused(tmp_path / "less.pth")


def test_a_tensor_of_exactly_its_bytes_is_read(tmp_path):
    assert equal(read_tensors(saved(tmp_path / "w.pth", {"w": Claim((4,), 0)})), {"w": torch.ones(4)})


def test_bytes_of_another_machine_are_an_error(tmp_path):
    tree = pickle.dumps({}, 2)
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("archive/data.pkl", tree)
        archive.writestr("archive/byteorder", "big")
    message = refused(tmp_path / "w.pth")
    assert message == "FILE: written on a big-endian machine; save it with safetensors there"


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ([1, 2], "found list. Expected"),
        (3, "found int. Expected"),
        (torch.ones(2), "found tensor. Expected"),
        ({"epoch": 3, "args": {}}, "found dict with the keys epoch, args. Expected"),
        ({"model": {}, "state_dict": {"a": 1}}, "found dict with the keys model, state_dict. Expected"),
    ],
)
def test_a_file_without_tensors_is_an_error(tmp_path, tree, found):
    message = refused(saved(tmp_path / "w.pth", tree))
    assert message.startswith("FILE: no tensors inside; " + found)
    assert message.endswith("a state dict, alone or under one of model, module, state_dict")


def test_a_wrapper_that_holds_itself_is_an_error(tmp_path):
    tree = {}
    tree["model"] = tree["module"] = tree
    assert "no tensors inside" in refused(saved(tmp_path / "w.pth", tree))


def test_what_is_no_tensor_in_a_state_dict_is_listed(tmp_path):
    tree = {
        "model": {**state(), "epoch": 3, "args": argparse.Namespace(), 7: torch.ones(1), "more": {"a": 1}}
    }
    message = refused(saved(tmp_path / "w.pth", tree))
    assert (
        "holds more than tensors with names: epoch (int), args (object), 7 (tensor), more (dict)" in message
    )


def test_a_long_list_is_cut(tmp_path):
    tree = {"w": torch.ones(1)} | {f"n{number}": number for number in range(13)}
    assert "n9 (int) and 3 more; save it again without" in refused(saved(tmp_path / "w.pth", tree))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "w is sparse"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "w is quantised"),
        (lambda: torch.ones(3, device="meta"), "w is on the meta device, without values"),
        (lambda: torch.ones(3, dtype=torch.complex64), "w is torch.complex64"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "w is torch.float8_e4m3fn"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "w is conjugated"),
    ],
)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_tensors_of_other_kinds_are_an_error(tmp_path, form, make, kind):
    message = refused(saved(tmp_path / "w.pth", {"a": torch.ones(1), "w": make()}, form))
    assert f"FILE: tensors of kinds that are not read: {kind}. Save them as dense fp32" in message


def test_other_kinds_in_safetensors_are_an_error(tmp_path):
    save_file({"w": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "w.safetensors")
    assert "not read: w is torch.float8_e4m3fn" in refused(tmp_path / "w.safetensors")


def test_a_file_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    path = saved(tmp_path / "w.pth", state())

    def forbidden(self, *mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert "FILE: cannot be read ([Errno 13] Permission denied)" in refused(path)
