"""What a discrete VAE learns from: batches of pictures with the noise's keys, and the losses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from beitctl.data.loader import Place, Stream, drawn
from beitctl.data.order import digest
from beitctl.engine.learner import HALF, normalise
from beitctl.engine.losses import Sums
from beitctl.errors import DivergedError
from beitctl.model.dvae import DiscreteVAE, kl_to_uniform

PATIENCE = 3
"""Windows in a row with too few used codes after which a run has collapsed."""
MEMORY = 0.9
"""Decay of the running mean of the codes' probabilities."""
RAREST = 1e-6
"""Probability times codes below which a code counts as no rarer."""


@dataclass(frozen=True)
class Schedule:
    """What changes while a discrete VAE trains; a function of the step alone."""

    start: float
    """Temperature of the first step."""
    end: float
    """Temperature from step ``over`` on."""
    over: int
    """Steps of the fall, half a cosine."""
    kl_over: int
    """Steps in which the KL term's weight rises from 0, linearly."""
    window: int
    """Steps between log records, over which the use of codes is counted."""

    def temperature(self, step: int) -> float:
        done = min(1.0, step / max(1, self.over))
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * done))

    def warm(self, step: int) -> float:
        return min(1.0, step / max(1, self.kl_over)) if self.kl_over else 1.0


@dataclass(frozen=True)
class Shots:
    """Pictures of one forward pass."""

    pixels: Tensor
    """(n, 3, H, W) uint8."""
    keys: Tensor
    """(n, 2) int32, from which the Gumbel noise of each picture follows."""
    temperature: float
    warm: float
    """Share of the KL term's weight."""
    opens: bool
    """Whether this is the first pass of a window."""
    samples: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]

    def to(self, device: torch.device) -> "Shots":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("pixels", "keys")}
        return replace(self, **moved)

    def pin_memory(self) -> "Shots":
        """The same in pinned memory, from which copies to a GPU overlap with its work."""
        return replace(self, pixels=self.pixels.pin_memory(), keys=self.keys.pin_memory())


class ShotSteps(Dataset[list[Shots]]):
    """The pictures of any step, by its number, with what their noise follows from."""

    def __init__(self, streams: Sequence[Stream], schedule: Schedule, seed: int, place: Place) -> None:
        self.streams, self.schedule, self.seed, self.place = streams, schedule, seed, place
        self.passes = place.passes(sum(stream.samples for stream in streams))

    def __getitem__(self, step: int) -> list[Shots]:
        return self.at(step, step)

    def at(self, step: int, index: int) -> list[Shots]:
        """The passes of a step with the pictures of another, ``index``, as after a rollback."""
        return [self._shots(step, index, number) for number in range(self.passes)]

    def _shots(self, step: int, index: int, number: int) -> Shots:
        parts, part = self.passes * self.place.world, number * self.place.world + self.place.rank
        rows: list[Any] = []
        keys, ids, problems = [], [], []
        for stream in self.streams:
            for position in stream.positions(index, parts, part, self.seed):
                found: Any = drawn(stream, position, self.seed)
                id, (item,), bad = found
                rows.append(item)
                keys.append(np.frombuffer(digest(self.seed, "gumbel", stream.name, position)[:8], np.int32))
                ids.append(id)
                problems += bad
        task: Any = self.streams[0].task
        pixels = np.stack(rows) if rows else np.zeros((0, 3, *2 * task.sizes), np.uint8)
        noise = np.stack(keys) if keys else np.zeros((0, 2), np.int32)
        return Shots(
            torch.from_numpy(pixels), torch.from_numpy(noise), self.schedule.temperature(step),
            self.schedule.warm(step), number == 0 and step % self.schedule.window == 0, tuple(ids),
            tuple(problems),
        )  # fmt: skip


