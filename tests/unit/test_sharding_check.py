"""The check of sharding, and that it can fail."""

import pytest
import torch
import torch.distributed as dist

from beitctl.engine.dist import leave
from beitctl.engine.measuring import sharding_check
from beitctl.engine.measuring.sharding_check import shards

CPU = torch.device("cpu")


def test_sharding_passes_here_in_both_parts():
    assert [str(check) for check in shards(CPU) if not check.passed] == []


@pytest.fixture(autouse=True)
def alone():
    """In no group, whatever ran before in this process."""
    leave()


def test_no_process_group_is_left_behind():
    shards(CPU)
    assert not dist.is_initialized()


def test_no_process_group_is_left_behind_when_the_check_fails(monkeypatch):
    monkeypatch.setattr(sharding_check, "_network", lambda device: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shards(CPU)
    assert not dist.is_initialized()


def test_a_group_that_is_there_is_kept():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert (len(shards(CPU)), dist.is_initialized()) == (2, True)
    finally:
        dist.destroy_process_group()


def test_gradients_that_are_averaged_another_way_are_found(monkeypatch):
    right = sharding_check._whole
    monkeypatch.setattr(
        sharding_check, "_whole", lambda value: right(value) / (2 if value.requires_grad is False else 1)
    )
    gradients, _ = shards(CPU)
    assert (gradients.reason != "", gradients.errors["grad"]) == (True, pytest.approx(0.5, rel=0.05))


def test_an_optimizer_that_steps_on_gradients_that_are_not_finite_is_found(monkeypatch):
    right = torch.optim.AdamW.step

    def step(self):
        self.found_inf = torch.zeros_like(self.found_inf)
        return right(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    _, skipped = shards(CPU)
    assert skipped.reason == "a step with gradients that are not finite changed the weights"


def test_an_optimizer_that_never_steps_is_found(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    _, skipped = shards(CPU)
    assert skipped.reason == "a step with finite gradients changed nothing"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sharding_passes_on_a_gpu():
    assert [str(check) for check in shards(torch.device("cuda")) if not check.passed] == []
