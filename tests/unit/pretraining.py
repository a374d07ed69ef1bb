"""The stage pretrain on the smallest model, and what a run of it leaves."""

import json
from pathlib import Path
from typing import Any

import torch
from small import MODEL, coloured, training

from beitctl.api import Job
from beitctl.checkpoints.native import read_model
from beitctl.config import OptimConfig
from beitctl.report.events import EventLog
from beitctl_plugins.stages.pretrain import ObjectiveTable, Pretrain
from beitctl_plugins.tasks.masked import MaskedImage

PICTURES = coloured("red", "blue", "red", "blue")
STILL = training(1, optim=OptimConfig(peak_lr=1e-9, warmup_steps=1), seed=5)
"""One step that leaves the weights where they begin."""


def objective(task: Any = None, source: Any = PICTURES, **settings: Any) -> ObjectiveTable:
    return ObjectiveTable(task=task or MaskedImage(min_block=2), source=source, samples=4, **settings)


def stage(init: Any = "", *, task: Any = None, **settings: Any) -> Pretrain:
    """The stage with one objective, which takes one step that moves nothing."""
    made = {"model": MODEL, "train": STILL, "objectives": {"image": objective(task)}, "init": str(init)}
    return Pretrain(**made | settings)


def run(folder: Path, made: Pretrain, main: bool = True) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    """Result, weights that were written, and notes in the log; the latter two on the main process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"stage": "pretrain", "recipe": "small", "run": "1", "json_stdout": False, "quiet": True}
    log = EventLog(folder, active=main, **settings)
    with log:
        result = made.run(Job(folder, log))
    if not main:
        return result, {}, []
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    notes = [event["message"] for event in events if event["event"] == "note"]
    return result, read_model(folder).tensors, notes


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether weights are equal but for a step that moves nothing."""
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
