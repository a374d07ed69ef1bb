"""The training loop on the smallest learner: what is averaged, what stops it, what it survives."""

import gc
import json
import shutil
import time

import pytest
import torch
from line import Heard, Line, Steps, run, saved
from small import ALONE

from beitctl.config import OptimConfig
from beitctl.engine.loop import evaluate
from beitctl.errors import CapacityError, DataError, DivergedError, Stopped, UserError

BROKEN = ((float("inf"),),)


def test_it_trains_and_yields_every_step(tmp_path):
    found = run(tmp_path, steps=50, optim=OptimConfig(peak_lr=0.2))
    assert [step.number for step, _ in found] == list(range(1, 51))
    assert found[-1][1] == pytest.approx(2, abs=0.2)


def test_the_learning_rate_is_that_of_the_schedule(tmp_path):
    found = run(tmp_path, steps=4, optim=OptimConfig(peak_lr=0.2, warmup_steps=2))
    assert [step.lr for step, _ in found] == pytest.approx([0, 0.2, 0.2, 0.1])


def test_metrics_are_means_over_the_global_count(tmp_path):
    ((step, _),) = run(tmp_path, Steps((1.0,), (0.25, 0.5, 3.0)), steps=1)
    found = step.metrics()
    assert found["fit/loss"] == pytest.approx(4 * (1 + 0.0625 + 0.25 + 9) / 4)
    assert found["fit/accuracy"] == pytest.approx(1 / 4)


def test_the_loss_is_the_weighted_sum_of_the_terms(tmp_path):
    ((step, _),) = run(tmp_path, steps=1)
    assert step.metrics()["loss"] == pytest.approx(0.5 * step.metrics()["fit/loss"])


def test_a_term_without_predictions_is_left_out_of_the_metrics(tmp_path):
    ((step, _),) = run(tmp_path, steps=1)
    assert not [name for name in step.metrics() if name.startswith("never")]


def test_speed_counts_samples_of_all_passes(tmp_path):
    ((step, _),) = run(tmp_path, Steps((1.0,), (2.0, 3.0)), steps=1)
    assert step.metrics()["samples_per_s"] == pytest.approx(3 / step.seconds)


def test_several_passes_learn_what_one_does(tmp_path):
    whole = run(tmp_path / "a", Steps((1.0, 2.0, 3.0, 4.0)))
    parts = run(tmp_path / "b", Steps((1.0,), (2.0, 3.0, 4.0)))
    assert [w for _, w in parts] == pytest.approx([w for _, w in whole], rel=1e-6)
    assert [float(s.grad_norm) for s, _ in parts] == pytest.approx([float(s.grad_norm) for s, _ in whole])


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_leaves_the_weights_untouched(tmp_path, clip):
    optim = OptimConfig(peak_lr=0.1, clip_norm=clip)
    found = [w for _, w in run(tmp_path, Steps(special={1: BROKEN}), steps=3, optim=optim)]
    assert found[0] == found[1]
    assert found[2] != found[1]


def test_a_gradient_that_is_not_finite_leaves_the_moments_untouched(tmp_path):
    optim = OptimConfig(peak_lr=0.1, min_lr=0.1)
    good = run(tmp_path / "a", steps=2, optim=optim)
    bad = run(tmp_path / "b", Steps(special={1: BROKEN}), steps=3, optim=optim)
    assert bad[2][1] == good[1][1]


def test_three_in_a_row_end_the_run_with_exit_code_6(tmp_path):
    with pytest.raises(DivergedError) as caught:
        run(tmp_path, Steps(special=dict.fromkeys((2, 3, 4, 5), BROKEN)), steps=9)
    assert caught.value.exit_code == 6
    assert str(caught.value).startswith(
        "no finite gradient in 3 steps in a row up to step 5; steps without a finite gradient left the "
        "weights as they are. There is no checkpoint of this run to go back to. "
        "Lower peak_lr, lengthen warmup_steps, or set clip_norm"
    )


def test_no_step_without_a_finite_gradient_is_saved(tmp_path):
    with pytest.raises(DivergedError):
        run(tmp_path, Steps(BROKEN[0]), steps=3, save_every_steps=1, log_every_steps=3)
    assert saved(tmp_path) == []


def test_two_in_a_row_are_survived(tmp_path):
    assert len(run(tmp_path, Steps(special=dict.fromkeys((1, 2, 4, 5), BROKEN)), steps=7)) == 7


def bad(*ids):
    return Steps(problems={0: ids})


def test_one_unreadable_example_is_always_allowed(tmp_path):
    assert len(run(tmp_path, bad("a"), max_bad_share=0.0)) == 3


