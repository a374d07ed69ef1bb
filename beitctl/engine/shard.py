"""From a recipe to a sharded module: meta device, FSDP2, then every parameter from its own generator."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from beitctl.engine.dist import Ranks
from beitctl.model.multiway import Block

Initial = Callable[[str, torch.Size], Tensor]
"""Value of a parameter by its name and shape, fp32 on the CPU, the same on every rank."""


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute type that a recipe's ``precision`` means on a device."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16 or AMX); elsewhere fp32 is faster."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)


def sharded(
    build: Callable[[], nn.Module], ranks: Ranks, precision: str, initial: Initial, *,
    prepare: Callable[[nn.Module, torch.dtype], None] = lambda module, dtype: None, shard_ranks: int = 0,
) -> Any:  # fmt: skip
    """Build a module on the meta device, shard it over the ranks and give every parameter its value.

    One FSDP2 unit per block, one per module with the class attribute ``compute_fp32 = True``, and one for the
    rest. The parameters of the second kind compute in fp32 whatever ``precision`` says, and the module makes
    its inputs fp32 itself. Gradients are summed over ranks, not averaged: the loop divides losses by global
    counts. Buffers keep the value that ``reset_buffers`` of their module gives them.

    Args:
        build: makes the module.
        ranks: all processes.
        precision: a recipe's ``precision``.
        initial: value of every parameter.
        prepare: called with the module and its compute type before it is sharded.
        shard_ranks: ranks that share one copy of the state; 0: those of one machine.

    Raises:
        ValueError: ``initial`` knows no value for a parameter, or a module cannot be sharded or begun.
    """
    with torch.device("meta"):
        module = build()
    _check(module)
    dtype = compute_dtype(precision, ranks.device)
    exact = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = exact if dtype == torch.float32 else replace(exact, param_dtype=dtype)
    prepare(module, dtype)
    mesh = ranks.mesh(shard_ranks)
    outer = _exact_units(module)
    units = [(m, policy) for m in module.modules() if isinstance(m, Block)] + [(m, exact) for m in outer]
    for unit, how in [*units, *([] if module in outer else [(module, policy)])]:
        fully_shard(unit, mesh=mesh, mp_policy=how, reshard_after_forward=mesh.size(-1) > 1)
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            if ranks.world > 1:  # alone, torch divides by 1 as it is, and with a factor in a pass of its own
                unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
            if hasattr(unit, "set_reduce_scatter_unused_params"):  # torch 2.15; empty experts need it no more
                unit.set_reduce_scatter_unused_params(True)
    for method in getattr(module, "entry_points", ()):
        register_fsdp_forward_method(module, method)
    module.to_empty(device=ranks.device)
    fill(module, initial)
    return module


def _exact_units(module: nn.Module) -> list[nn.Module]:
    """The modules with parameters that compute in fp32; of nested ones the outermost alone."""
    if getattr(module, "compute_fp32", False):
        return [module] if any(True for _ in module.parameters()) else []
    return [found for child in module.children() for found in _exact_units(child)]


def last_pass(module: nn.Module, last: bool) -> None:
    """Say before a backward pass whether it is the last one of its step.

    Every pass adds up gradients inside a group of ranks that share one copy of the weights; the groups add
    up theirs in the last pass alone. That changes when data are sent, not the gradients of the step.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)


def _check(module: nn.Module) -> None:
    """Refuse what FSDP2 cannot shard, and what would begin with the numbers that lie in memory.

    Raises:
        ValueError: a parameter is 0-D, or a buffer belongs to a module without ``reset_buffers``.
    """
    for name, parameter in module.named_parameters():
        if not parameter.ndim:
            raise ValueError(
                f"parameter {name} is 0-D, which FSDP2 cannot shard; give it the shape (1,): "
                "nn.Parameter(torch.empty(1))"
            )
    for name, part in module.named_modules():
        buffers = [key for key, value in part.named_buffers(recurse=False) if value is not None]
        if buffers and not callable(getattr(part, "reset_buffers", None)):
            raise ValueError(
                f"nothing gives {', '.join(f'{name}.{key}'.lstrip('.') for key in buffers)} a value: "
                f"{type(part).__name__} needs a method reset_buffers() that fills its buffers"
            )


@torch.no_grad()
def fill(module: nn.Module, initial: Initial) -> None:
    """Give every parameter its initial value and every buffer its start."""
    for name, parameter in module.named_parameters():
        value = initial(name, parameter.shape).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            placed = distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(placed.to_local())
        else:
            parameter.copy_(value)
    for part in module.modules():
        reset = getattr(part, "reset_buffers", None)
        if callable(reset):
            reset()


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """Whole parameters and buffers on the CPU; every rank must call it."""
    found = {}
    for name, value in module.state_dict().items():
        found[name] = whole(value).detach().cpu()
    return found


def whole(value: Tensor) -> Tensor:
    """The whole of a sharded tensor, of which every rank must ask; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """What this rank holds of a sharded tensor, uncopied; any other as it is."""
    return value.to_local() if isinstance(value, DTensor) else value
