"""The one training loop: a generator, so that the stage owns the ``for``.

Per step: load, add up counts over all ranks (stop requests ride along), forward and backward of every pass
with losses divided by the global counts, clip, step, yield. Nothing in a step depends on the number of ranks,
and nothing waits for the device but in steps that are logged or saved.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from beitctl.config import TrainConfig
from beitctl.data.workers import steps
from beitctl.engine import losses, optim, shard
from beitctl.engine.average import Average
from beitctl.engine.collector import Collector, worker_begins
from beitctl.engine.compiling import Recompiles
from beitctl.engine.dist import Ranks
from beitctl.engine.guarding import memory, replicas
from beitctl.engine.guarding.capture import Suspect, capture
from beitctl.engine.guarding.guard import Guard, Verdict
from beitctl.engine.guarding.quarantine import Quarantine
from beitctl.engine.guarding.rollback import Rollbacks, Shifted
from beitctl.engine.guarding.signals import Signals
from beitctl.engine.guarding.watchdog import Watchdog
from beitctl.engine.measuring.ceilings import remembered
from beitctl.engine.measuring.meter import Meter
from beitctl.engine.measuring.profiling import Window
from beitctl.engine.saving.saves import Saves
from beitctl.engine.session import Session
from beitctl.engine.step import Pace, Step
from beitctl.errors import DivergedError, Interrupted, Stopped


def train(
    learner: nn.Module, data: Any, config: TrainConfig, session: Session
) -> Generator[Step, None, None]:
    """Train until ``config.steps``, resuming from the newest checkpoint; yields after every step.

    ``learner(batch)`` gives the ``Sums`` of every term, ``learner.counts(batch)`` what each is averaged over,
    and ``learner.weights`` their weights, the same terms in the same order on all ranks. Where it has them,
    ``after_step`` is called after every update, for what no gradient moves, ``loaded`` after a checkpoint was
    loaded, ``flops(batch)`` for the operations of a pass. ``data[step]`` gives this rank's batches of a step.
    A run that diverges goes back to its last checkpoint and past the data since: step numbers then come
    again. Close the generator when leaving it early.

    Raises:
        Stopped: SIGTERM, a ``stop`` file or the time limit; a checkpoint is written first.
        Interrupted: Ctrl-C; a checkpoint is written first.
        DataError: more examples than allowed cannot be read.
        CapacityError: a step does not fit into memory, or the last checkpoint on the disk.
        DivergedError: gradients are not finite too often, or spike, and going back did not help; or the
            weights of the ranks no longer agree.
    """
    loop = _Loop(learner, data, config, session)
    with memory.explained(0, (), config, session):
        begin = loop.restore()
    session.started(begin)
    told = session.warns("W307", "run the step again with another window")
    window = Window(session.folder, session.ranks.rank, config.profile, told)
    with Signals(session.folder) as signals, loop.watchdog, loop.collector, window, loop.settled():
        while begin < config.steps and (verdict := (yield from loop.run(begin, signals, window))):
            begin = loop.recover(verdict)
    loop.average.give()


class _Loop:
    """State of one call of ``train``."""

    def __init__(self, learner: Any, data: Any, config: TrainConfig, session: Session) -> None:
        self.learner, self.data, self.config, self.session = learner, data, config, session
        self.ranks, folder = session.ranks, session.folder
        self.terms, self.weights = tuple(learner.weights), tuple(learner.weights.values())
        self.optimizer = optim.adamw(learner, config.optim, session.layers)
        self.average = Average(learner, config.ema_decay)
        self.saves = Saves(config, session, self.tensors, getattr(learner, "loaded", lambda: None))
        self.quarantine = Quarantine(folder, self.ranks, config.max_bad_share, session.examples)
        spiked = session.warns("W304", 'on_spike = "rollback" goes past such data')
        self.guard = Guard(config, self.ranks.device, spiked)
        self.rollbacks = Rollbacks(folder, self.ranks, config.max_rollbacks)
        self.offset = 0
        self.watchdog = Watchdog(folder, self.ranks.rank, config.hang_minutes, self.ranks.world)
        self.flops: Callable[[Any], float] | None = getattr(learner, "flops", None)
        self.meter = Meter(self.ranks.device, self.ranks.world, remembered(self.ranks.device))
        self.recompiles = Recompiles(session.warns_here("W309", "the run goes on, slower"))
        self.collector, self.pace, self.start = Collector(), Pace(), time.monotonic()

    def tensors(self) -> Mapping[str, Tensor]:
        """Everything that a checkpoint holds."""
        return {**optim.weights_and_state(self.learner, self.optimizer), **self.average.tensors()}

    def run(self, begin: int, signals: Signals, window: Window) -> Generator[Step, None, Verdict | None]:
        """Train from a step to the end, or to where the run turns out to have diverged."""
        data, end, workers = Shifted(self.data, self.offset), self.config.steps, self.config.workers
        died = self.session.warns_here("W303", "if it comes again, lower train.workers")
        batches: Any = steps(data, begin, end, workers, worker_begins, died)
        with contextlib.closing(batches):
            for number in range(begin + 1, end + 1):
                self.pace.start()
                self.watchdog.at(number, "data")
                micro = next(batches)
                self.pace.loaded()
                self.watchdog.at(number, "counts")
                counts, wishes = self.agree(micro, signals)
                if wishes["stop"] or wishes["interrupt"]:
                    self.leave(number - 1, bool(wishes["interrupt"]))
                if wishes["bad"]:
                    self.skip(micro, number)
                lr = optim.lr_at(number - 1, end, self.config.optim)
                optim.set_lr(self.optimizer, lr)
                self.watchdog.at(number, "step")
                with memory.explained(number, micro, self.config, self.session):
                    sums, norm = self.step(micro, counts)
                self.average.update(number)
                self.recompiles.check(number - begin)
                self.guard.note(norm)
                if verdict := self.judge_and_save(number, bool(wishes["save"])):
                    return verdict
                self.tell_samples(number, micro)
                self.pace.done(wishes["samples"], wishes["flops"])
                self.collector.freeze()
                window.step(number)
                self.watchdog.at(number, "log")
                self.watchdog.beat()
                yield self.told(number, lr, norm, sums, counts)
                self.watchdog.beat()
        return None

    def step(self, micro: Sequence[Any], counts: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Forward, backward and update; returns the sums (terms, 2) and the gradient norm."""
        device = self.ranks.device
        self.learner.train()
        totals = torch.zeros(len(self.terms), 2, device=device)
        weights, known = (dict(zip(self.terms, all_, strict=True)) for all_ in (self.weights, counts))
        for number, batch in enumerate(micro, 1):
            shard.last_pass(self.learner, number == len(micro))
            sums = self.learner(batch.to(device))
            loss = losses.weighted(sums, weights, known)
            loss.backward()  # type: ignore[no-untyped-call]
            totals += torch.stack([torch.stack([x.detach().float() for x in sums[t]]) for t in self.terms])
        norm = optim.clip(self.learner, self.config.optim.clip_norm)
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if callable(after := getattr(self.learner, "after_step", None)):
            after()
        return totals, norm

    def agree(self, micro: Sequence[Any], signals: Signals) -> tuple[list[float], dict[str, float]]:
        """Counts of every term over all ranks and passes, and what the ranks wish, in one reduction."""
        main, limit = self.ranks.main, 60 * self.config.max_minutes
        over = limit > 0 and time.monotonic() - self.start > limit
        wishes = {
            "stop": float(signals.requested == "stop" or (main and over)),
            "interrupt": float(signals.requested == "interrupt"),
            "save": float(main and self.saves.late()),
            "bad": float(len(self.quarantine.fresh(micro))),
            "samples": float(sum(len(batch.samples) for batch in micro)),
            "flops": float(sum(map(self.flops, micro))) if self.flops else 0.0,
        }
        summed, terms = self.ranks.sum([*self.counts(micro), *wishes.values()]), len(self.terms)
        return summed[:terms], dict(zip(wishes, summed[terms:], strict=True))

    def counts(self, micro: Sequence[Any]) -> list[float]:
        """What this rank's passes add to the counts of every term."""
        found = [self.learner.counts(batch) for batch in micro]
        return [float(sum(counts[term] for counts in found)) for term in self.terms]

    def skip(self, micro: Sequence[Any], step: int) -> None:
        """Tell of examples that could not be used; too many end the run."""
        for id, text in self.quarantine.take(self.quarantine.fresh(micro), step).items():
            self.session.warn("W301", f"skipped {id}: {text}", "replace it, or leave it: the run goes on")

    def logged(self, number: int) -> bool:
        """Whether a step is one of those that are logged."""
        return number in (1, self.config.steps) or number % self.config.log_every_steps == 0

    def judge_and_save(self, number: int, wished: bool) -> Verdict | None:
        """Save when it is due, but not while the run may be diverging; gives the verdict if it has."""
        last, saves = number == self.config.steps, self.saves
        saves.due = saves.due or last or wished or number % self.config.save_every_steps == 0
        if (saves.due or self.logged(number)) and (verdict := self.judge(number)):
            return verdict
        if saves.due and (last or not self.guard.streak):
            self.watchdog.at(number, "save")
            saves.save(number, self.meta(), last=last)
            self.collector.collect()
        saves.settle()
        return None

    def judge(self, number: int) -> Verdict | None:
        """Read the gradient norms and compare them between ranks; the first verdict of any rank counts."""
        self.watchdog.at(number, "check")
        verdict = self.guard.read(number)
        if self.ranks.world == 1:
            return verdict
        seen = {"gradient norm": self.guard.latest}
        if (norm := replicas.weight_norm(self.learner)) is not None:
            seen["norm of the weights"] = float(norm)
        found = self.ranks.gather_objects({"seen": seen, "verdict": vars(verdict) if verdict else None})
        replicas.check_same(number, [one["seen"] for one in found])
        return next((Verdict(**one["verdict"]) for one in found if one["verdict"]), None)

    def meta(self) -> dict[str, Any]:
        """What the run goes on with besides its tensors."""
        return {"data_offset": self.offset, "guard": self.guard.state()}

    def restore(self) -> int:
        """Go on from the newest checkpoint that verifies; returns the steps done."""
        found = self.saves.restore()
        if found is not None:
            self.guard.restore(found.meta.get("guard", {}))
            self.offset = int(found.meta.get("data_offset", 0))
        begin = found.step if found else 0
        self.quarantine.restore(begin)
        return begin

    def recover(self, verdict: Verdict) -> int:
        """Capture what a run diverged on and load the newest checkpoint; returns the step to go on from."""
        index, warns = verdict.step - 1, self.session.warns
        micro = Shifted(self.data, self.offset)[index]
        counts = dict(zip(self.terms, self.ranks.sum(self.counts(micro)), strict=True))
        suspect = Suspect(verdict, index + self.offset, micro, counts)
        capture(self.learner, suspect, self.session.folder, self.ranks, warns("W306", "look at its samples"))
        found = self.saves.newest()
        offset = self.rollbacks.take(verdict, found, self.offset)
        assert found is not None
        self.saves.load(found)
        self.guard.restore(found.meta.get("guard", {}), forgive=True)
        past = f"back to {found.path.name}, and past the data of {offset - self.offset} steps"
        warns("W305", "if it comes again, lower peak_lr or set clip_norm")(f"{verdict.reason}: {past}")
        self.offset = offset
        self.session.returned(found.step)
        return found.step

    def leave(self, step: int, interrupted: bool) -> None:
        """Save what is not saved yet, unless it has diverged, and end politely."""
        self.saves.settle(wait=True)
        told = "saved"
        if step and self.saves.committed != step:
            if verdict := self.judge(step):
                told = f"not saved ({verdict.reason})"
            else:
                self.saves.save(step, self.meta(), last=True)
        text = f"stopped at step {step}, {told}; run the same command again to continue"
        raise Interrupted(text) if interrupted else Stopped(text)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """A checkpoint that is being written is finished before the loop is left, but not if it is killed."""
        try:
            yield
        except (Exception, GeneratorExit):
            with contextlib.suppress(DivergedError):  # that of the loop comes first
                self.saves.settle(wait=True)
            raise

    def tell_samples(self, number: int, micro: Sequence[Any]) -> None:
        """Say which samples a step was made of, if the settings ask for it."""
        if self.config.log_samples and self.logged(number):
            found = self.ranks.gather_objects([id for batch in micro for id in batch.samples])
            self.session.sampled(number, sorted(id for part in found for id in part))

    def told(self, number: int, lr: float, norm: Tensor, sums: Tensor, counts: Sequence[float]) -> Step:
        """What the stage hears of a step."""
        pace = self.pace
        if self.logged(number):
            self.pace = Pace()
        figures = functools.partial(self.meter.figures, pace.flops, pace.seconds) if self.flops else dict
        return Step(
            number, lr, norm, sums, tuple(counts), self.terms, self.weights, pace.samples, pace.seconds,
            pace.wait, self.ranks, figures,
        )  # fmt: skip


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
