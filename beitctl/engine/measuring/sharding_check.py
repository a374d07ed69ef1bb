"""A check of sharding on this machine: gradients under FSDP2, and the step that fused AdamW leaves out.

A process alone is enough: its shards are whole, but everything around them is as on many ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from beitctl.engine.measuring.selfcheck import BOUNDS, Check
from beitctl.engine.shard import compute_dtype, whole

WIDTH, ROWS = 64, 32


def shards(device: torch.device) -> list[Check]:
    """Compare a small network in two units, sharded over this process alone, with the same one unsharded.

    Joins a process group of its own if this process is in none, and leaves it again.

    Returns:
        One check of the gradients, in the type that ``precision = "auto"`` computes in, and one of AdamW: a
        step with ``found_inf`` must change nothing, the next one must.
    """
    with _group(device):
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        dtype = compute_dtype("auto", device)
        plain, sharded = _network(device).to(dtype), _sharded(_network(device), mesh, dtype)
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        for network in (plain, sharded):
            network(x).float().square().sum().backward()
        return [_gradients(plain, sharded, dtype), _skipped_step(sharded)]


@contextmanager
def _group(device: torch.device) -> Iterator[None]:
    """A process group, the one that there is or one of this process alone."""
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


def _network(device: torch.device) -> nn.Sequential:
    """Two layers with a norm between, the same every time."""
    made = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * WIDTH**-0.5)
    return made.to(device)


def _sharded(network: nn.Sequential, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Sequential:
    """The network in two FSDP2 units, set up as ``engine.shard`` does it."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (network[0], network):
        made = fully_shard(unit, mesh=mesh, mp_policy=policy)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
    return network


def _gradients(plain: nn.Module, sharded: nn.Module, dtype: torch.dtype) -> Check:
    """Relative error of the worst parameter's gradient."""
    errors = {}
    for (name, right), found in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert right.grad is not None
        wanted = right.grad.double()
        wrong = (_whole(found.grad) - wanted).norm() / wanted.norm()
        errors[name] = float(wrong)
    worst = max(errors.values())
    bound = BOUNDS[dtype].grad
    passed = worst <= bound  # NaN does not
    return Check("FSDP gradients", {"grad": worst}, "" if passed else f"error above {bound:.0e}")


def _skipped_step(sharded: nn.Module) -> Check:
    """Whether fused AdamW leaves out a step with ``found_inf``, and does the next."""
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.1, fused=True)
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    moved = []
    for broken in (1.0, 0.0):
        before = [_whole(parameter.detach()) for parameter in sharded.parameters()]
        device = next(sharded.parameters()).device
        optimizer.found_inf = torch.tensor(broken, device=device)  # type: ignore[attr-defined]
        optimizer.step()
        after = [_whole(parameter.detach()) for parameter in sharded.parameters()]
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    reason = {
        (False, True): "",
        (True, True): "a step with gradients that are not finite changed the weights",
        (True, False): "a step with gradients that are not finite changed the weights",
        (False, False): "a step with finite gradients changed nothing",
    }[moved[0], moved[1]]
    return Check("step without finite gradients", {}, reason)


def _whole(value: Tensor | None) -> Tensor:
    """The full tensor of a shard in fp64, a copy."""
    assert value is not None
    return whole(value).double().clone()
