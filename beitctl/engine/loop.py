"""The one training loop: a generator, so that the stage owns the ``for``.

Per step: load, add up counts over all ranks (stop requests ride along), forward and backward of every pass
with losses divided by the global counts, clip, step, yield. Nothing in a step depends on the number of ranks.
"""

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from beitctl.config import TrainConfig
from beitctl.data.workers import steps
from beitctl.engine import optim
from beitctl.engine.checkpoint import Checkpoints
from beitctl.engine.dist import Ranks
from beitctl.engine.guard import Signals, worker_ignores_signals
from beitctl.engine.quarantine import Quarantine
from beitctl.engine.watchdog import Watchdog
from beitctl.errors import DivergedError, Interrupted, Stopped, UserError

STREAK = 3
"""Steps in a row without a finite gradient after which a run counts as diverged."""


class Trainable(Protocol):
    """The batch of a learner, as far as the loop cares."""

    def to(self, device: torch.device) -> Any: ...


@dataclass(frozen=True)
class Session:
    """Where and how a loop runs, besides its settings."""

    ranks: Ranks
    folder: Path
    """Checkpoints go to ``folder / "checkpoints"``."""
    identity: str = ""
    """What the run is; a checkpoint with another identity is refused."""
    resume: bool = True
    layers: int = 1
    """Blocks of the model, for layer-wise learning-rate decay."""
    examples: Mapping[str, int] = field(default_factory=dict)
    """Examples of every stream, for the share that may be unreadable."""
    started: Callable[[int], None] = lambda step: None
    """Called once with the step that the run starts from."""
    saved: Callable[[int, Path, float], None] = lambda step, path, seconds: None
    """Called after every checkpoint."""
    warn: Callable[[str], None] = lambda text: None
    """Called with what the user should know."""
    sampled: Callable[[int, Sequence[str]], None] = lambda step, ids: None
    """Called with the sorted ids of all samples of a step, over all ranks, if ``config.log_samples``."""


@dataclass(frozen=True)
class Step:
    """One finished optimizer step. Numbers stay on the device until ``metrics`` is called."""

    number: int
    """Steps done, this one included."""
    lr: float
    grad_norm: Tensor
    sums: Tensor
    """(terms, 2) losses and right predictions of this rank."""
    counts: tuple[float, ...]
    """Global number of predictions per term."""
    terms: tuple[str, ...]
    weights: tuple[float, ...]
    samples: float
    """Samples of the step, over all ranks."""
    seconds: float
    wait: float
    """Seconds of ``seconds`` spent waiting for data."""
    ranks: Ranks

    def metrics(self) -> dict[str, float]:
        """Losses and accuracies over all ranks, by name; every rank must call it on the same steps."""
        flat = self.ranks.sum(self.sums.flatten().tolist())
        found: dict[str, float] = {"loss": 0.0}
        for index, (term, count) in enumerate(zip(self.terms, self.counts, strict=True)):
            if count:
                found[f"{term}/loss"] = flat[2 * index] / count
                found[f"{term}/accuracy"] = flat[2 * index + 1] / count
                found["loss"] += self.weights[index] * found[f"{term}/loss"]
        return found | {
            "lr": self.lr,
            "grad_norm": float(self.grad_norm),
            "samples_per_s": self.samples / self.seconds,
            "data_wait": self.wait / self.seconds,
        }


@dataclass
class _Clock:
    """Wall-clock decisions; those of rank 0 count."""

    config: TrainConfig
    start: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)

    def save_due(self) -> bool:
        return time.monotonic() - self.saved > 60 * self.config.save_every_minutes

    def over(self) -> bool:
        limit = self.config.max_minutes
        return limit > 0 and time.monotonic() - self.start > 60 * limit


