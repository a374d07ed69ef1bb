"""Checkpoints under faults: the newest whole one is used, or an error says why there is none."""

import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from saved import Kept, bits, blank, tensors_of

from beitctl.engine.saving.dcp import some
from beitctl.errors import DataError, UserError


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "checkpoints")


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def test_an_empty_folder_has_no_newest(kept):
    assert kept.checkpoints.newest() is None


def test_loading_restores_every_bit(kept):
    kept.save(4)
    tensors = blank()
    kept.checkpoints.load(kept.checkpoints.newest(), tensors)
    assert bits(tensors) == bits(tensors_of(4))


def test_loading_is_in_place(kept):
    kept.save(4)
    tensors = blank()
    storage = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    kept.checkpoints.load(kept.checkpoints.newest(), tensors)
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == storage


def test_the_newest_has_its_step_path_and_meta(kept):
    kept.save(9, 10)
    found = kept.checkpoints.newest()
    assert (found.step, found.path.name, found.meta) == (10, "step-00000010", {"identity": "run-10"})


def test_only_as_many_as_asked_for_are_kept(tmp_path):
    kept = Kept(tmp_path, keep=2).save(1, 2, 3, 4)
    assert kept.names() == ["step-00000003", "step-00000004"]


def test_at_least_one_is_kept(tmp_path):
    assert Kept(tmp_path, keep=0).save(1, 2).names() == ["step-00000002"]


def test_drafts_and_corrupt_ones_do_not_count_as_kept(tmp_path):
    kept = Kept(tmp_path, keep=2).save(1, 2)
    flip(tmp_path / "step-00000002" / ".metadata")
    assert kept.checkpoints.newest().step == 1
    assert kept.save(3).names() == ["step-00000001", "step-00000002.corrupt", "step-00000003"]


def test_one_that_cannot_be_deleted_is_warned_about(tmp_path, monkeypatch):
    kept = Kept(tmp_path, keep=1).save(1)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    kept.save(2)
    assert len(kept.warnings) == 1
    assert "no longer needed but cannot be deleted: busy" in kept.warnings[0]


def refuse(path, ignore_errors=False):
    raise OSError(16, "busy")


def test_a_second_run_in_the_folder_is_refused(kept):
    kept.save(8)
    with pytest.raises(
        UserError, match="already holds step-00000008, so step 5 of another run cannot be saved"
    ):
        kept.save(5)


DAMAGES = {
    "a flipped bit in a shard": lambda path: flip(path / "__0_0.distcp"),
    "a flipped bit in the index": lambda path: flip(path / ".metadata"),
    "a truncated shard": lambda path: truncate(path / "__0_0.distcp"),
    "a truncated index": lambda path: truncate(path / ".metadata"),
    "a truncated manifest": lambda path: truncate(path / "manifest.json"),
    "an empty manifest": lambda path: os.truncate(path / "manifest.json", 0),
    "a lost shard": lambda path: (path / "__0_0.distcp").unlink(),
    "a lost index": lambda path: (path / ".metadata").unlink(),
    "a lost manifest": lambda path: (path / "manifest.json").unlink(),
    "a manifest that is a list": lambda path: (path / "manifest.json").write_text("[]"),
}


@pytest.mark.fault(2)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(kept, damage):
    kept.save(1, 2)
    damage(kept.folder / "step-00000002")
    found = kept.checkpoints.newest()
    assert (found.step, kept.names()) == (1, ["step-00000001", "step-00000002.corrupt"])
    assert len(kept.warnings) == 1
    assert kept.warnings[0].endswith("; renamed step-00000002.corrupt")


@pytest.mark.fault(2)
@pytest.mark.parametrize("part", range(20))
def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(kept, part):
    kept.save(1, 2)
    flip(kept.folder / "step-00000002" / "manifest.json", part / 20)
    assert kept.checkpoints.newest().step == 1


def test_a_checkpoint_under_the_name_of_another_step_is_set_aside(kept):
    kept.save(1)
    shutil.copytree(kept.folder / "step-00000001", kept.folder / "step-00000007")
    assert kept.checkpoints.newest().step == 1
    assert "it is not that of step 7" in kept.warnings[0]


