"""Checkpoints under kill -9: the newest is always whole, and nothing that was finished is lost."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import ended, in_a_child
from saved import Kept, bits, blank, tensors_of

from beitctl.engine.dist import start

pytestmark = pytest.mark.fault(1)


def check_whole(folder):
    """Load the newest checkpoint and return its step; fails unless it holds exactly what was saved."""
    kept = Kept(folder)
    found = kept.checkpoints.newest()
    if found is None:
        return 0
    tensors = blank()
    kept.checkpoints.load(found, tensors)
    assert bits(tensors) == bits(tensors_of(found.step)), found
    assert kept.warnings == []
    assert found.meta == {"identity": f"run-{found.step}"}
    return found.step


def save_on(folder):
    """Go on from the newest checkpoint, saving at every step until killed."""
    start()
    step = check_whole(folder)
    (folder.parent / "saving").touch()
    while True:
        step += 1
        Kept(folder, keep=2).save(step)


def save_on_in_the_background(folder):
    """The same, beside a training that spoils every tensor as soon as it may."""
    start()
    step = check_whole(folder)
    (folder.parent / "saving").touch()
    kept = Kept(folder, keep=2)
    while True:
        step += 1
        tensors = tensors_of(step)
        kept.begin(step, tensors)
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()


WAYS = {"at once": save_on, "in the background": save_on_in_the_background}


def killed_at_random(folder, way, rounds):
    folder, draw = Path(folder), random.Random(0)
    reached = [0]
    for _ in range(rounds):
        child = in_a_child(lambda: WAYS[way](folder))
        while not (folder.parent / "saving").exists():
            time.sleep(0.001)
        (folder.parent / "saving").unlink()
        time.sleep(draw.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        reached.append(check_whole(folder))
    return reached


@pytest.mark.fault(4)
@pytest.mark.parametrize("way", WAYS)
def test_after_kill_9_at_any_time_the_newest_is_whole_and_none_is_lost(on_ranks, tmp_path, way):
    (reached,) = on_ranks(killed_at_random, 1, tmp_path / "checkpoints", way, 20)
    assert reached == sorted(reached)
    assert reached[-1] >= 5, "too few saves for a meaningful test"


def killed_at_each_call(folder):
    """Step of the newest after being killed before the n-th system call of saving step 3, n = 1, 2, ..."""
    reached, count = [], 0
    while True:
        count += 1
        place = Path(folder) / str(count)
        Kept(place, keep=2).save(1, 2)
        code = ended(in_a_child(lambda place=place, count=count: dying_save(place, count)))
        reached.append(check_whole(place))
        for path in place.glob("step-????????"):
            assert {file.name for file in path.iterdir()} == {".metadata", "__0_0.distcp", "manifest.json"}
        if code == 0:
            return reached
        assert code == -signal.SIGKILL


def dying_save(folder, fatal):
    calls = iter(range(1, 1000))

    def deadly(function):
        def call(*args, **kwargs):
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")):
        setattr(owner, name, deadly(getattr(owner, name)))
    Kept(folder, keep=2).save(3)


def test_kill_9_before_each_system_call_of_a_save_leaves_the_old_or_the_new_one(on_ranks, tmp_path):
    (reached,) = on_ranks(killed_at_each_call, 1, tmp_path)
    assert reached == sorted(reached)
    assert {2, 3} == set(reached)
    assert reached.count(2) >= 4
    assert reached.count(3) >= 4
