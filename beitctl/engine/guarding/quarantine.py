"""Examples that cannot be used: counted once over all ranks, listed in the run folder; too many end a run."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beitctl.engine.dist import Ranks
from beitctl.engine.saving import files
from beitctl.errors import DataError

LIST = "quarantine.jsonl"
"""File in the run folder: ``id``, ``reason`` and the first ``step`` of every such example, one a line."""
NAMED = 20
"""Most examples that the error names; the list has all."""


class Quarantine:
    """The examples of a run that could not be used so far. Every rank has the same."""

    def __init__(self, folder: Path, ranks: Ranks, share: float, examples: Mapping[str, int]) -> None:
        """An empty list.

        Args:
            folder: the run folder.
            ranks: all processes.
            share: how many examples of each stream may be unusable; one always may.
            examples: their number in every stream. Ids begin with the name of their stream and a slash.
        """
        self.path, self.ranks, self.share, self.examples = folder / LIST, ranks, share, examples
        self.reasons: dict[str, str] = {}
        """Why, by id."""

    def restore(self, step: int) -> None:
        """Take up the list of an interrupted run that goes on at a step; begin anew at step 0."""
        found: dict[str, str] = {}
        if self.ranks.main and step:
            with contextlib.suppress(FileNotFoundError):
                for line in self.path.read_text(encoding="utf-8").splitlines():
                    with contextlib.suppress(ValueError, KeyError):  # a last line that a crash cut off
                        row = json.loads(line)
                        found[row["id"]] = row["reason"]
        elif self.ranks.main:
            self.path.unlink(missing_ok=True)
        for part in self.ranks.gather_objects(found):
            self.reasons.update(part)

    def fresh(self, micro: Sequence[Any]) -> dict[str, str]:
        """Unusable examples in the batches of this rank that are not known yet, and why."""
        problems = (problem for batch in micro for problem in batch.problems)
        return {id: text for id, text in problems if id not in self.reasons}

    def take(self, fresh: Mapping[str, str], step: int) -> dict[str, str]:
        """Add what all ranks have found; every rank must call it at the same step. Gives what is new.

        Raises:
            DataError: more examples of a stream are unusable than the share allows; names them.
        """
        added: dict[str, str] = {}
        for part in self.ranks.gather_objects(dict(fresh)):
            added |= {id: reason for id, reason in part.items() if id not in self.reasons}
        self.reasons.update(added)
        if self.ranks.main:
            rows = [{"id": id, "reason": reason, "step": step} for id, reason in sorted(added.items())]
            files.append(self.path, rows)
        for stream, examples in self.examples.items():
            self._judge(stream, examples)
        return added

    def _judge(self, stream: str, examples: int) -> None:
        """Refuse a stream of which too much is unusable."""
        bad = sorted(id for id in self.reasons if id.startswith(f"{stream}/"))
        allowed = max(1.0, self.share * examples)
        if len(bad) > allowed:
            named = "".join(f"\n  {_named(id, self.reasons[id])}" for id in bad[:NAMED])
            more = f"\n  ... and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
            raise DataError(
                f"{len(bad)} of {examples} examples of '{stream}' cannot be used (allowed: {allowed:.0f}, "
                f"max_bad_share = {self.share:g}; all are in {self.path}). Remove them, or raise "
                f"max_bad_share:{named}{more}"
            )


def _named(id: str, reason: str) -> str:
    return reason if reason.startswith(id.partition("/")[2]) else f"{id}: {reason}"
