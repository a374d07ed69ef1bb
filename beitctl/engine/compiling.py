"""What makes a block fast or small before it is sharded: attention kernel, ``torch.compile``, recomputing.

Blocks are compiled one by one and without graph breaks; blocks of one shape share a graph. With a language
branch every size is dynamic from the first step, because captions differ in length in every batch: one graph
serves all, where guessing which sizes stay the same compiles anew until torch gives up (its limit is 8).
"""

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)
from torch.utils.checkpoint import checkpoint

from beitctl.config import TrainConfig
from beitctl.engine.agreement import as_told, everywhere
from beitctl.engine.dist import Ranks
from beitctl.engine.measuring.selfcheck import require
from beitctl.engine.session import Session
from beitctl.errors import SetupError, UserError
from beitctl.model.attention import chosen
from beitctl.model.multiway import Block, Multiway

Forward = Callable[..., Tensor]
DYNAMO = "torch._dynamo"
"""The compiler's first part, which takes most of a second to import: only where something is compiled."""
ROWS = 128
"""Text rows of a compiled batch are a multiple of this: the tile of a matrix product on a GPU."""
GRAPHS = 64
"""Most graphs of one function, where torch gives up: contrastive tasks run their blocks in several ways."""
SETTLED = 3
"""Steps after which nothing may be compiled any more."""


def compiled(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run compiles its blocks."""
    return config.compile in ("on", "try") or (config.compile == "auto" and device.type == "cuda")


def rows_multiple(config: TrainConfig, device: torch.device) -> int:
    """What the text rows of a batch are a multiple of; 1: they have no fillers."""
    return ROWS if compiled(config, device) else 1


def preparation(
    config: TrainConfig, ranks: Ranks, warning: Callable[[str, str, str], None]
) -> Callable[[nn.Module, torch.dtype], None]:
    """What ``shard.sharded`` does to a module first; ``warning`` gets a code, a text and what to do.

    A rank that cannot do it takes all others with it, with the same error.
    """
    told = Session(ranks, Path(), warn=warning).warns_here("W308", "see docs/train.md, Speed")

    def together(module: nn.Module, dtype: torch.dtype) -> None:
        def own() -> None:
            prepare(module, dtype, config=config, device=ranks.device, warn=told)

        everywhere(ranks, own, as_told)

    return together


def prepare(
    module: nn.Module, dtype: torch.dtype, *, config: TrainConfig, device: torch.device,
    warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Set the attention kernel of every model in a module and wrap its blocks.

    Raises:
        UserError: a setting cannot hold for this module or device.
        SetupError: an attention backend errs on this GPU, or the compiler fails and the settings do not allow
            to go on without it.
    """
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    if not blocks:
        _refuse(config)
    for model in module.modules():
        if isinstance(model, Multiway):
            model.attention_backend = _backend(model, config, device, dtype)
    if DYNAMO in sys.modules:
        torch._dynamo.reset()  # graphs of an earlier model were made with its memory budget
    if blocks and compiled(config, device):
        symbolic.use_duck_shape = False  # two sizes that are equal by chance are not the same size
        torch._functorch.config.activation_memory_budget = config.memory_budget
        torch._dynamo.config.recompile_limit = GRAPHS
        if _compiler_works(config, device, warn):
            _wrap(blocks, lambda block: _Compiled(block, config.compile == "try", warn))
    elif config.memory_budget < 1:
        warn(
            f"memory_budget = {config.memory_budget:g} has no effect: blocks are not compiled on this device"
        )
    if config.recompute:
        _wrap(blocks, lambda block: functools.partial(checkpoint, block.forward, use_reentrant=False))


def _refuse(config: TrainConfig) -> None:
    """Refuse settings that would be ignored where there are no blocks."""
    usual = TrainConfig(steps=config.steps, optim=config.optim)
    names = ("attention_backend", "memory_budget", "recompute")
    found = [name for name in names if getattr(config, name) != getattr(usual, name)]
    found += ["compile"] if config.compile in ("on", "try") else []
    if found:
        raise UserError(f"{', '.join(found)}: this model has no Transformer blocks; remove it from train")


def _wrap(blocks: Iterable[Block], wrapped: Callable[[Block], Forward]) -> None:
    for block in blocks:
        block.forward = wrapped(block)  # type: ignore[method-assign]


def _backend(model: Multiway, config: TrainConfig, device: torch.device, dtype: torch.dtype) -> str:
    try:
        backend = chosen(config.attention_backend, model.config, device, dtype)
    except ValueError as error:
        raise UserError(str(error)) from error
    if current_flash_attention_impl() is not None:
        restore_flash_attention_impl()  # an earlier training of this process chose another
    if backend in ("varlen-fa3", "varlen-cudnn"):
        if backend == "varlen-fa3":
            activate_flash_attention_impl("FA3")
        try:
            require(backend, device, dtype, model.config.heads, model.config.width // model.config.heads)
        except SetupError:
            restore_flash_attention_impl()
            raise
    return backend


def _compiler_works(config: TrainConfig, device: torch.device, warn: Callable[[str], None]) -> bool:
    """Whether a product and its gradient compile; a missing compiler is found before the data are opened."""
    try:
        x = torch.ones(4, 4, device=device, requires_grad=True)
        torch.compile(lambda y: (y @ y).tanh().sum(), fullgraph=True)(x).backward()
    except Exception as error:
        _failed(error, config.compile == "try", warn)
        return False
    return True


class _Compiled:
    """The compiled forward pass of a block, or after a failure that the settings allow the plain one.

    Without gradients the plain one as well: what is measured comes in batches of other sizes each time.
    """

    def __init__(self, block: Block, may_fail: bool, warn: Callable[[str], None]) -> None:
        self.plain, self.may_fail, self.warn = block.forward, may_fail, warn
        errors = torch._dynamo.exc
        self.failures = (errors.TorchDynamoException, errors.FailOnRecompileLimitHit)
        dynamic = True if block.mixed else None
        self.call: Forward = torch.compile(self.plain, fullgraph=True, dynamic=dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        try:
            return self.call(*args, **kwargs)
        except self.failures as error:
            _failed(error, self.may_fail, self.warn)
            self.call = self.plain
            return self.plain(*args, **kwargs)


def _failed(error: Exception, may_fail: bool, warn: Callable[[str], None]) -> None:
    """Say that the compiler failed; with what torch says first and last, as it says much in between.

    Raises:
        SetupError: the settings do not allow to go on without it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    reason = f"{type(error).__name__}: {lines[0][:300]}"
    if may_fail:
        warn(f'blocks are not compiled and run slower, as compile = "try" allows: {reason}')
        return
    raise SetupError(
        f'blocks cannot be compiled: {reason}; repair the compiler (beitctl doctor), or set compile = "off" '
        '(slower) or "try" in [train]'
    ) from error


class Recompiles:
    """Watches that a settled run compiles nothing: a graph that is compiled again costs minutes, unseen."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.known: int | None = None

    def check(self, steps: int) -> None:
        """Warn if something was compiled since the last call; ``steps``: those of this process so far."""
        graphs = compiled_graphs()
        if self.known is not None and graphs > self.known:
            self.warn(
                f"{graphs - self.known} graphs were compiled after step {SETTLED} of this process: a size of "
                "the batch changes that should not. TORCH_LOGS=recompiles says which"
            )
        if steps >= SETTLED:
            self.known = graphs


def compiled_graphs() -> int:
    """Graphs that this process has compiled."""
    if DYNAMO not in sys.modules:
        return 0
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
