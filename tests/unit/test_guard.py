"""What the guard makes of gradient norms."""

import json

import pytest
import torch
from small import training

from beitctl.engine.guarding.guard import Guard

CPU = torch.device("cpu")
NAN = float("nan")


def guarded(norms, every=10, first=1, guard=None, **settings):
    """Verdicts and warnings when these norms come one after the other, read every so many steps."""
    warned, verdicts = [], []
    guard = guard or Guard(training(9, log_every_steps=every, **settings), CPU, warned.append)
    for step, norm in enumerate(norms, first):
        guard.note(torch.tensor(norm))
        if step % every == 0:
            verdicts.append(guard.read(step))
    return [verdict.step for verdict in verdicts if verdict], warned, guard


def wavy(count):
    return [1.0 + 0.1 * (step % 7) for step in range(count)]


def test_three_in_a_row_are_found_in_the_middle_of_what_is_read():
    assert guarded([1, 1, NAN, NAN, NAN, 1, 1, 1, 1, 1])[0] == [5]


def test_a_row_goes_on_from_one_reading_to_the_next():
    assert guarded([1.0] * 8 + [NAN, NAN, float("inf")] + [1.0] * 9)[0] == [11]


def test_a_spike_is_judged_by_the_steps_before_it():
    assert guarded([*wavy(59), 50.0], on_spike="rollback")[0] == [60]
    assert guarded([*wavy(49), 50.0], on_spike="rollback")[0] == []


def test_a_norm_that_falls_is_no_spike():
    assert guarded([*wavy(59), 1e-6], on_spike="rollback")[0] == []


def test_a_norm_that_never_varied_may_double():
    assert guarded([1.0] * 59 + [2.0], on_spike="rollback")[0] == []


def test_a_norm_that_rises_slowly_is_no_spike():
    assert guarded([1.03**step for step in range(400)], on_spike="rollback")[0] == []


def test_warnings_are_a_hundred_steps_apart():
    norms = wavy(400)
    for place in (60, 100, 159, 161, 300):
        norms[place] = 100.0
    assert [text.split(",")[0] for text in guarded(norms)[1]] == [
        f"gradient norm 100 at step {step}" for step in (61, 162, 301)
    ]


@pytest.mark.parametrize("cut", [10, 60, 110])
def test_a_guard_that_is_restored_judges_like_one_that_went_on(cut):
    norms = wavy(120)
    for place in (3, 17, 29, 41, 53, 65, 77, 89, 101, 113):
        norms[place] = NAN
    norms[71] = 30.0
    whole = guarded(norms, on_spike="rollback")[0]
    first, _, guard = guarded(norms[:cut], on_spike="rollback")
    restored = Guard(training(9, log_every_steps=10, on_spike="rollback"), CPU, print)
    restored.restore(json.loads(json.dumps(guard.state())))
    assert whole == [72, 114]
    assert first + guarded(norms[cut:], first=cut + 1, guard=restored)[0] == whole


def test_what_is_forgiven_does_not_count_again():
    guard = guarded([NAN, 1.0] * 9, every=1)[2]
    fresh = Guard(training(9, log_every_steps=1), CPU, print)
    fresh.restore(guard.state(), forgive=True)
    assert guarded([NAN, 1.0] * 9, every=1, first=19, guard=fresh)[0] == []
    assert guarded([NAN], every=1, first=37, guard=fresh)[0] == [37]
