"""Fault 12: a process that hangs ends by itself, and says where it was."""

import os
import sys
import time
from pathlib import Path

import pytest
from processes import ended, in_a_child

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Line, Steps, alike, run, saved

from beitctl.engine.dist import start
from beitctl.engine.guarding import heartbeat, watchdog
from beitctl.engine.guarding.heartbeat import Heartbeat

pytestmark = pytest.mark.fault(12)


class Stuck(Line):
    """Waits for ever in its third step, as for a rank that is gone."""

    steps = 0

    def forward(self, batch):
        self.steps += 1
        if self.steps == 3:
            waiting_for_a_rank_that_is_gone()
        return super().forward(batch)


def waiting_for_a_rank_that_is_gone():
    time.sleep(600)


def training(folder, minutes):
    run(folder, learner=Stuck(), steps=5, save_every_steps=1, hang_minutes=minutes)


def hung(folder):
    """Exit code of a process that hangs, forked from one that has done nothing else."""
    return ended(in_a_child(lambda: training(Path(folder) / "run", 0.05)))


def test_a_hang_ends_with_75_and_the_stacks(on_ranks, tmp_path):
    begun = time.monotonic()
    assert on_ranks(hung, 1, tmp_path) == [75]
    assert time.monotonic() - begun < 60
    stacks = (tmp_path / "run" / "stacks-rank-0.txt").read_text()
    assert "waiting_for_a_rank_that_is_gone" in stacks
    said = (tmp_path / "ranks" / "stderr-0.txt").read_text()
    assert "rank 0: no step in 0.05 minutes (train.hang_minutes)" in said


def test_what_was_saved_before_a_hang_is_gone_on_with(on_ranks, tmp_path):
    assert on_ranks(hung, 1, tmp_path) == [75]
    assert saved(tmp_path / "run")[-1] == "step-00000002"
    assert [step.number for step, _ in run(tmp_path / "run", steps=5)] == [3, 4, 5]


@pytest.mark.parametrize("minutes", [0, 30])
def test_a_run_that_gets_on_is_left_alone(tmp_path, minutes):
    assert len(run(tmp_path, steps=5, hang_minutes=minutes)) == 5


class Sleeping(Steps):
    """Rank 1 loads the third step until it is told to end."""

    def __init__(self, rank, note):
        super().__init__()
        self.rank, self.note = rank, note

    def __getitem__(self, step):
        while self.rank == 1 and step == 2:
            if self.note.exists():
                os._exit(0)
            time.sleep(0.05)
        return super().__getitem__(step)


def hang_as_rank(folder, note):
    """Rank 0 gives up after three seconds without a step, rank 1 never does."""
    heartbeat.EVERY_S = watchdog.EVERY_S = 0.05
    ranks = start()
    minutes = 0.05 if ranks.main else 0
    data, learner = Sleeping(ranks.rank, note), alike(ranks)
    run(folder, data, session={"ranks": ranks}, learner=learner, steps=5, hang_minutes=minutes)


def child_as_rank(folder):
    note = Path(folder) / "over"
    code = ended(in_a_child(lambda: hang_as_rank(folder, note)))
    note.touch()
    return code


def test_the_rank_that_stopped_first_is_named(on_ranks, tmp_path):
    assert on_ranks(child_as_rank, 2, tmp_path) == [75, 0]
    said = (tmp_path / "ranks" / "stderr-0.txt").read_text()
    assert "says where its threads are; behind: rank 1 (" in said
    assert ") at step 3, data, heard of " in said


def test_ranks_behind_are_named_in_order_and_those_without_a_sign_too(tmp_path):
    for rank, (step, phase) in enumerate([(7, "counts"), (7, "data"), (6, "save"), (7, "counts")]):
        beat = Heartbeat(tmp_path, rank)
        beat.at(step, phase)
        beat.write()
    parts = beat.behind(5).split("; ")
    assert [part.split(" ")[1] for part in parts[:2]] == ["2", "1"]
    assert parts[2] == "nothing was heard of rank 4"


def test_a_heartbeat_that_is_cut_off_is_none(tmp_path):
    Heartbeat(tmp_path, 0).write()
    (tmp_path / "heartbeat-rank-1.json").write_text('{"rank": 1, "st')
    assert Heartbeat(tmp_path, 0).behind(2) == "nothing was heard of rank 1"


def test_a_heartbeat_is_written_every_ten_seconds_at_most(tmp_path):
    beat = Heartbeat(tmp_path, 0)
    beat.write()
    beat.at(5, "step")
    beat.write()
    assert '"step": 0' in (tmp_path / "heartbeat-rank-0.json").read_text()
    beat.write(at_once=True)
    assert '"step": 5' in (tmp_path / "heartbeat-rank-0.json").read_text()
