"""The codebook of VQ-KD, and what keeps it alive while it is trained.

The codes follow an exponential moving average of the vectors assigned to them (BEiT v2, arXiv:2208.06366,
section 2.1; no gradient reaches them). The released code stops there, and codes that nothing uses stay dead.
Letters: B pictures, N patches, K codes, D width of a code, P vectors in the pool.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

LLOYD_STEPS = 10
CHUNK = 4096
"""Vectors compared with all codes at a time."""
SHARE_DECAY = 0.9
TEMPERATURE = 0.05
"""Of the soft assignment in the entropy term."""


class Codebook(nn.Module):
    """K unit vectors of width D."""

    vectors: Tensor
    ready: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.codes, self.width = codes, width
        self.register_buffer("vectors", torch.empty(codes, width))
        self.register_buffer("ready", torch.empty((), dtype=torch.int64))

    def reset_buffers(self) -> None:
        """An empty codebook."""
        self.vectors.zero_()
        self.ready.zero_()

    def assign(self, z: Tensor) -> Tensor:
        """(n, D) unit vectors to the indices (n,) of their closest codes; in fp32: codes can lie close."""
        with torch.autocast(z.device.type, enabled=False):
            return (z.float() @ self.vectors.T).argmax(-1)


@dataclass(frozen=True)
class Rules:
    """How a codebook is trained."""

    decay: float = 0.99
    """Moving-average decay of the codes."""
    start: Literal["k-means++", "random"] = "k-means++"
    """First centres of the k-means that gives the first codes; ``random`` is the released code's."""
    start_after: int = 0
    """Steps without the codebook, at least one: k-means needs the vectors of a whole step."""
    revive_after: int = 0
    """Steps without use after which a code moves to a recent vector far from all codes; 0: never."""
    pool: int = 0
    """Recent vectors to keep, P; 0: four for every code, at least 4096."""
    seed: int = 0