class DVAELearner(nn.Module):
    """The model with its losses and with the use of its codes, counted over all ranks.

    Three terms: ``pixels``, the squared (or smooth absolute) error of normalised pixels; ``kl`` in nats per
    position, of the codes' probabilities to the uniform distribution; ``balance``, the logarithm of how much
    oftener than evenly the codes that a position chooses were likely in the steps before, which no position
    sees alone.
    """

    weights: Mapping[str, float]
    usage: Tensor
    share: Tensor
    pending: Tensor

    def __init__(
        self, model: DiscreteVAE, kl: float, balance: float, loss: Literal["mse", "smooth-l1"], hard: bool
    ) -> None:
        super().__init__()
        self.model, self.loss, self.hard = model, loss, hard
        self.weights = {"pixels": 1.0, "kl": kl, "balance": balance}
        self.register_buffer("usage", torch.empty(model.codes))
        self.register_buffer("share", torch.empty(model.codes))
        self.register_buffer("pending", torch.empty(2, model.codes), persistent=False)

    def reset_buffers(self) -> None:
        """Nothing was used, and all codes are equally likely."""
        self.usage.zero_()
        self.pending.zero_()
        self.share.fill_(1 / len(self.share))

    def forward(self, batch: Shots) -> Sums:
        """Sums over pixels and positions; second numbers are the squared error and the unweighted KL."""
        if batch.opens:
            self.usage.zero_()
        images = normalise(batch.pixels, HALF)
        made, logs = self.model(images, batch.keys, batch.temperature, self.hard)
        shares = logs.exp()
        squares = (made - images).square().sum()
        error = squares if self.loss == "mse" else F.smooth_l1_loss(made, images, reduction="sum")
        kl = kl_to_uniform(shares, logs).sum()
        crowd = (self.share * len(self.share)).clamp(min=RAREST).log()
        self._count(shares.detach())
        return {
            "pixels": (error, squares.detach()),
            "kl": (batch.warm * kl, kl.detach()),
            "balance": ((shares @ crowd).sum(), torch.zeros_like(kl.detach())),
        }

    def counts(self, batch: Shots) -> dict[str, float]:
        positions = float(len(batch.pixels) * (batch.pixels.shape[-1] // self.model.shrink) ** 2)
        return {"pixels": float(batch.pixels.numel()), "kl": positions, "balance": positions}

    def flops(self, batch: Shots) -> float:
        """Useful operations of a forward and a backward pass: convolutions, and mixing the code vectors."""
        count, model = len(batch.pixels), self.model
        area = batch.pixels.shape[-2] * batch.pixels.shape[-1]
        found = [2 * count * (area // model.shrink**2) * model.codebook.weight.shape.numel()]
        for layer in (*model.encoder.modules(), *model.decoder.modules()):
            if isinstance(layer, nn.Conv2d):
                area //= layer.stride[0] ** 2
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                found.append(2 * count * area * layer.weight.shape.numel())
            if isinstance(layer, nn.ConvTranspose2d):
                area *= layer.stride[0] ** 2
        return float(3 * sum(found) - found[1])  # pixels need no gradient

    @torch.no_grad()
    def after_step(self) -> None:
        """Take what the passes of all ranks have counted into the use of the window and the running mean."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.pending)
        likely, best = self.pending
        finite = torch.isfinite(likely).all()  # else the optimizer has skipped the step
        mean = self.share * MEMORY + likely / likely.sum().clamp(min=1) * (1 - MEMORY)
        self.share.copy_(torch.where(finite, mean, self.share))
        self.usage += torch.where(finite, best, 0)
        self.pending.zero_()

    def loaded(self) -> None:
        """Called by the loop when a checkpoint was loaded: passes without a step do not count."""
        self.pending.zero_()

    @torch.no_grad()
    def _count(self, shares: Tensor) -> None:
        """Add up probabilities (n, N, K) and most likely codes of a pass."""
        best = shares.argmax(-1).flatten()
        self.pending[0] += shares.sum((0, 1))
        self.pending[1].scatter_add_(0, best, torch.ones_like(best, dtype=shares.dtype))


class UseGuard:
    """Ends a run whose codes fall out of use, instead of letting it go on for nothing.

    Args:
        codes: size of the codebook.
        least: share of the codes that must be used in a window; 0 switches the guard off.
        begin: step before which nothing is judged.
    """

    def __init__(self, codes: int, least: float, begin: float) -> None:
        self.codes, self.least, self.begin, self.low = codes, least, begin, 0

    def check(self, step: int, usage: Tensor) -> None:
        """Look at the uses (K,) of every code in the window that ends with a step.

        Raises:
            DivergedError: too few codes were used, in several windows in a row.
        """
        used = int((usage > 0).sum())
        wanted = math.ceil(self.least * min(self.codes, int(usage.sum())))
        self.low = self.low + 1 if used < wanted and step > self.begin else 0
        if self.low >= PATIENCE:
            raise DivergedError(
                f"the codebook collapsed: at step {step}, for {PATIENCE} windows in a row, only {used} of "
                f"{self.codes} codes were used, and min_used_share = {self.least} asks for {wanted}. Set "
                "usage_weight (0.02), raise kl_weight or temperature_end, lower peak_lr, or take fewer "
                "codes; min_used_share = 0 lets the run go on"
            )
