"""A network file system that shows files late: rank 0 decides, and the others wait until they see it too."""

import os
import socket
from pathlib import Path

import pytest
from test_checkpoint_ranks import outcome, sharded, whole

from beitctl.engine.dist import start
from beitctl.engine.saving import files
from beitctl.engine.saving.checkpoint import Checkpoints

pytestmark = pytest.mark.fault(16)


def hide(name, looks):
    """Let this process see a name only after so many looks into folders that hold it; counts them."""
    seen, listdir = [], os.listdir

    def late(folder="."):
        names = listdir(folder)
        if name in names:
            seen.append(folder)
        return [other for other in names if other != name or len(seen) > looks]

    os.listdir = late
    return seen


def resume(folder, patience, looks):
    """What rank 1, whose view is old, and rank 0 find as the newest."""
    files.PATIENCE, files.PAUSE = patience, 0.01
    ranks = start()
    checkpoints = Checkpoints(Path(folder), ranks, 3, print)
    tensors = sharded(ranks, 5)
    for step in (4, 5):
        checkpoints.save(step, tensors, {})
    seen = hide("step-00000005", looks) if ranks.rank == 1 else []
    loaded = sharded(ranks, 999)

    def go_on():
        found = checkpoints.newest()
        checkpoints.load(found, loaded)
        assert (found.step, whole(loaded)) == (5, whole(tensors))

    text = outcome(go_on)
    ranks.stop()
    return [text, len(seen)]


def test_a_rank_waits_until_it_sees_the_checkpoint_that_rank_0_decided_on(on_ranks, tmp_path):
    (main, _), (other, looks) = on_ranks(resume, 2, tmp_path / "checkpoints", 60, 20)
    assert (main, other) == ("fine", "fine")
    assert looks > 20


def test_a_rank_that_never_sees_it_is_named_with_its_host(on_ranks, tmp_path):
    (main, _), (other, _) = on_ranks(resume, 2, tmp_path / "checkpoints", 0.3, 10**9)
    assert main == other
    assert main.startswith(f"UserError: rank 1 on {socket.gethostname()} does not see ")
    assert "step-00000005 after 0 s, but rank 0 does; use an --out that all machines share" in main


def commit_late(folder):
    files.PAUSE = 0.01
    ranks = start()
    seen = hide("__1_0.distcp", 20) if ranks.rank == 0 else []
    text = outcome(lambda: Checkpoints(Path(folder), ranks, 3, print).save(1, sharded(ranks, 1), {}))
    ranks.stop()
    return [text, len(seen)]


def test_rank_0_waits_until_it_sees_the_shards_of_the_others(on_ranks, tmp_path):
    (main, looks), (other, _) = on_ranks(commit_late, 2, tmp_path / "checkpoints")
    assert (main, other) == ("fine", "fine")
    assert looks > 20
