"""One writer for a store: others are told who it is, and a dead one is in nobody's way."""

import errno
import fcntl
import os
import platform
import signal

import pytest

from beitctl.data.lock import NAME, locked
from beitctl.errors import SetupError, UserError


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    with locked(tmp_path), pytest.raises(UserError) as caught, locked(tmp_path):
        pass
    assert caught.value.exit_code == 2
    assert f"{tmp_path}: process {os.getpid()} on {platform.node()} (since 20" in str(caught.value)


def test_nothing_is_left_of_a_lock_that_was_given_back(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            assert (tmp_path / NAME).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="broken"), locked(tmp_path):
        raise ValueError("broken")
    with locked(tmp_path):
        pass


def test_the_lock_of_a_writer_that_was_killed_blocks_nobody(tmp_path):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(writing, b".")
            signal.pause()
    assert os.read(reading, 1)
    with pytest.raises(UserError, match=f"process {child} on"), locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / NAME).exists()
    with locked(tmp_path):
        pass


def test_a_lock_file_without_a_note_still_refuses(tmp_path):
    with locked(tmp_path):
        (tmp_path / NAME).write_text("")
        with pytest.raises(UserError, match="another process writes here"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(SetupError, match=r"keeps no locks \(No locks available\)"), locked(tmp_path):
        pass


def test_a_lock_file_that_its_holder_removes_meanwhile_is_made_anew(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(file, how):
        flock(file, how)
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / NAME).unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path):
        assert (tmp_path / NAME).exists()
    assert len(calls) == 2
