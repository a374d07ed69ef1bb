"""What was loaded is what was saved, whatever happened between the file and the tensor."""

import json
from pathlib import Path

import pytest
import torch
from saved import ALONE, Kept, blank, tensors_of
from torch.distributed.tensor import Shard, distribute_tensor

from beitctl.engine.dist import start
from beitctl.engine.saving import dcp, manifest
from beitctl.engine.saving.checkpoint import Checkpoints
from beitctl.engine.saving.pieces import pieces_of
from beitctl.engine.saving.sums import added, own_sum
from beitctl.errors import DataError

pytestmark = pytest.mark.fault(2)


def sums_of(tensors):
    return {piece.name: own_sum(piece) for piece in pieces_of(tensors, ALONE)}


def load_and_then(folder, harm, monkeypatch):
    """Load a checkpoint whose tensors are harmed after they were read."""
    kept = Kept(folder).save(1)
    read = dcp.read

    def harmed(path, index, tensors):
        read(path, index, tensors)
        harm(tensors)

    monkeypatch.setattr(dcp, "read", harmed)
    kept.checkpoints.load(kept.checkpoints.newest(), blank())


def flip(tensors):
    tensors["learner.ids"][2, 1] ^= 1


def swap_rows(tensors):
    tensors["learner.weight"][[3, 4]] = tensors["learner.weight"][[4, 3]]


def turn_zero(tensors):
    tensors["learner.weight"][0, 1] = 0.0  # from -0.0


@pytest.mark.parametrize("harm", [flip, swap_rows, turn_zero])
def test_a_tensor_that_is_not_what_was_saved_is_refused(tmp_path, monkeypatch, harm):
    name = "learner.ids" if harm is flip else "learner.weight"
    with pytest.raises(DataError, match=f"after loading, {name} differ from what was saved"):
        load_and_then(tmp_path, harm, monkeypatch)


def test_every_single_bit_counts():
    before = sums_of(tensors_of(1))
    for name, tensor in tensors_of(1).items():
        for bit in range(8 * tensor.numel() * tensor.element_size()):
            changed = tensors_of(1)[name].detach().contiguous()
            changed.reshape(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
            assert sums_of({name: changed})[name] != before[name]


def test_a_checkpoint_without_sums_is_loaded(tmp_path):
    kept = Kept(tmp_path).save(1)
    body = manifest.read(tmp_path / "step-00000001", 1)
    del body["sums"], body["format"]
    manifest.write(tmp_path / "step-00000001", body)
    assert kept.loaded()[0] == 1


def saved_sums(folder):
    ranks = start()
    full = {"weight": torch.randn(7, 3, generator=torch.Generator().manual_seed(0))}
    tensors = {name: distribute_tensor(value, ranks.mesh(), [Shard(0)]) for name, value in full.items()}
    across = distribute_tensor(full["weight"], ranks.mesh(), [Shard(1)])
    tensors |= {"across": across, "plain": full["weight"]}
    path = Checkpoints(Path(folder), ranks, 1, print).save(1, tensors, {})
    ranks.stop()
    return json.loads((path / "manifest.json").read_text())["sums"]


@pytest.mark.parametrize("world", [1, 3])
def test_sums_do_not_depend_on_the_number_of_ranks_or_how_a_tensor_is_split(on_ranks, tmp_path, world):
    weight = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    (expected,) = sums_of({"weight": weight}).values()
    found = on_ranks(saved_sums, world, tmp_path / "checkpoints")
    assert found == [{"weight": expected, "across": expected, "plain": expected}] * world


def test_sums_are_added_modulo_2_to_the_64():
    class Four:
        def sum(self, values):
            return [4 * value for value in values]

    assert added([2**64 - 1, 5, 2**63], Four()) == [2**64 - 4, 20, 0]
