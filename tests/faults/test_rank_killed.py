"""Fault 9: one of two ranks is killed; torchrun starts both again and the run goes on bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Heard, Points, alike, run

from beitctl.engine.dist import start

pytestmark = [pytest.mark.fault(9), pytest.mark.slow]
SCRIPT = f"""\
import os
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_rank_killed import trained

trained(sys.argv[1], deadly=True)
os._exit(0)  # as beitctl.cli.main: in finalizers threads of the collectives now and then end it with SIGABRT
"""


class Shares:
    """Two points a step for every rank; one of them ends rank 1 if it has not been restarted."""

    def __init__(self, rank, deadly):
        self.rank, self.deadly = rank, deadly

    def __getitem__(self, step):
        first_try = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if self.deadly and first_try and self.rank == 1 and step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return [Points(torch.tensor([1 + (step % 3) / 7, 0.5 + self.rank / 3]))]


def trained(folder, deadly):
    """Loss and weight of the steps of this process, to the last bit; also in a file of rank 0."""
    ranks = start()
    data, note = Shares(ranks.rank, deadly), Path(folder) / "losses.jsonl"
    Path(folder).mkdir(exist_ok=True)
    session = {"ranks": ranks, "warn": Heard(), "started": lambda step: _write(ranks, note, ["start", step])}
    for step, weight in run(
        folder, data, steps=12, save_every_steps=2, session=session, learner=alike(ranks)
    ):
        _write(ranks, note, [step.number, float(step.metrics()["loss"]).hex(), weight.hex()])
    ranks.stop()


def _write(ranks, note, row):
    if ranks.main:
        with note.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read(folder):
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [row for row in rows if row[0] != "start"], [row[1] for row in rows if row[0] == "start"]


def test_the_loss_curve_goes_on_bit_for_bit(on_ranks, tmp_path):
    on_ranks(trained, 2, tmp_path / "whole", False)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
    ]  # fmt: skip
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path / "cut")], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (whole, _), (cut, starts) = read(tmp_path / "whole"), read(tmp_path / "cut")
    assert starts[0] == 0
    assert starts[1] in (4, 6)  # that of step 6 may have been in the background still
    assert cut == whole[starts[1] :]