def test_too_many_unreadable_examples_are_named_with_the_setting(tmp_path):
    with pytest.raises(DataError) as caught:
        run(tmp_path, bad("b", "a"), max_bad_share=0.001)
    assert str(caught.value) == (
        "2 of 10 examples of 'x' cannot be used (allowed: 1, max_bad_share = 0.001; all are in "
        f"{tmp_path / 'quarantine.jsonl'}). Remove them, or raise max_bad_share:\n"
        "  a is broken\n  b is broken"
    )


def quarantined(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_unreadable_examples_are_listed_in_the_run_folder(tmp_path):
    run(tmp_path, Steps(problems={0: ("a",), 2: ("b", "a")}), max_bad_share=0.5)
    assert quarantined(tmp_path) == [
        {"id": "x/a", "reason": "a is broken", "step": 1},
        {"id": "x/b", "reason": "b is broken", "step": 3},
    ]


def test_the_list_of_unreadable_examples_is_taken_up_on_resume(tmp_path):
    run(tmp_path, Steps(problems={0: ("a",)}), steps=3)
    heard = Heard()
    data = Steps(problems={4: ("a",)})
    run(tmp_path, data, steps=6, session={"warn": heard})
    assert heard.texts == []
    with pytest.raises(DataError, match="2 of 10 examples of 'x'"):
        run(tmp_path, Steps(problems={7: ("b",)}), steps=9)


def test_each_stream_has_its_own_share_of_unreadable_examples(tmp_path):
    plenty = {"examples": {"x": 10, "y": 1_000_000}}
    with pytest.raises(DataError, match="2 of 10 examples of 'x' cannot be used"):
        run(tmp_path, bad("a", "b"), session=plenty)


def test_a_run_that_begins_anew_begins_a_new_list(tmp_path):
    run(tmp_path, Steps(problems={0: ("a",)}), steps=3)
    shutil.rmtree(tmp_path / "checkpoints")
    run(tmp_path, Steps(problems={1: ("b",)}), steps=3)
    assert [row["id"] for row in quarantined(tmp_path)] == ["x/b"]


def test_the_share_that_is_allowed_is_that_of_all_examples(tmp_path):
    assert len(run(tmp_path, bad("a", "b", "c"), max_bad_share=0.3)) == 3


def test_unreadable_examples_add_up_over_steps(tmp_path):
    named = r"2 of 10 examples of 'x' cannot be used .*\n  a is broken\n  b is broken"
    with pytest.raises(DataError, match=named):
        run(tmp_path, Steps(problems={0: ("a",), 2: ("b",)}))


def test_an_unreadable_example_counts_once_however_often_it_comes(tmp_path):
    assert len(run(tmp_path, Steps(problems=dict.fromkeys(range(3), ("a",))))) == 3


def test_an_unreadable_example_is_told_once_with_the_reason(tmp_path):
    heard = Heard()
    run(tmp_path, Steps(problems=dict.fromkeys(range(3), ("a",))), session={"warn": heard})
    assert heard.said == [("W301", "skipped x/a: a is broken")]


class Slow(Steps):
    def __getitem__(self, step):
        time.sleep(0.02)
        return super().__getitem__(step)


def test_the_time_limit_stops_the_run_with_a_checkpoint(tmp_path):
    with pytest.raises(Stopped) as caught:
        run(tmp_path, Slow(), steps=1000, max_minutes=0.1 / 60)
    (name,) = saved(tmp_path)
    assert caught.value.exit_code == 75
    step = int(name.removeprefix("step-"))
    assert 1 <= step < 20
    assert str(caught.value) == f"stopped at step {step}, saved; run the same command again to continue"


def test_a_stop_file_stops_the_run_and_is_removed(tmp_path):
    (tmp_path / "stop").touch()
    with pytest.raises(Stopped, match="stopped at step 0"):
        run(tmp_path)
    assert not (tmp_path / "stop").exists()


def test_a_run_goes_on_from_its_newest_checkpoint_as_if_never_stopped(tmp_path):
    whole = run(tmp_path / "a", steps=6)
    begun = []
    with pytest.raises(DataError):
        run(tmp_path / "b", Steps(problems={4: "xy"}), steps=6, save_every_steps=2)
    rest = run(tmp_path / "b", steps=6, session={"started": begun.append})
    assert begun == [4]
    assert [(s.number, w) for s, w in rest] == [(s.number, w) for s, w in whole[4:]]


def averaged(weights, decay):
    """The moving average of some weights that begins with 0, by definition."""
    found = 0.0
    for updates, weight in enumerate(weights):
        now = min(decay, (1 + updates) / (10 + updates))
        found = now * found + (1 - now) * weight
    return found


def test_with_a_moving_average_the_run_gives_that_and_saves_both(tmp_path):
    line = Line()
    weights = [weight for _, weight in run(tmp_path, learner=line, ema_decay=0.75)]
    assert line.w.item() == pytest.approx(averaged(weights, 0.75), rel=1e-6)
    assert line.w.item() != pytest.approx(weights[-1], rel=1e-3)


def test_a_moving_average_goes_on_where_the_run_was_stopped(tmp_path):
    once, twice = Line(), Line()
    run(tmp_path / "once", learner=once, steps=6, ema_decay=0.75)
    cut = Steps(problems={4: "xy"})
    with pytest.raises(DataError):
        run(tmp_path / "twice", cut, learner=twice, steps=6, save_every_steps=2, ema_decay=0.75)
    again = Line()
    run(tmp_path / "twice", learner=again, steps=6, ema_decay=0.75)
    assert torch.equal(again.w, once.w)


def test_a_finished_run_with_a_moving_average_still_gives_it(tmp_path):
    first, again = Line(), Line()
    run(tmp_path, learner=first, ema_decay=0.75)
    assert run(tmp_path, learner=again, ema_decay=0.75) == []
    assert torch.equal(again.w, first.w)


def test_a_finished_run_has_no_steps_left(tmp_path):
    run(tmp_path)
    assert run(tmp_path) == []


def test_without_resume_it_begins_anew_and_overwrites_nothing(tmp_path):
    run(tmp_path)
    begun = []
    with pytest.raises(UserError, match="already holds step-00000003"):
        run(tmp_path, session={"resume": False, "started": begun.append})
    assert begun == [0]


def test_a_checkpoint_of_another_identity_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError) as caught:
        run(tmp_path, session={"identity": "curve"})
    assert str(caught.value).endswith(
        "step-00000003 is a checkpoint from another recipe (identity 'line', this run is 'curve'); "
        "use another --out, or the recipe it came from"
    )


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path):
    heard = []
    run(tmp_path, steps=5, save_every_steps=2, session={"saved": lambda step, path, s: heard.append(step)})
    assert heard == [2, 4, 5]