@pytest.mark.fault(2)
def test_warnings_name_the_file_and_what_is_wrong_with_it(kept):
    kept.save(1, 2, 3)
    truncate(kept.folder / "step-00000003" / "__0_0.distcp")
    flip(kept.folder / "step-00000002" / "__0_0.distcp")
    assert kept.checkpoints.newest().step == 1
    assert "step-00000003/__0_0.distcp has" in kept.warnings[0]
    assert "bytes instead of" in kept.warnings[0]
    assert (
        "step-00000002/__0_0.distcp was changed: its sha256 is not that of the manifest" in kept.warnings[1]
    )


@pytest.mark.fault(2)
def test_training_goes_on_from_the_step_before_the_damaged_one(kept):
    kept.save(1, 2)
    flip(kept.folder / "step-00000002" / "__0_0.distcp")
    assert kept.checkpoints.newest().step == 1
    assert kept.save(2).checkpoints.newest().step == 2


@pytest.mark.fault(2)
def test_a_second_damaged_one_of_the_same_step_replaces_the_first(kept):
    kept.save(1, 2)
    for _ in range(2):
        flip(kept.folder / "step-00000002" / "__0_0.distcp")
        assert kept.checkpoints.newest().step == 1
        kept.save(2)
    assert kept.names() == ["step-00000001", "step-00000002", "step-00000002.corrupt"]


@pytest.mark.fault(2)
def test_when_none_is_whole_the_run_does_not_silently_start_anew(kept):
    kept.save(1)
    flip(kept.folder / "step-00000001" / "__0_0.distcp")
    for _ in range(2):  # also when it was set aside by an earlier try
        with pytest.raises(
            DataError, match=r"no checkpoint is whole, found step-00000001.corrupt; restore one"
        ):
            kept.checkpoints.newest()


def test_a_damaged_one_that_cannot_be_renamed_is_passed_over(kept, monkeypatch):
    kept.save(1, 2)
    flip(kept.folder / "step-00000002" / "__0_0.distcp")
    monkeypatch.setattr(Path, "rename", refuse)
    assert kept.checkpoints.newest().step == 1
    assert kept.warnings[0].endswith("; passed over (it cannot be renamed: busy)")


def test_a_draft_is_not_a_checkpoint(kept):
    kept.save(1, 2)
    (kept.folder / "step-00000002").rename(kept.folder / "step-00000002.tmp")
    assert kept.checkpoints.newest().step == 1


def test_saving_clears_drafts_of_earlier_attempts(kept):
    (kept.folder / "step-00000002.tmp").mkdir(parents=True)
    (kept.folder / "step-00000001.tmp").mkdir()
    assert kept.save(2).names() == ["step-00000002"]