class _Loop:
    """State of one call of ``train``."""

    def __init__(self, learner: Any, config: TrainConfig, session: Session) -> None:
        self.learner, self.config, self.session = learner, config, session
        self.terms = tuple(learner.weights)
        self.weights = tuple(learner.weights.values())
        self.optimizer = optim.adamw(learner, config.optim, session.layers)
        self.checkpoints = Checkpoints(
            session.folder / "checkpoints", session.ranks, config.keep_checkpoints, session.warn
        )
        self.streak = torch.zeros((), device=session.ranks.device)
        self.quarantine = Quarantine(session.folder, session.ranks, config.max_bad_share, session.examples)
        self.clock = _Clock(config)

    def tensors(self) -> dict[str, Tensor]:
        return dict(optim.weights_and_state(self.learner, self.optimizer))

    def restore(self) -> int:
        """Load the newest checkpoint that verifies; returns the steps done."""
        found = self.checkpoints.newest() if self.session.resume else None
        if found is None:
            return 0
        if found.meta.get("identity") != self.session.identity:
            raise UserError(
                f"{found.path} is a checkpoint from another recipe (identity {found.meta.get('identity')!r}, "
                f"this run is {self.session.identity!r}); use another --out, or the recipe it came from"
            )
        self.checkpoints.load(found, self.tensors())
        return found.step

    def save(self, step: int) -> None:
        begun = time.monotonic()
        path = self.checkpoints.save(step, self.tensors(), {"identity": self.session.identity})
        self.clock.saved = time.monotonic()
        self.session.saved(step, path, self.clock.saved - begun)

    def agree(self, micro: Sequence[Any], signals: Signals) -> tuple[list[float], dict[str, float]]:
        """Counts of every term over all ranks and passes, and what the ranks wish, in one reduction."""
        counts = [0.0] * len(self.terms)
        for batch in micro:
            found = self.learner.counts(batch)
            counts = [total + found[term] for total, term in zip(counts, self.terms, strict=True)]
        fresh = self.quarantine.fresh(micro)
        main = self.session.ranks.main
        wishes = {
            "stop": float(signals.requested == "stop" or (main and self.clock.over())),
            "interrupt": float(signals.requested == "interrupt"),
            "save": float(main and self.clock.save_due()),
            "bad": float(len(fresh)),
            "samples": float(sum(len(batch.samples) for batch in micro)),
        }
        summed = self.session.ranks.sum([*counts, *wishes.values()])
        return summed[: len(counts)], dict(zip(wishes, summed[len(counts) :], strict=True))

    def tell_samples(self, number: int, micro: Sequence[Any]) -> None:
        """Say which samples a step was made of, if the settings ask for it."""
        logged = number in (1, self.config.steps) or number % self.config.log_every_steps == 0
        if self.config.log_samples and logged:
            ids = [id for batch in micro for id in batch.samples]
            found = self.session.ranks.gather_objects(ids)
            self.session.sampled(number, sorted(id for part in found for id in part))

    def step(self, micro: Sequence[Trainable], counts: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Forward, backward and update; returns the sums (terms, 2) and the gradient norm."""
        device = self.session.ranks.device
        totals = torch.zeros(len(self.terms), 2, device=device)
        for batch in micro:
            sums = self.learner(batch.to(device))
            loss = torch.stack(
                [
                    weight * sums[term][0] / max(1.0, count)
                    for term, weight, count in zip(self.terms, self.weights, counts, strict=True)
                ]
            ).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            totals += torch.stack([torch.stack([x.detach().float() for x in sums[t]]) for t in self.terms])
        norm = optim.clip(self.learner, self.config.optim.clip_norm)
        broken = (~torch.isfinite(norm)).float()
        self.streak = (self.streak + broken) * broken
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = broken  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if callable(after := getattr(self.learner, "after_step", None)):
            after()
        return totals, norm

    def check_finite(self, step: int) -> None:
        if float(self.streak) >= STREAK:
            raise DivergedError(
                f"no finite gradient in the last {float(self.streak):.0f} steps before step {step}; "
                "the weights were left as they are. Lower peak_lr, lengthen warmup_steps, or set clip_norm"
            )


def train(
    learner: nn.Module, data: Any, config: TrainConfig, session: Session
) -> Generator[Step, None, None]:
    """Train until ``config.steps``, resuming from the newest checkpoint; yields after every step.

    ``learner(batch)`` gives the ``Sums`` of every term, ``learner.counts(batch)`` what each is averaged over,
    and ``learner.weights`` their weights, the same terms in the same order on all ranks; a method
    ``after_step`` is called after every update, for what no gradient moves. ``data[step]`` gives the batches
    of this rank in one step. Close the generator when leaving it early.

    Raises:
        Stopped: SIGTERM, a ``stop`` file or the time limit; a checkpoint is written first.
        Interrupted: Ctrl-C; a checkpoint is written first.
        DataError: more examples than allowed cannot be read.
        DivergedError: gradients are not finite several steps in a row.
    """
    loop = _Loop(learner, config, session)
    begin = loop.restore()
    loop.quarantine.restore(begin)
    session.started(begin)
    last_save = begin
    watchdog = Watchdog(session.folder, session.ranks.rank, config.hang_minutes)
    with Signals(session.folder) as signals, watchdog:
        clock = time.monotonic()
        for index, micro in zip(
            range(begin, config.steps),
            steps(data, begin, config.steps, config.workers, worker_ignores_signals, _told(session)),
            strict=True,
        ):
            wait = time.monotonic() - clock
            counts, wishes = loop.agree(micro, signals)
            if wishes["stop"] or wishes["interrupt"]:
                if index > last_save:
                    loop.save(index)
                _leave(index, bool(wishes["interrupt"]))
            if wishes["bad"]:
                for id, text in loop.quarantine.take(loop.quarantine.fresh(micro), index + 1).items():
                    session.warn(f"skipped {id}: {text}")
            lr = optim.lr_at(index, config.steps, config.optim)
            optim.set_lr(loop.optimizer, lr)
            learner.train()
            totals, norm = loop.step(micro, counts)
            number = index + 1
            if number % config.log_every_steps == 0 or number == config.steps:
                loop.check_finite(number)
            loop.tell_samples(number, micro)
            if number % config.save_every_steps == 0 or number == config.steps or wishes["save"]:
                loop.save(number)
                last_save = number
            now = time.monotonic()
            watchdog.beat()
            yield Step(
                number, lr, norm, totals, tuple(counts), loop.terms, loop.weights, wishes["samples"],
                now - clock, wait, session.ranks,
            )  # fmt: skip
            watchdog.beat()
            clock = time.monotonic()


def _told(session: Session) -> Callable[[str], None]:
    """Where a rank says what only it knows: the log is that of rank 0."""

    def tell(text: str) -> None:
        os.write(2, f"rank {session.ranks.rank}: {text}\n".encode())

    return session.warn if session.ranks.main else tell


def _leave(step: int, interrupted: bool) -> None:
    text = f"stopped at step {step}, saved; run the same command again to continue"
    raise Interrupted(text) if interrupted else Stopped(text)


@torch.no_grad()
def evaluate(learner: Any, batches: Iterator[Any], ranks: Ranks) -> dict[str, float]:
    """Mean loss and accuracy of every term over batches of which every rank gives its share."""
    learner.eval()
    terms = tuple(learner.weights)
    totals = torch.zeros(len(terms), 3, dtype=torch.float64)
    for batch in batches:
        sums, counts = learner(batch.to(ranks.device)), learner.counts(batch)
        totals += torch.tensor([[*map(float, sums[t]), counts[t]] for t in terms], dtype=torch.float64)
    flat = ranks.sum(totals.flatten().tolist())
    found: dict[str, float] = {}
    for index, term in enumerate(terms):
        loss, hits, count = flat[3 * index : 3 * index + 3]
        if count:
            found |= {f"{term}/loss": loss / count, f"{term}/accuracy": hits / count}
    return found
