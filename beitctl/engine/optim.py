"""AdamW with its parameter groups; learning rates are functions of the step, there is no scheduler state."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from beitctl.config import OptimConfig
from beitctl.engine.shard import whole

UNDECAYED = ("cls_token", "vision_embed.position", "logit_scale")
"""Names without weight decay besides 1-D tensors (BEiT-3's code decays text positions and the mask token)."""


def lr_at(step: int, steps: int, optim: OptimConfig) -> float:
    """Learning rate of a step, counted from 0: linear warm-up from 0, then cosine (BEiT) or linear (VLMo)."""
    warm = optim.warmup_steps
    if step < warm:
        return optim.peak_lr * step / max(1, warm - 1)
    done = (step - warm) / max(1, steps - warm)
    left = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.min_lr + (optim.peak_lr - optim.min_lr) * left


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter."""
    if name.endswith("mask_token"):
        return True
    return parameter.ndim > 1 and not name.endswith(UNDECAYED)


def layer_scale(name: str, layers: int, decay: float, head_factor: float = 1.0) -> float:
    """Learning-rate factor of a parameter: decay ** (layers + 1 - id), embeddings 0, block i has i + 1.

    The final norm has factor 1, heads ``head_factor``, a pooler 1. Source: BEiT-3's fine-tuning code.
    """
    if name.startswith("heads."):
        return 1.0 if name.startswith("heads.pooler.") else head_factor
    block = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    if block:
        return float(decay ** (layers - int(block.group(1))))
    return float(decay ** (layers + 1)) if "embed" in name else 1.0


def adamw(module: nn.Module, optim: OptimConfig, layers: int) -> torch.optim.AdamW:
    """AdamW over every trainable parameter of a module, each in exactly one group."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decay = optim.weight_decay if is_decayed(name, parameter) else 0.0
            scale = layer_scale(name, layers, optim.layer_decay, optim.head_factor)
            groups.setdefault((decay, scale), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": decay, "scale": scale}
            for (decay, scale), members in groups.items()
        ],
        lr=optim.peak_lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]


def moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name, created where the first step has not done so yet."""
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        found |= {f"optimizer.{key}.{name}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return found


def clip(module: nn.Module, limit: float) -> Tensor:
    """Global gradient norm over all ranks, 0-d; gradients are scaled down to ``limit`` if that is above 0."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if limit > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.detach()


def weights_and_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:
    """Everything a checkpoint holds: parameters, buffers, AdamW's moments."""
    return {f"learner.{name}": value for name, value in module.state_dict().items()} | moments(
        module, optimizer
    )
