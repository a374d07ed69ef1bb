"""Fault 7: a data-loading process is killed, as the kernel does when memory runs out."""

import os
import signal
import sys
from pathlib import Path

import pytest
from torch.utils.data import dataloader

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Heard, Steps, run

pytestmark = pytest.mark.fault(7)


class Killing(Steps):
    """The first process that loads the fourth step is killed."""

    def __init__(self, folder):
        super().__init__()
        self.note = folder / "killed"

    def __getitem__(self, step):
        if step == 3 and not self.note.exists():
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(step)


def test_training_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    waiting = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (0.2,))  # torch looks for dead workers every 5 seconds
    heard = Heard()
    whole = run(tmp_path / "a", steps=8)
    found = run(tmp_path / "b", Killing(tmp_path), steps=8, workers=2, session={"warn": heard})
    assert [(step.number, w) for step, w in found] == [(step.number, w) for step, w in whole]
    ((code, text),) = heard.said
    assert code == "W303"
    assert text.startswith("a data-loading process died at step ")
