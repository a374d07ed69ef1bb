"""Checkpoints of sharded modules in the background: no rank waits for training, and all save or none."""

import resource
from pathlib import Path

import pytest
import torch
from test_checkpoint_ranks import sharded, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from beitctl.engine.dist import start
from beitctl.engine.optim import weights_and_state
from beitctl.engine.saving import dcp
from beitctl.engine.saving.checkpoint import Checkpoints

pytestmark = pytest.mark.fault(4)


class Trained:
    """A small module and its AdamW, FSDP2 on one axis or HSDP on two."""

    def __init__(self, ranks, replicate, seed):
        shard = ranks.world // replicate
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 1))
        self.module.register_buffer("seen", torch.tensor([seed, 2, 3]))
        two = {"mesh_shape": (replicate, shard), "mesh_dim_names": ("replicate", "shard")}
        one = {"mesh_shape": (shard,), "mesh_dim_names": ("shard",)}
        fully_shard(self.module, mesh=init_device_mesh("cpu", **(two if replicate > 1 else one)))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1, fused=True)

    def step(self):
        self.module(torch.ones(2, 3)).sum().backward()
        self.optimizer.step()
        self.module.seen.add_(1)

    def tensors(self):
        return dict(weights_and_state(self.module, self.optimizer))


def save_while_training(folder, replicate):
    """State at the save, whether training has changed it since, and what was reported."""
    ranks = start()
    trained, done, warnings = Trained(ranks, replicate, seed=1), [], []
    checkpoints = Checkpoints(Path(folder), ranks, 3, warnings.append)
    trained.step()
    expected = whole(trained.tensors())
    checkpoints.begin(7, trained.tensors(), {}, lambda step, path, seconds: done.append(step))
    for _ in range(5):
        trained.step()
        ranks.sum([1.0])
        checkpoints.settle()
    changed = whole(trained.tensors()) != expected
    checkpoints.settle(wait=True)
    ranks.stop()
    return [expected, changed, done, warnings]


def load_as(folder, replicate):
    ranks = start()
    trained = Trained(ranks, replicate, seed=99)
    checkpoints = Checkpoints(Path(folder), ranks, 3, print)
    checkpoints.load(checkpoints.newest(), trained.tensors())
    values = whole(trained.tensors())
    ranks.stop()
    return values


@pytest.mark.fault(10)
@pytest.mark.parametrize(("before", "after"), [((1, 1), (4, 2)), ((2, 1), (1, 1)), ((4, 2), (2, 1))])
def test_what_training_had_at_the_save_is_what_any_number_of_ranks_loads(on_ranks, tmp_path, before, after):
    (world, replicate), folder = before, tmp_path / "checkpoints"
    saved = on_ranks(save_while_training, world, folder, replicate)
    expected = saved[0][0]
    assert saved == [[expected, True, [7], []]] * world
    assert on_ranks(load_as, after[0], folder, after[1]) == [expected] * after[0]


def fail_in_the_background(folder):
    """What each rank reports when only rank 1 cannot write, while all of them go on."""
    ranks = start()
    warnings, done, sums = [], [], []
    checkpoints = Checkpoints(Path(folder), ranks, 3, warnings.append)
    checkpoints.save(1, sharded(ranks, 1), {})
    write = dcp.write

    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    with pytest.MonkeyPatch.context() as patched:
        if ranks.rank == 1:
            patched.setattr(dcp, "write", limited)
        checkpoints.begin(2, sharded(ranks, 2), {}, lambda step, path, seconds: done.append(step))
        sums = [ranks.sum([float(ranks.rank), float(number)]) for number in range(50)]
        checkpoints.settle(wait=True)
    ranks.barrier()
    names = sorted(path.name for path in Path(folder).iterdir())
    ranks.barrier()
    checkpoints.begin(3, sharded(ranks, 3), {}, lambda step, path, seconds: done.append(step))
    newest = checkpoints.newest().step
    ranks.stop()
    return [warnings, done, names, newest, sums]


def test_a_rank_that_fails_fails_the_save_of_all_and_training_goes_on(on_ranks, tmp_path):
    (told, *heard), (untold, *same) = on_ranks(fail_in_the_background, 2, tmp_path / "checkpoints")
    assert heard == same == [[3], ["step-00000001"], 3, [[1.0, 2.0 * number] for number in range(50)]]
    assert untold == []
    assert len(told) == 1
    assert told[0].startswith("NO CHECKPOINT of step 2 was written: ")
    assert "no space left for a checkpoint (File too large)" in told[0]
