"""Ranks that should hold the same and do not: nothing is saved, and the error names them."""

from pathlib import Path

import pytest
import torch
from test_checkpoint_ranks import outcome
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from beitctl.engine.dist import start
from beitctl.engine.saving.checkpoint import Checkpoints

pytestmark = pytest.mark.fault(14)


def state(ranks, replicate):
    """Whole tensors, one without elements, and tensors that are split over a part of the ranks."""
    mesh = init_device_mesh("cpu", (replicate, ranks.world // replicate))
    full = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    split = {name: distribute_tensor(full, mesh, [Replicate(), Shard(0)]) for name in ("first", "second")}
    return {"plain": torch.arange(3.0), "empty": torch.zeros(0, 3), **split}


def perturbed(tensor):
    """Change the last bit of the last element that this rank holds."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    local.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)


def save_perturbed(folder, replicate, rank, name):
    """What all ranks hear of a save and of one in the background, and what the folder holds then."""
    ranks = start()
    warnings = []
    checkpoints = Checkpoints(Path(folder), ranks, 3, warnings.append)
    tensors = state(ranks, replicate)
    checkpoints.save(1, tensors, {})
    if ranks.rank == rank:
        perturbed(tensors[name])
    heard = [outcome(lambda: checkpoints.save(2, tensors, {}))]
    checkpoints.begin(3, tensors, {}, lambda step, path, seconds: heard.append("saved"))
    heard.append(outcome(lambda: checkpoints.settle(wait=True)))
    ranks.barrier()
    heard.append(sorted(path.name for path in Path(folder).iterdir()))
    ranks.barrier()
    if ranks.rank == rank:
        perturbed(tensors[name])
    heard.append(outcome(lambda: checkpoints.save(4, tensors, {})))
    ranks.stop()
    return heard


@pytest.mark.parametrize(
    ("world", "replicate", "rank", "name", "ranks"),
    [
        (2, 1, 1, "plain", "ranks 0, 1, but rank 0 and rank 1 hold different bits"),
        (4, 2, 3, "second", "ranks 1, 3, but rank 1 and rank 3 hold different bits"),
        (4, 4, 2, "first", "ranks 0, 1, 2, 3, but ranks 0, 1, 3 and rank 2 hold different bits"),
    ],
)
def test_one_bit_in_one_replica_is_refused_with_the_names(
    on_ranks, tmp_path, world, replicate, rank, name, ranks
):
    heard = on_ranks(save_perturbed, world, tmp_path / "checkpoints", replicate, rank, name)
    assert heard == [heard[0]] * world
    at_once, in_background, names, repaired = heard[0]
    assert at_once.startswith(f"DivergedError: {name} should be the same on {ranks}")
    assert (in_background, names, repaired) == (at_once, ["step-00000001"], "fine")