class Upkeep(nn.Module):
    """Trains a codebook: gathers statistics in every forward pass, moves the codes after every step.

    Everything follows from the pictures of a step and their places in it, never from how ranks and passes
    share them.

    Args:
        book: the codebook.
        rules: how it is trained.
        samples: pictures of a step, over all ranks and passes.
    """

    usage: Tensor
    idle: Tensor
    share: Tensor
    pool: Tensor
    pooled: Tensor
    steps: Tensor

    def __init__(self, book: Codebook, rules: Rules, samples: int) -> None:
        super().__init__()
        self.rules, self.samples, codes = rules, samples, book.codes
        size = rules.pool or max(4 * codes, CHUNK)
        self._book = [book]  # in a list: the model owns it
        self.register_buffer("usage", torch.empty(codes))
        self.register_buffer("idle", torch.empty(codes, dtype=torch.int64))
        self.register_buffer("share", torch.empty(codes))
        self.register_buffer("pool", torch.empty(size, book.width))
        self.register_buffer("pooled", torch.empty((), dtype=torch.int64))
        self.register_buffer("steps", torch.empty((), dtype=torch.int64))
        self._pending: dict[str, Tensor] = {}
        self._soft: Tensor | None = None
        self._known: dict[str, int] | None = None

    @property
    def book(self) -> Codebook:
        """The codebook."""
        return self._book[0]

    def reset_buffers(self) -> None:
        """Nothing was seen yet."""
        for buffer in (self.usage, self.idle, self.pool, self.pooled, self.steps):
            buffer.zero_()
        self.share.fill_(1 / len(self.share))
        self.loaded()

    def loaded(self) -> None:
        """Buffers hold other values now: forget what was known of them, and passes without a step."""
        self._pending, self._soft, self._known = {}, None, None

    @property
    def awake(self) -> bool:
        """Whether there are codes; before, the encoder trains without them."""
        return bool(self._now()["ready"])

    @property
    def recent(self) -> Tensor:
        """(n, D) the vectors in the pool, at most P."""
        return self.pool[: self._now()["pooled"]]

    def _now(self) -> dict[str, int]:
        """Counters as Python numbers, read from the device once: a step must not wait for it."""
        if self._known is None:
            self._known = {
                "ready": int(self.book.ready), "steps": int(self.steps), "pooled": int(self.pooled),
            }  # fmt: skip
        return self._known

    def chosen(self, places: Tensor, patches: int) -> Tensor:
        """(B, m) numbers of the patches whose vectors go to the pool, by the pictures' places in the step."""
        now = self._now()
        wanted = len(self.pool) if now["pooled"] < len(self.pool) else max(1, len(self.pool) // 8)
        per_picture = min(patches, -(-wanted // self.samples))
        generator = torch.Generator().manual_seed(self.rules.seed * 1_000_003 + now["steps"])
        every = torch.rand(self.samples, patches, generator=generator).argsort(1)[:, :per_picture]
        return every.to(places.device, non_blocking=True)[places]

    @torch.no_grad()
    def see(self, z: Tensor, indices: Tensor | None, places: Tensor, chosen: Tensor) -> None:
        """Take note of one forward pass.

        Args:
            z: unit vectors (B, N, D).
            indices: their codes (B, N), or None while there are none.
            places: (B,) place of every picture in its step, from 0.
            chosen: of ``chosen``.
        """
        book, z = self.book, z.detach().float()
        if not self._pending:
            rows = z.new_zeros(self.samples, chosen.shape[1], book.width)
            self._pending = {
                "rows": rows, "counts": z.new_zeros(book.codes), "sums": torch.zeros_like(book.vectors),
            }  # fmt: skip
        self._pending["rows"][places] = z.gather(1, chosen[..., None].expand(-1, -1, book.width))
        if indices is not None:
            flat = indices.flatten()
            ones = torch.ones_like(
                flat, dtype=self._pending["counts"].dtype
            )  # bincount would wait for the device
            self._pending["counts"].index_add_(0, flat, ones)
            self._pending["sums"].index_add_(0, flat, z.flatten(0, 1))

    def unevenness(self, z: Tensor) -> Tensor:
        """(n,) how much each of the vectors (n, D) adds to codes that are in use already, in nats.

        The sum over k of p_k log(K u_k), with p the soft assignment of a vector and u its running mean over
        all vectors: its gradient is that of the negative entropy of the mean assignment, and it adds up over
        ranks. Zero where all codes are in even use.
        """
        with torch.autocast(z.device.type, enabled=False):
            soft = (z.float() @ self.book.vectors.T / TEMPERATURE).softmax(-1)
            seen = soft.detach().sum(0)
            self._soft = seen if self._soft is None else self._soft + seen
            return soft @ (self.share * self.book.codes).clamp(min=1e-6).log()

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the codes by what all ranks saw in the step; the first time, find them."""
        pending, self._pending = self._pending, {}
        soft, self._soft = self._soft, None
        if not pending:
            return
        if soft is not None:
            _add_up(soft)
            self.share.lerp_(soft.nan_to_num() / soft.sum().clamp(min=1), 1 - SHARE_DECAY)
        for value in pending.values():
            _add_up(value)
        now = self._now()
        now["steps"] += 1
        self.steps.fill_(now["steps"])
        self._keep(pending["rows"].flatten(0, 1))
        if now["ready"]:
            self._follow(pending["counts"], pending["sums"])
        elif now["steps"] >= max(1, self.rules.start_after):
            self._start()

    def _keep(self, rows: Tensor) -> None:
        """Put vectors into the pool, over the oldest."""
        now, size = self._now(), len(self.pool)
        rows = rows[:size].nan_to_num()
        places = (torch.arange(len(rows), device=rows.device) + now["pooled"]) % size
        self.pool[places] = rows
        now["pooled"] += len(rows)
        self.pooled.fill_(now["pooled"])

    def _start(self) -> None:
        """k-means on the pool, on rank 0, for all ranks.

        The released code clusters on each rank apart and so starts with as many codebooks as ranks.
        """
        now, book = self._now(), self.book
        known = self.recent
        generator = torch.Generator().manual_seed(self.rules.seed)
        spread = self.rules.start == "k-means++"
        centres = spread_out(known, book.codes, generator) if spread else picked(known, book.codes, generator)
        book.vectors.copy_(lloyd(known, centres))
        _agree(book.vectors)
        book.ready.fill_(1)
        now["ready"] = 1

    def _follow(self, counts: Tensor, sums: Tensor) -> None:
        """Move every used code toward the mean of its vectors; wake codes that were idle for too long."""
        book, decay = self.book, self.rules.decay
        means = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
        moved = F.normalize(decay * book.vectors + (1 - decay) * means, dim=-1)
        used = (counts > 0) & torch.isfinite(sums).all(-1)  # a step without finite numbers changes nothing
        book.vectors.copy_(torch.where(used[:, None], moved, book.vectors))
        self.usage += counts
        self.idle.copy_(torch.where(used, 0, self.idle + 1))
        after = self.rules.revive_after
        if after and self._now()["steps"] % max(1, after // 4) == 0:
            self._revive(after)

    def _revive(self, after: int) -> None:
        """Put idle codes on vectors of the pool, those far from all codes first, with some luck."""
        book, now = self.book, self._now()
        known = self.recent
        generator = torch.Generator().manual_seed(self.rules.seed * 1_000_003 + now["steps"] + 1)
        luck = -torch.rand(len(known), generator=generator).clamp(1e-9).log().to(known.device)
        distance = (1 - nearest(known, book.vectors)[1]).clamp(min=1e-9)
        order = (distance / luck.clamp(min=1e-9)).argsort(descending=True)
        dead = self.idle >= after
        turn = (dead.cumsum(0) - 1).clamp(min=0) % len(known)
        book.vectors.copy_(torch.where(dead[:, None], known[order[turn]], book.vectors))
        _agree(book.vectors)
        self.idle.copy_(torch.where(dead, 0, self.idle))


def nearest(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Number and cosine (n,) each of the closest of (K, D) unit centres to (n, D) unit vectors."""
    found = [(part @ centres.T).max(-1) for part in torch.split(vectors, CHUNK)]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


def picked(vectors: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """K random vectors, distinct as long as there are enough."""
    order = torch.randperm(len(vectors), generator=generator)
    return vectors[order[torch.arange(codes) % len(vectors)].to(vectors.device)].clone()


def spread_out(vectors: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """K vectors far from one another: k-means++ (Arthur and Vassilvitskii 2007).

    Each is drawn with a chance that grows as its squared distance to the closest of those before it, which
    for unit vectors is 2 - 2 cos.
    """
    draws = torch.rand(codes, generator=generator).double().to(vectors.device)
    chosen = torch.empty(codes, dtype=torch.int64, device=vectors.device)
    chosen[0] = (draws[0] * len(vectors)).long()
    far = torch.full((len(vectors),), 2.0, device=vectors.device)
    for number in range(1, codes):
        latest = vectors[chosen[number - 1]]
        far = torch.minimum(far, (1 - vectors @ latest).clamp(min=0))
        line = far.double().cumsum(0)
        chosen[number] = torch.searchsorted(line, draws[number] * line[-1]).clamp(max=len(vectors) - 1)
    return vectors[chosen].clone()


def lloyd(vectors: Tensor, centres: Tensor) -> Tensor:
    """Ten steps of k-means on the unit sphere; a centre without vectors stays where it is."""
    for _ in range(LLOYD_STEPS):
        numbers, _ = nearest(vectors, centres)
        sums = torch.zeros_like(centres).index_add_(0, numbers, vectors)
        filled = torch.bincount(numbers, minlength=len(centres)) > 0
        centres = torch.where(filled[:, None], F.normalize(sums, dim=-1), centres)
    return centres


def perplexity(counts: Tensor) -> float:
    """Exp of the entropy of a usage histogram: the number of codes in even use that would be as varied."""
    share = counts.double() / counts.sum().clamp(min=1)
    return float(torch.special.entr(share).sum().exp())


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _add_up(value: Tensor) -> None:
    """Sum over all ranks, in place."""
    if _several():
        dist.all_reduce(value)


def _agree(value: Tensor) -> None:
    """The value of rank 0 on all ranks, in place."""
    if _several():
        dist.broadcast(value, 0)