def test_a_checkpoint_of_another_format_is_left_alone(kept, monkeypatch):
    monkeypatch.setattr("beitctl.engine.saving.manifest.FORMAT", 2)
    kept.save(1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 2, this beitctl reads 1; install the one that wrote it"):
        kept.checkpoints.newest()
    assert kept.names() == ["step-00000001"]


@pytest.mark.fault(2)
def test_files_that_vanish_after_the_check_are_a_data_error(kept):
    kept.save(1)
    found = kept.checkpoints.newest()
    (found.path / "__0_0.distcp").unlink()
    with pytest.raises(DataError, match=r"changed while it was read .*No such file"):
        kept.checkpoints.load(found, blank())


def load_changed(kept, change):
    kept.save(1)
    tensors = blank()
    change(tensors)
    kept.checkpoints.load(kept.checkpoints.newest(), tensors)


def test_a_tensor_that_the_checkpoint_lacks_is_named(kept):
    with pytest.raises(UserError, match=r"from another recipe: learner.new is missing; use another --out"):
        load_changed(kept, lambda tensors: tensors.update({"learner.new": torch.zeros(1)}))


def test_a_tensor_that_only_the_checkpoint_has_is_named(kept):
    with pytest.raises(UserError, match=r"from another recipe: learner.bias is not part of this run"):
        load_changed(kept, lambda tensors: tensors.pop("learner.bias"))


def test_another_shape_is_named(kept):
    with pytest.raises(
        UserError, match=r"learner.bias is \(5,\) torch.bfloat16 instead of \(6,\) torch.bfloat16"
    ):
        load_changed(kept, lambda tensors: tensors.update({"learner.bias": torch.zeros(6).bfloat16()}))


def test_another_dtype_is_not_cast(kept):
    with pytest.raises(
        UserError, match=r"learner.bias is \(5,\) torch.bfloat16 instead of \(5,\) torch.float32"
    ):
        load_changed(kept, lambda tensors: tensors.update({"learner.bias": torch.zeros(5)}))


def test_nothing_is_loaded_from_another_recipe(kept):
    kept.save(2)
    tensors = {**blank(), "learner.new": torch.zeros(1)}
    with pytest.raises(UserError):
        kept.checkpoints.load(kept.checkpoints.newest(), tensors)
    assert tensors["optimizer.step.weight"] == 1


def test_long_lists_are_cut():
    assert some([str(n) for n in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def with_index(kept, index):
    """A checkpoint found whole, whose index was then replaced."""
    kept.save(1)
    found = kept.checkpoints.newest()
    (found.path / ".metadata").write_bytes(index if isinstance(index, bytes) else pickle.dumps(index))
    return found


def test_code_in_the_index_is_refused_and_not_run(kept, tmp_path):
    found = with_index(kept, Hostile(tmp_path / "pwned"))
    with pytest.raises(
        DataError, match=r"\.metadata names posix.mkdir, .* checkpoints with code are refused"
    ):
        kept.checkpoints.load(found, blank())
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["torch load", "torch.serialization load", "builtins eval", "torch _utils"])
def test_functions_of_admitted_modules_are_refused(kept, name):
    found = with_index(kept, f"c{name.replace(' ', chr(10))}\n.".encode())
    with pytest.raises(DataError, match="checkpoints with code are refused"):
        kept.checkpoints.load(found, blank())


@pytest.mark.parametrize("index", [b"", b"no pickle", b"."])
def test_an_index_that_is_no_pickle_is_a_data_error(kept, index):
    with pytest.raises(
        DataError, match=r"\.metadata cannot be read by torch .*; use the torch that manifest.json names"
    ):
        kept.checkpoints.load(with_index(kept, index), blank())


def test_an_index_that_is_something_else_is_a_data_error(kept):
    with pytest.raises(DataError, match=r"\.metadata describes no checkpoint"):
        kept.checkpoints.load(with_index(kept, {"weights": 1}), blank())


def test_an_index_that_points_outside_its_folder_is_refused(kept):
    kept.save(1)
    index = pickle.loads((kept.folder / "step-00000001" / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../secret"
    found = kept.checkpoints.newest()
    (found.path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(DataError, match=r"holds \.\./secret, which are no tensors of this folder"):
        kept.checkpoints.load(found, blank())


@pytest.fixture
def readable_folder():
    """A folder that this user may read but not write; root gives up its rights meanwhile."""
    folder = Path(tempfile.mkdtemp())
    Kept(folder).save(1)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_a_user_error(readable_folder):
    with pytest.raises(
        UserError, match=r"cannot be used for checkpoints \(Permission denied\); make it readable"
    ):
        Kept(readable_folder).save(2)


def test_a_folder_that_cannot_be_written_can_be_read(readable_folder):
    tensors = blank()
    kept = Kept(readable_folder)
    kept.checkpoints.load(kept.checkpoints.newest(), tensors)
    assert bits(tensors) == bits(tensors_of(1))


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_corrupt(kept, monkeypatch):
    kept.save(1)

    def deny(path, *rest, **more):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(
        UserError, match=r"manifest.json: cannot be used for checkpoints \(Permission denied\)"
    ):
        kept.checkpoints.newest()
    assert kept.names() == ["step-00000001"]
