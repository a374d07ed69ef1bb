"""Fault 5: gradients that are not finite. Steps are left out; too many take a run back and past the data."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from line import Heard, Line, Numbered, Points, alike, run, saved

from beitctl.engine.dist import start
from beitctl.errors import DivergedError, Stopped

pytestmark = pytest.mark.fault(5)
LOGGED = {"log_samples": True, "log_every_steps": 1}


class Told:
    """Data index of every step as the session hears it; later ones replace earlier ones."""

    def __init__(self):
        self.index, self.order = {}, []

    def __call__(self, step, ids):
        self.index[step] = int(ids[0])
        self.order.append(step)


def trained(folder, data, *, steps=12, heard=None, told=None, **settings):
    session = {"warn": heard or Heard(), "sampled": told or Told()}
    return run(folder, data, steps=steps, session=session, **LOGGED | {"save_every_steps": 4} | settings)


def test_three_in_a_row_go_back_to_the_checkpoint_and_past_the_data(tmp_path):
    heard, told = Heard(), Told()
    found = trained(tmp_path, Numbered(bad=(5, 6, 7)), heard=heard, told=told)
    assert [step.number for step, _ in found] == [*range(1, 8), *range(5, 13)]
    assert told.index == {**{step: step - 1 for step in range(1, 5)}, **{s: s + 3 for s in range(5, 13)}}
    assert [code for code in heard.codes() if code != "W306"] == ["W305"]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_load_on_at_the_new_data(tmp_path, workers):
    told = Told()
    trained(tmp_path, Numbered(bad=(5, 6, 7)), told=told, workers=workers)
    assert told.order == [*range(1, 8), *range(5, 13)]
    assert told.index[12] == 15


def test_the_stage_hears_where_the_run_goes_on(tmp_path):
    steps = []
    session = {"returned": steps.append}
    run(tmp_path, Numbered(bad=(5, 6, 7)), steps=9, save_every_steps=4, session=session)
    assert steps == [4]


def test_a_rollback_is_a_line_in_the_run_folder(tmp_path):
    trained(tmp_path, Numbered(bad=(5, 6, 7)))
    (row,) = [json.loads(line) for line in (tmp_path / "rollbacks.jsonl").read_text().splitlines()]
    assert row.pop("time") > 1e9
    assert row == {
        "step": 8, "checkpoint": 4, "skipped": [4, 7], "data_offset": 4,
        "reason": "no finite gradient in 3 steps in a row up to step 8",
    }  # fmt: skip


def test_a_run_resumed_after_a_rollback_equals_the_uninterrupted_one(tmp_path):
    whole, rest = Told(), Told()
    straight = trained(tmp_path / "a", Numbered(bad=(5, 6, 7)), told=whole)
    with pytest.raises(Stopped, match="stopped at step 9, saved"):
        trained(tmp_path / "b", Stopping(bad=(5, 6, 7)))
    resumed = trained(tmp_path / "b", Numbered(bad=(5, 6, 7)), told=rest)
    assert rest.index.items() <= whole.index.items()
    assert resumed[-1][1] == straight[-1][1]


class Stopping(Numbered):
    """Asks for a stop with the batch of data index 13, well after the rollback."""

    def __getitem__(self, index):
        if index == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def test_ten_within_a_thousand_go_back_as_well(tmp_path):
    heard = Heard()
    trained(tmp_path, Numbered(bad=tuple(range(1, 21, 2))), heard=heard, steps=24)
    (text,) = [text for code, text in heard.said if code == "W305"]
    assert text.startswith("no finite gradient in 10 of 1000 steps up to step 20: back to step-000000")


def test_nine_within_a_thousand_are_survived(tmp_path):
    heard = Heard()
    found = trained(tmp_path, Numbered(bad=tuple(range(1, 18, 2))), heard=heard, steps=24)
    assert (len(found), heard.said) == (24, [])


def test_a_run_that_other_data_do_not_help_is_given_up(tmp_path):
    with pytest.raises(DivergedError) as caught:
        trained(tmp_path, Numbered(bad=tuple(range(5, 99))))
    assert caught.value.exit_code == 6
    assert "Other data after step-00000004 did not help after 1 rollbacks (they are in " in str(caught.value)
    assert saved(tmp_path) == ["step-00000004"]


def test_no_more_rollbacks_than_allowed(tmp_path):
    bad = (5, 6, 7, 13, 14, 15)  # the second three come at steps 10, 11 and 12
    with pytest.raises(DivergedError, match=r"No rollback is left \(train.max_rollbacks = 1\)"):
        trained(tmp_path, Numbered(bad=bad), steps=20, max_rollbacks=1)
    assert trained(tmp_path / "two", Numbered(bad=bad), steps=20, max_rollbacks=2)[-1][0].number == 20


def test_it_is_found_out_though_only_every_tenth_step_is_logged(tmp_path):
    told = Told()
    settings = {"log_every_steps": 10, "save_every_steps": 4}
    trained(tmp_path, Numbered(bad=(5, 6, 7)), told=told, steps=20, **settings)
    assert told.index == {1: 0, 10: 13, 20: 23}


def test_no_checkpoint_is_written_while_gradients_are_not_finite(tmp_path):
    steps = []
    session = {"saved": lambda step, path, seconds: steps.append(step)}
    run(tmp_path, Numbered(bad=(3, 4)), steps=9, save_every_steps=4, session=session, keep_checkpoints=9)
    assert steps == [6, 8, 9]


def test_the_batch_is_captured(tmp_path):
    trained(tmp_path, Numbered(bad=(5, 6, 7)))
    folder = tmp_path / "captures" / "step-00000008" / "rank-0"
    about = json.loads((folder / "about.json").read_text())
    assert about["losses_of_this_rank"] == {"fit": "inf", "never": 0.0}
    assert (about["step"], about["data_index"], about["samples"]) == (8, 7, ["7"])
    assert about["gradients_not_finite"] == ["w"]
    assert about["torch"] == torch.__version__
    assert np.load(folder / "batch.npz")["pass0.x"].tolist() == [float("inf")]


def test_the_first_block_that_is_not_finite_is_named(tmp_path):
    run(tmp_path, Numbered(bad=(5, 6, 7)), steps=9, save_every_steps=4, learner=Deep())
    about = json.loads((tmp_path / "captures/step-00000008/rank-0/about.json").read_text())
    assert about["first_block_not_finite"] == "blocks.1"


class Deep(Line):
    """Three blocks, of which the second overflows where the line's place is not finite."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(False), Block(True), Block(False)])

    def forward(self, batch):
        x = torch.where(batch.x.isfinite(), batch.x, 1000.0)
        for block in self.blocks:
            x = block(x)
        return super().forward(Points(x, batch.problems, batch.index))


