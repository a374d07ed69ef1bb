"""Checkpoints on a full disk: room is made once, the last whole one stays, and saving goes on later."""

import contextlib
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from saved import Kept, bits, tensors_of

from beitctl.engine.dist import start
from beitctl.engine.saving import dcp
from beitctl.engine.saving.checkpoint import Checkpoints
from beitctl.errors import CapacityError

pytestmark = pytest.mark.fault(3)


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "checkpoints")


@contextlib.contextmanager
def file_limit(size):
    """No file may grow beyond ``size`` here; not longer, because pytest's own output may be a longer file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_for_space_leaves_the_earlier_ones(kept):
    kept.save(1)
    told = pytest.raises(CapacityError, match=r"no space left for a checkpoint \(File too large\); make room")
    with told, file_limit(2000):
        kept.save(2)
    assert (kept.names(), kept.checkpoints.newest().step) == (["step-00000001"], 1)


def test_space_that_ends_inside_a_large_tensor_is_told_as_such(kept):
    told = pytest.raises(CapacityError, match=r"no space left for a checkpoint \(File too large\); make room")
    with told, file_limit(100_000):
        kept.checkpoints.save(2, {"large": torch.zeros(1000, 1000)}, {})


def test_saving_works_again_after_room_was_made(kept):
    with pytest.raises(CapacityError), file_limit(2000):
        kept.save(2)
    assert kept.save(2).checkpoints.newest().step == 2


def test_too_little_disk_is_noticed_before_writing(kept, monkeypatch):
    kept.save(1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**4))
    with pytest.raises(
        CapacityError, match=r"needs 0.00 GB of free disk, there are 0.00 GB; make room, lower keep"
    ):
        kept.save(2)
    assert kept.names() == ["step-00000001"]


def with_limit(size, room_for, write=dcp.write):
    """DCP's write, on a disk that has no more space while it holds more than ``room_for`` checkpoints."""

    def limited(draft, *rest):
        full = len(list(draft.parent.glob("step-????????"))) > room_for
        with file_limit(size) if full else contextlib.nullcontext():
            write(draft, *rest)

    return limited


def test_old_checkpoints_make_room_for_the_next(kept, monkeypatch):
    kept.save(1, 2, 3)
    monkeypatch.setattr(dcp, "write", with_limit(2000, room_for=1))
    assert kept.save(4).names() == ["step-00000003", "step-00000004"]
    assert "the disk is full; step-00000002, step-00000001 deleted to make room" in kept.warnings[0]


def test_old_checkpoints_make_room_for_one_in_the_background(kept, monkeypatch):
    kept.save(1, 2, 3)
    monkeypatch.setattr(dcp, "write", with_limit(2000, room_for=1))
    kept.begin(4)
    kept.settle()
    assert (kept.done, kept.loaded()) == ([4], (4, bits(tensors_of(4))))
    assert "deleted to make room, the last whole checkpoint is that of step 3" in kept.warnings[0]


def test_on_a_disk_that_stays_full_the_last_one_stays_and_training_goes_on(kept, monkeypatch):
    kept.save(1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(dcp, "write", with_limit(2000, room_for=0))
        kept.begin(3)
        kept.settle()
    assert kept.names() == ["step-00000002"]
    assert "NO CHECKPOINT of step 3 was written" in kept.warnings[0]
    assert "no space left for a checkpoint (File too large); make room" in kept.warnings[0]
    kept.begin(4)
    kept.settle()
    assert kept.loaded() == (4, bits(tensors_of(4)))


def test_the_last_whole_one_stays_when_newer_ones_are_damaged(kept, monkeypatch):
    kept.save(1, 2, 3)
    (kept.folder / "step-00000003" / ".metadata").unlink()
    monkeypatch.setattr(dcp, "write", with_limit(2000, room_for=0))
    with pytest.raises(CapacityError):
        kept.save(4)
    assert kept.names() == ["step-00000002", "step-00000003.corrupt"]


def full_on_rank_1(folder):
    """Rank 1 alone has no space while the folder holds more than one checkpoint, then for none."""
    ranks = start()
    warnings, heard = [], []
    checkpoints = Checkpoints(Path(folder), ranks, 3, warnings.append)
    tensors = {"weight": torch.arange(1000.0)}
    for step in (1, 2, 3):
        checkpoints.save(step, tensors, {})
    for step, room_for in ((4, 1), (5, 0)):
        with pytest.MonkeyPatch.context() as patched:
            if ranks.rank == 1:
                patched.setattr(dcp, "write", with_limit(100, room_for))
            try:
                checkpoints.save(step, {**tensors, "own": torch.ones(ranks.world)}, {})
            except CapacityError as error:
                heard.append(str(error))
        ranks.barrier()
        heard.append(sorted(path.name for path in Path(folder).iterdir()))
        ranks.barrier()
    ranks.stop()
    return [warnings, heard]


def test_a_full_disk_of_one_rank_is_room_made_and_tried_again_by_all(on_ranks, tmp_path):
    (told, heard), (untold, same) = on_ranks(full_on_rank_1, 2, tmp_path / "checkpoints")
    first, text, second = heard
    assert first == ["step-00000003", "step-00000004"]
    assert "no space left for a checkpoint (File too large)" in text
    assert second == ["step-00000004"]
    assert (heard, untold) == (same, [])
    assert len(told) == 2
