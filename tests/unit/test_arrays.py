"""Texts in one block, and arrays that are computed once."""

import errno
import multiprocessing
import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beitctl.data import arrays
from beitctl.data.arrays import Texts, cached, filled


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@given(st.lists(st.text()))
def test_texts_come_back(given):
    texts = Texts.of(given)
    assert (len(texts), list(texts), texts[1:3], texts[::-1]) == (
        len(given),
        given,
        given[1:3],
        given[::-1],
    )


def test_names_of_files_that_are_not_utf8_come_back():
    name = os.fsdecode(b"a\xff.jpg")
    assert Texts.of([name, "b"])[0] == name


def test_a_text_that_is_not_there_is_no_text():
    with pytest.raises(IndexError):
        Texts.of(["a"])[1]


def numbers(calls, size=3000):
    def build():
        calls.append(1)
        return {"a": np.arange(size), "empty": np.zeros((0, 3), np.int8)}

    return build


def test_arrays_are_computed_once_and_memory_mapped():
    calls = []
    for _ in range(2):
        found = cached("kind", "key", numbers(calls))
        assert (found["a"] == np.arange(3000)).all()
        assert isinstance(found["a"], np.memmap)
        assert found["empty"].shape == (0, 3)
    assert calls == [1]


def test_another_key_is_computed_anew():
    calls = []
    cached("kind", "one", numbers(calls))
    cached("kind", "two", numbers(calls))
    assert calls == [1, 1]


@pytest.mark.parametrize("damage", ["cut", "removed", "unfinished"])
def test_a_damaged_cache_is_computed_again(folder, damage):
    calls = []
    cached("kind", "key", numbers(calls))
    file = folder / "kind" / "key" / "a.npy"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "removed":
        file.unlink()
    else:
        (folder / "kind" / "key" / "complete").unlink()
    assert (cached("kind", "key", numbers(calls))["a"] == np.arange(3000)).all()
    assert (cached("kind", "key", numbers(calls))["a"] == np.arange(3000)).all()
    assert calls == [1, 1]


def test_a_cache_that_cannot_be_made_costs_only_the_time(folder):
    folder.write_text("a file, no folder")
    calls = []
    for _ in range(2):
        assert (cached("kind", "key", numbers(calls))["a"] == np.arange(3000)).all()
    assert calls == [1, 1]


def test_a_full_disk_costs_only_the_time(folder, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrays.os, "posix_fallocate", full)
    assert (cached("kind", "key", numbers([]))["a"] == np.arange(3000)).all()
    assert [path.name for path in (folder / "kind").iterdir()] == [".key.lock"]


def test_an_error_while_computing_leaves_nothing(folder):
    def fill(new):
        new("a", (10,), np.int64)
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="the source is gone"):
        filled("kind", "key", fill)
    assert [path.name for path in (folder / "kind").iterdir()] == [".key.lock"]


def slowly(notes):
    def build():
        with notes.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return {"a": np.arange(3000)}

    assert (cached("kind", "key", build)["a"] == np.arange(3000)).all()


def test_of_several_processes_one_computes(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=slowly, args=(tmp_path / "notes",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "notes").read_text() == "x"