def test_checkpoints_also_come_by_time(tmp_path):
    heard = []
    session = {"saved": lambda step, path, seconds: heard.append(step)}
    run(tmp_path, Slow(), steps=3, save_every_minutes=0.001 / 60, session=session)
    assert heard == [1, 2, 3]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, steps=5, save_every_steps=1, keep_checkpoints=2, keep_every_hours=0.0)
    assert saved(tmp_path) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_is_a_warning_but_for_the_last_checkpoint(tmp_path, monkeypatch, in_background):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    heard, done = Heard(), []
    settings = {"steps": 5, "save_every_steps": 2, "async_save": in_background}
    session = {"warn": heard, "saved": lambda step, path, seconds: done.append(step)}
    with pytest.raises(CapacityError, match=r"needs .* GB of free disk"):
        run(tmp_path, session=session, **settings)
    assert set(heard.codes()) == {"W302"}
    assert [step for step in (2, 4) for text in heard.texts if f"step {step} " in text] == [2, 4]
    assert done == []


def test_one_checkpoint_of_every_period_is_kept_besides(tmp_path):
    run(tmp_path, steps=5, save_every_steps=1, keep_checkpoints=2, keep_every_hours=1e6)
    assert saved(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]


def test_garbage_is_collected_at_checkpoints_alone_and_as_before_afterwards(tmp_path):
    learner, seen = Line(), []
    learner.after_step = lambda: seen.append(gc.isenabled())
    run(tmp_path, learner=learner, steps=3)
    assert seen == [True, False, False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_pace_is_that_of_all_steps_since_the_last_one_that_is_logged(tmp_path):
    steps = [step for step, _ in run(tmp_path, steps=6, log_every_steps=3)]
    assert [step.samples for step in steps] == [2, 2, 4, 2, 4, 6]


class Counted(Line):
    def flops(self, batch):
        return 1e12 * len(batch.x)


def test_figures_of_the_meter_are_among_the_metrics(tmp_path):
    ((step, _),) = run(tmp_path, learner=Counted(), steps=1)
    assert step.metrics()["tflops_per_gpu"] == pytest.approx(2 / step.seconds)


def test_a_learner_that_does_not_know_its_operations_has_no_such_figures(tmp_path):
    ((step, _),) = run(tmp_path, steps=1)
    assert "tflops_per_gpu" not in step.metrics()


def test_evaluation_gives_means_and_leaves_the_weights_alone():
    learner = Line()
    batches = [Steps((1.0, 0.25))[0][0], Steps((3.0,))[0][0]]
    assert evaluate(learner, iter(batches), ALONE) == {
        "fit/loss": pytest.approx(4 * (1 + 0.0625 + 9) / 3),
        "fit/accuracy": pytest.approx(1 / 3),
    }
    assert torch.equal(learner.w, torch.zeros(1))
    assert learner.w.grad is None


def test_evaluation_is_done_in_eval_mode():
    learner = Line().train()
    evaluate(learner, iter([]), ALONE)
    assert not learner.training
