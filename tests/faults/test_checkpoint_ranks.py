"""Checkpoints of several ranks: all of them fail or none, and any number of ranks can load."""

import json
import resource
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from beitctl.engine.dist import start
from beitctl.engine.saving import files
from beitctl.engine.saving.checkpoint import Checkpoints


def sharded(ranks, step):
    """One of each: rows split unevenly, fewer rows than ranks, replicated, plain."""
    draw = torch.Generator().manual_seed(step)
    full = {
        name: torch.randn(rows, 3, generator=draw) for name, rows in (("odd", 7), ("one", 1), ("both", 4))
    }
    layouts = {"odd": Shard(0), "one": Shard(0), "both": Replicate()}
    found = {name: distribute_tensor(full[name], ranks.mesh(), [layouts[name]]) for name in full}
    return {**found, "plain": torch.tensor(float(step))}


def whole(tensors):
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).tolist() for n, t in tensors.items()}


def save_as_ranks(folder, step):
    ranks = start()
    tensors = sharded(ranks, step)
    Checkpoints(Path(folder), ranks, 3, print).save(step, tensors, {"identity": "x"})
    values = whole(tensors)
    ranks.stop()
    return values


def load_as_ranks(folder):
    ranks = start()
    tensors = sharded(ranks, 999)
    checkpoints = Checkpoints(Path(folder), ranks, 3, print)
    found = checkpoints.newest()
    checkpoints.load(found, tensors)
    values = whole(tensors)
    ranks.stop()
    return [found.step, found.meta, values]


@pytest.mark.fault(10)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_another_number_of_ranks_loads_the_same_bits(on_ranks, tmp_path, before, after):
    saved = on_ranks(save_as_ranks, before, tmp_path / "checkpoints", 5)
    loaded = on_ranks(load_as_ranks, after, tmp_path / "checkpoints")
    assert loaded == [[5, {"identity": "x"}, saved[0]]] * after


def fail_as_ranks(folder):
    """What each rank gets to hear when only rank 1 fails, and whether saving works afterwards."""
    ranks = start()
    checkpoints = Checkpoints(Path(folder), ranks, 3, print)
    checkpoints.save(1, sharded(ranks, 1), {})
    heard = []
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    heard.append(outcome(lambda: checkpoints.save(2, sharded(ranks, 2), {})))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ranks.barrier()
    heard.append(sorted(path.name for path in Path(folder).iterdir()))
    ranks.barrier()
    other = {**sharded(ranks, 1), **({"extra": torch.zeros(1)} if ranks.rank == 1 else {})}
    heard.append(outcome(lambda: checkpoints.load(checkpoints.newest(), other)))
    checkpoints.save(3, sharded(ranks, 3), {})
    heard.append(checkpoints.newest().step)
    ranks.stop()
    return heard


def outcome(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


@pytest.mark.fault(3)
def test_a_failure_of_one_rank_is_an_error_on_all_and_saving_goes_on(on_ranks, tmp_path):
    heard = on_ranks(fail_as_ranks, 2, tmp_path / "checkpoints")
    assert heard[0] == heard[1]
    full, names, mismatch, newest = heard[0]
    assert full.startswith("CapacityError: ")
    assert "no space left for a checkpoint (File too large)" in full
    assert names == ["step-00000001"]
    assert mismatch.startswith("UserError: ")
    assert mismatch.endswith("or the recipe it came from (rank 1)")
    assert newest == 3


def save_apart(folder):
    files.PATIENCE = 0.1
    ranks = start()
    own = Path(folder) / str(ranks.rank)
    text = outcome(lambda: Checkpoints(own, ranks, 3, print).save(1, sharded(ranks, 1), {}))
    ranks.stop()
    return text


def test_folders_that_the_machines_do_not_share_are_a_user_error(on_ranks, tmp_path):
    texts = on_ranks(save_apart, 2, tmp_path / "checkpoints")
    assert texts[0] == texts[1]
    assert texts[0].startswith("UserError: ")
    assert (
        "lacks __1_0.distcp, written by other ranks: the folder is not shared between the machines"
        in texts[0]
    )


def test_the_manifest_lists_every_file_of_every_rank(on_ranks, tmp_path):
    on_ranks(save_as_ranks, 2, tmp_path / "checkpoints", 5)
    folder = tmp_path / "checkpoints" / "step-00000005"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {*manifest["files"], "manifest.json"} == {path.name for path in folder.iterdir()}
    assert (manifest["world"], manifest["step"], manifest["format"]) == (2, 5, 1)
