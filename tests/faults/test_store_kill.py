"""A token store under kill -9 and on a full disk: run again, it is the store that was never disturbed."""

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest
from coding import Noise, files, stage, tokenize
from processes import ended, in_a_child

from beitctl.data.store import TokenStore
from beitctl.engine.dist import start
from beitctl.errors import CapacityError, DataError


def made():
    return stage(Noise(count=24, bad=(5,)), shard_pictures=2)


def complete(folder):
    """Whether the store opens; an incomplete one must be refused, not be read in part."""
    try:
        return bool(TokenStore.open(folder / "tokens").ids)
    except DataError:
        return False


def killed_while_writing(folder):
    """Shards that there were after each kill; then the store is finished."""
    start()
    folder, draw, reached = Path(folder), random.Random(0), []
    for wanted in (1, 3, 4, 6, 9, 11):
        child = in_a_child(lambda: tokenize(folder, made()))
        while len(shards(folder)) < wanted:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.004))
        os.kill(child, signal.SIGKILL)
        ended(child)
        reached.append(len(shards(folder)))
        assert complete(folder) == (folder / "tokens" / "store.json").exists()
    tokenize(folder, made())
    return reached


def shards(folder):
    return list((folder / "tokens").glob("*.parquet"))


def test_after_kill_9_at_any_time_the_store_is_the_same(on_ranks, tmp_path):
    (reached,) = on_ranks(killed_while_writing, 1, tmp_path / "killed")
    tokenize(tmp_path / "whole", made())
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert reached == sorted(reached)
    assert len({count for count in reached if count < 12}) > 2, "no death in the middle of the work"


def dying(folder, fatal):
    """Run the stage until the n-th system call that changes a file, and die before it."""
    calls = iter(range(1, 1000))

    def deadly(function):
        def call(*args, **kwargs):
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    tokenize(folder, stage(Noise(count=3)))


def killed_at_each_call(folder):
    """Run again after a death before each call; gives how often that was."""
    start()
    count = 0
    while True:
        count += 1
        place = Path(folder) / str(count)
        code = ended(in_a_child(lambda place=place, count=count: dying(place, count)))
        if code == 0:
            return count - 1
        assert code == -signal.SIGKILL
        tokenize(place, stage(Noise(count=3)))
        assert files(place) == files(Path(folder) / "whole"), count


def test_after_kill_9_before_each_system_call_the_store_is_the_same(on_ranks, tmp_path):
    tokenize(tmp_path / "whole", stage(Noise(count=3)))
    (times,) = on_ranks(killed_at_each_call, 1, tmp_path)
    assert times >= 8  # fsync and replace of two shards, store.json and patches.npy


@pytest.mark.parametrize("nth", [1, 3, 4, 5])
def test_after_a_full_disk_the_same_command_ends_in_the_same_store(tmp_path, monkeypatch, nth):
    calls, fsync = iter(range(1, 1000)), os.fsync

    def full(file):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CapacityError, match="the disk is full") as caught:
            tokenize(tmp_path / "full", stage(Noise(count=5)))
    assert caught.value.exit_code == 5
    tokenize(tmp_path / "full", stage(Noise(count=5)))
    tokenize(tmp_path / "whole", stage(Noise(count=5)))
    assert files(tmp_path / "full") == files(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_a_harmed_shard_is_refused_by_name_and_made_again(tmp_path, harm):
    tokenize(tmp_path, stage(Noise(count=5)))
    whole, path = files(tmp_path), tmp_path / "tokens" / "tokens-00001.parquet"
    data = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if harm == "cut" else data[:60] + bytes([data[60] ^ 4]) + data[61:])
    with pytest.raises(DataError, match=r"tokens-00001.parquet: .*run tokenize-images again"):
        TokenStore.open(tmp_path / "tokens")
    tokenize(tmp_path, stage(Noise(count=5)))
    assert files(tmp_path) == whole
