"""What VQ-KD trains on, and its losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from beitctl.data.loader import Place, Stream, drawn
from beitctl.engine.learner import HALF, normalise
from beitctl.engine.losses import Sums
from beitctl.model.codebook import Upkeep
from beitctl.model.flops import linear_weights, of_head, of_pass
from beitctl.model.plan import plan_of
from beitctl.model.vqkd import VQKDModel


@dataclass(frozen=True)
class Views:
    """A batch of one crop at two sizes: for the tokenizer and for its teacher."""

    small: Tensor
    """(n, 3, h, h) uint8."""
    large: Tensor
    """(n, 3, t, t) uint8."""
    places: Tensor
    """(n,) place of every picture in its step, over all ranks and passes."""
    samples: tuple[str, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()

    def to(self, device: torch.device) -> "Views":
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("small", "large", "places")
        }
        return replace(self, **moved)

    def pin_memory(self) -> "Views":
        """The same in pinned memory, from which copies to a GPU overlap with its work."""
        return replace(
            self, **{name: getattr(self, name).pin_memory() for name in ("small", "large", "places")}
        )


class ViewSteps(Dataset[list[Views]]):
    """Two views of the pictures of any step, one batch for each forward pass."""

    def __init__(self, streams: Sequence[Stream], seed: int, place: Place) -> None:
        self.streams, self.seed, self.place = streams, seed, place
        self.samples = sum(stream.samples for stream in streams)
        self.passes = place.passes(self.samples)

    def __getitem__(self, step: int) -> list[Views]:
        return [self._pass(step, number) for number in range(self.passes)]

    def _pass(self, step: int, number: int) -> Views:
        parts, part = self.passes * self.place.world, number * self.place.world + self.place.rank
        rows: list[Any] = []
        ids, places, problems, before = [], [], [], 0
        for stream in self.streams:
            for position in stream.positions(step, parts, part, self.seed):
                id, item, bad = drawn(stream, position, self.seed)
                rows.append(item)
                ids.append(id)
                places.append(before + position - step * stream.samples)
                problems += bad
            before += stream.samples
        sizes = self.streams[0].task.sizes  # type: ignore[attr-defined]
        small, large = (
            torch.from_numpy(np.stack([row[k] for row in rows]) if rows else np.zeros((0, 3, px, px), "u1"))
            for k, px in enumerate(sizes)
        )
        return Views(small, large, torch.tensor(places, dtype=torch.int64), tuple(ids), tuple(problems))


@dataclass(frozen=True)
class Losses:
    """Weights of the losses beside that of the similarity to the teacher, which is 1."""

    commitment: float = 1.0
    entropy: float = 0.0


class VQKDLearner(nn.Module):
    """The tokenizer with its teacher, which is no part of what is trained or saved."""

    weights: Mapping[str, float]

    def __init__(self, model: VQKDModel, losses: Losses, upkeep: Upkeep) -> None:
        super().__init__()
        self.model, self.upkeep = model, upkeep
        self.weights = {"similarity": 1.0, "commitment": losses.commitment}
        if losses.entropy:
            self.weights = {**self.weights, "entropy": losses.entropy}
        self._teacher: list[Any] = []  # a list hides it from FSDP and from the checkpoint

    def teach(self, teacher: Any) -> "VQKDLearner":
        """Give the frozen teacher: (B, 3, H, W) in 0..1 to (B, N, F)."""
        self._teacher = [teacher]
        return self

    def forward(self, batch: Views) -> Sums:
        """1 - cosine to the teacher's features, commitment to the codes, uneven use; sums over patches."""
        model, upkeep = self.model, self.upkeep
        with torch.no_grad():
            target = self._teacher[0](batch.large.float() / 255).float() - model.feature_mean
        z = model.vectors(normalise(batch.small, HALF))
        zero = z.new_zeros(())
        chosen = upkeep.chosen(batch.places, z.shape[1])
        indices, commitment, passed = None, zero, z
        if upkeep.awake:
            codes, indices = model.quantised(z)
            commitment, passed = (codes - z).square().mean(-1).sum(), z + (codes - z).detach()
        cosine = F.cosine_similarity(model.features(passed), target, dim=-1)
        sums = {
            "similarity": ((1 - cosine).sum(), cosine.detach().sum()),
            "commitment": (commitment, zero),
        }
        if "entropy" in self.weights:
            sums["entropy"] = (self._uneven(z, chosen) if upkeep.awake else zero, zero)
        if self.training:
            upkeep.see(z, indices, batch.places, chosen)
        return sums

    def _uneven(self, z: Tensor, chosen: Tensor) -> Tensor:
        """The entropy term on the patches that also go to the pool, scaled to all patches."""
        rows = z.gather(1, chosen[..., None].expand(-1, -1, z.shape[-1])).flatten(0, 1)
        return self.upkeep.unevenness(rows).sum() * (z.shape[1] / chosen.shape[1])

    def after_step(self) -> None:
        """Called by the loop when the optimizer has stepped."""
        self.upkeep.after_step()

    def loaded(self) -> None:
        """Called by the loop when a checkpoint was loaded."""
        self.upkeep.loaded()

    def counts(self, batch: Views) -> dict[str, float]:
        return dict.fromkeys(self.weights, float(len(batch.small) * self.model.encoder.config.patches))

    def flops(self, batch: Views) -> float:
        """Useful operations of a forward and a backward pass; the teacher and the upkeep are left out."""
        model, count = self.model, len(batch.small)
        halves = [
            of_pass(config, plan_of(config.picture_tokens, count, [], []))
            for config in (model.encoder.config, model.decoder.config)
        ]
        rows = count * model.encoder.config.patches
        layers = of_head(rows, linear_weights(model.to_code) + linear_weights(model.to_feature))
        search = 2 * rows * model.codebook.codes * model.codebook.width if self.upkeep.awake else 0
        maps = halves[1].patches  # unlike pixels, what the decoder embeds needs a gradient
        return float(sum(part.training for part in (*halves, layers)) + maps + search)
