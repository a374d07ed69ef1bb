"""Checkpoints that are written beside the training: what is saved is the state of the call, or nothing."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import ended, in_a_child
from saved import ALONE, Gate, Kept, bits, tensors_of

from beitctl.engine.dist import start
from beitctl.engine.saving import dcp
from beitctl.engine.saving.pieces import Memory, pieces_of
from beitctl.errors import DivergedError, UserError

pytestmark = pytest.mark.fault(4)


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "checkpoints")


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_what_training_changes_meanwhile_does_not_reach_the_file(kept, gate):
    tensors = tensors_of(5)
    kept.begin(5, tensors)
    assert gate.reached.wait(30)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    gate.open.set()
    kept.settle()
    assert kept.loaded() == (5, bits(tensors_of(5)))


def test_begin_returns_before_anything_is_written(kept, gate):
    kept.begin(5)
    assert gate.reached.wait(30)
    assert (kept.names(), kept.done) == (["step-00000005.tmp"], [])


def test_settling_without_waiting_leaves_one_in_flight_alone(kept, gate):
    kept.begin(5)
    assert gate.reached.wait(30)
    kept.checkpoints.settle()
    assert kept.done == []


def test_a_finished_one_is_reported_by_the_next_settle(kept):
    kept.begin(5)
    limit = time.monotonic() + 30
    while not kept.done and time.monotonic() < limit:
        kept.checkpoints.settle()
    assert (kept.done, kept.names()) == ([5], ["step-00000005"])


def test_each_is_reported_once(kept):
    kept.begin(5)
    for _ in range(3):
        kept.settle()
    assert kept.done == [5]


def test_a_second_one_waits_for_the_first(kept):
    kept.begin(1)
    kept.begin(2)
    assert kept.done == [1]
    kept.settle()
    assert (kept.done, kept.names()) == ([1, 2], ["step-00000001", "step-00000002"])
    assert kept.loaded() == (2, bits(tensors_of(2)))


def test_a_save_of_the_moment_waits_for_one_in_the_background(kept):
    kept.begin(1)
    kept.save(2)
    assert (kept.done, kept.names()) == ([1], ["step-00000001", "step-00000002"])


def test_looking_for_the_newest_waits_for_one_in_the_background(kept):
    kept.begin(1)
    assert kept.checkpoints.newest().step == 1


def fail(*arguments):
    raise OSError(errno.EIO, "Input/output error", "/disk/file")


@pytest.fixture
def failed(kept, monkeypatch):
    """Step 1 is saved, step 2 failed."""
    kept.save(1)
    with monkeypatch.context() as patched:
        patched.setattr(dcp, "write", fail)
        kept.begin(2)
        kept.settle()
    return kept


def test_a_failure_is_a_warning_with_its_reason_and_what_happens_next(failed):
    (text,) = failed.warnings
    assert text.startswith("NO CHECKPOINT of step 2 was written: /disk/file: cannot be used for checkpoints")
    assert "Training goes on; the last whole checkpoint is as it was, and saving is tried again" in text
    assert failed.done == []


def test_a_failure_leaves_the_last_one_and_no_draft(failed):
    assert failed.names() == ["step-00000001"]
    assert failed.loaded() == (1, bits(tensors_of(1)))


def test_after_a_failure_the_next_one_is_saved(failed):
    failed.begin(3)
    failed.settle()
    assert (failed.done, failed.loaded()) == ([3], (3, bits(tensors_of(3))))


def test_an_error_that_nobody_thought_of_is_a_warning_too(kept, monkeypatch):
    monkeypatch.setattr(dcp, "write", lambda *arguments: {}["lost"])
    kept.begin(2)
    kept.settle()
    assert "unexpected error with a checkpoint: KeyError('lost')" in kept.warnings[0]


def test_too_little_host_memory_is_a_warning(kept, monkeypatch):
    def none(*arguments, **more):
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("beitctl.engine.saving.pieces.torch.empty", none)
        kept.begin(1)
    assert "NO CHECKPOINT of step 1 was written: no host memory for a copy" in kept.warnings[0]
    assert "set async_save = false" in kept.warnings[0]
    kept.begin(2)
    kept.settle()
    assert kept.done == [2]


def test_a_second_run_in_the_folder_is_refused_at_once(kept):
    kept.save(8)
    with pytest.raises(UserError, match="already holds step-00000008, so step 5 of another run"):
        kept.begin(5)


@pytest.mark.fault(14)
def test_replicas_that_differ_end_the_run_at_the_next_save(kept, monkeypatch):
    def differ(*arguments):
        raise DivergedError("weight differs")

    with monkeypatch.context() as patched:
        patched.setattr("beitctl.engine.saving.writing.check_replicas", differ)
        kept.begin(5)
        with pytest.raises(DivergedError, match="weight differs"):
            kept.begin(6)
    assert "NO CHECKPOINT of step 5 was written: weight differs" in kept.warnings[0]
    assert "the run ends when the next one is due" in kept.warnings[0]
    assert kept.names() == []


def test_host_memory_is_used_again():
    memory = Memory(torch.device("cpu"))
    first = memory.copied(pieces_of(tensors_of(1), ALONE))
    places = [piece.local.data_ptr() for piece in first]
    second = memory.copied(pieces_of(tensors_of(2), ALONE))
    assert [piece.local.data_ptr() for piece in second] == places


@pytest.mark.parametrize("block", [1, 64, 600])
def test_copies_do_not_overlap_whatever_the_size_of_the_blocks(monkeypatch, block):
    monkeypatch.setattr("beitctl.engine.saving.pieces.BLOCK", block)
    copies = Memory(torch.device("cpu")).copied(pieces_of(tensors_of(1), ALONE))
    assert bits({piece.name: piece.local for piece in copies}) == bits(tensors_of(1))


def dying(folder):
    """Save step 2 in the background and die when it is staged but not written."""
    start()
    kept = Kept(Path(folder))
    with pytest.MonkeyPatch.context() as patched:
        gate = Gate(patched)
        kept.begin(2)
        assert gate.reached.wait(30)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault(1)
def test_death_between_staging_and_writing_leaves_the_one_before(kept):
    kept.save(1)
    assert ended(in_a_child(lambda: dying(kept.folder))) == -signal.SIGKILL
    assert kept.names() == ["step-00000001", "step-00000002.tmp"]
    assert kept.loaded() == (1, bits(tensors_of(1)))
