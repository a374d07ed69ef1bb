"""How far every rank is, in files: a hang then names the rank that stopped first."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from beitctl.replacing import replace_file

EVERY_S = 10.0
"""Seconds between two writes."""
PHASES = ("data", "counts", "step", "check", "save", "log")
"""What happens in a step, in this order."""


class Heartbeat:
    """Where this rank is; ``write`` puts it into ``heartbeat-rank-N.json`` of the run folder."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.step, self.phase = 0, PHASES[0]
        self._written = float("-inf")

    def at(self, step: int, phase: str) -> None:
        """Say what this rank is about to do; costs nothing."""
        self.step, self.phase = step, phase

    def write(self, *, at_once: bool = False) -> None:
        """Write the file, but not oftener than every ``EVERY_S`` seconds; a full disk is no reason to end."""
        now = time.monotonic()
        if not at_once and now - self._written < EVERY_S:
            return
        self._written = now
        body = {
            "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "step": self.step,
            "phase": self.phase, "time": time.time(),
        }  # fmt: skip
        path = self.folder / f"heartbeat-rank-{self.rank}.json"
        with contextlib.suppress(OSError):
            replace_file(path, json.dumps(body).encode())

    def behind(self, world: int) -> str:
        """Which ranks are behind the furthest one, and what they were about; empty if none is."""
        found = [body for rank in range(world) if (body := _read(self.folder, rank))]
        absent = sorted(set(range(world)) - {body["rank"] for body in found})
        places = [(body["step"], PHASES.index(body["phase"])) for body in found]
        late = [body for body, place in zip(found, places, strict=True) if place < max(places)]
        parts = [
            f"rank {body['rank']} ({body['host']}, process {body['pid']}) at step {body['step']}, "
            f"{body['phase']}, heard of {max(0.0, time.time() - body['time']):.0f} s ago"
            for body in sorted(late, key=lambda body: (body["step"], PHASES.index(body["phase"])))
        ]
        return "; ".join(parts + [f"nothing was heard of rank {rank}" for rank in absent])


def _read(folder: Path, rank: int) -> dict[str, Any] | None:
    """A rank's file, if it is there and whole."""
    try:
        body = json.loads((folder / f"heartbeat-rank-{rank}.json").read_text(encoding="utf-8"))
        whole = body["rank"] == rank and body["phase"] in PHASES and body["step"] + body["time"] >= 0
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return dict(body) | {"host": body.get("host"), "pid": body.get("pid")} if whole else None