class Block(torch.nn.Module):
    def __init__(self, overflows):
        super().__init__()
        self.overflows = overflows

    def forward(self, x):
        return torch.where(x > 100, x * 1e38, x) if self.overflows else x


def test_a_capture_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "captures").write_text("no folder")
    heard = Heard()
    assert trained(tmp_path, Numbered(bad=(5, 6, 7)), heard=heard)[-1][0].number == 12
    (text,) = [text for code, text in heard.said if code == "W306"]
    assert "the batch of step 8 could not be written: rank 0: " in text


def test_there_are_three_captures_at_most(tmp_path):
    bad = [index for first in (5, 13, 21, 29) for index in range(first, first + 3)]
    trained(tmp_path, Numbered(bad=bad), steps=40, max_rollbacks=9)
    assert len(list((tmp_path / "captures").iterdir())) == 3


def poisoned_as_ranks(folder):
    """Rank 1 alone draws what is not finite."""
    ranks, heard = start(), Heard()
    data = Numbered(bad=(5, 6, 7) if ranks.rank == 1 else ())
    session = {"ranks": ranks, "warn": heard}
    found = run(folder, data, steps=12, save_every_steps=4, session=session, learner=alike(ranks))
    ranks.stop()
    captured = json.loads((Path(folder) / f"captures/step-00000008/rank-{ranks.rank}/about.json").read_text())
    return [step.number for step, _ in found], found[-1][1], heard.codes(), captured["losses_of_this_rank"]


def test_one_rank_alone_takes_all_back(on_ranks, tmp_path):
    first, second = on_ranks(poisoned_as_ranks, 2, tmp_path)
    assert first[:3] == second[:3]
    assert first[0] == [*range(1, 8), *range(5, 13)]
    assert (first[3]["fit"], second[3]["fit"]) == (pytest.approx(1, abs=1), "inf")
