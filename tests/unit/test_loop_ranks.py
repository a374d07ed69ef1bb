"""The training loop on two ranks: sums, decisions and errors are the same on both."""

import pytest
from line import Line, Steps, alike, run

from beitctl.engine.dist import start
from beitctl.engine.loop import evaluate
from beitctl.errors import DataError


def metrics_as_ranks(folder):
    """Metrics of a step and of an evaluation, with rank 0's points (1, 2) and rank 1's (3)."""
    ranks = start()
    data = Steps((1.0, 2.0) if ranks.main else (3.0,))
    ((step, _),) = run(folder, data, steps=1, session={"ranks": ranks}, learner=alike(ranks))
    held = evaluate(Line(), iter(data[0]), ranks)
    found = [step.metrics(), list(step.counts), step.samples, held]
    ranks.stop()
    return found


def test_metrics_are_those_of_all_ranks_on_every_rank(on_ranks, tmp_path):
    first, second = on_ranks(metrics_as_ranks, 2, tmp_path)
    for metrics, counts, samples, held in (first, second):
        assert metrics["fit/loss"] == held["fit/loss"] == pytest.approx(4 * (1 + 4 + 9) / 3)
        assert metrics["fit/accuracy"] == 0
        assert counts == [3, 0]
        assert samples == 3


def same_example_as_ranks(folder):
    """Both ranks meet the one unreadable example, in different epochs."""
    ranks = start()
    data = Steps(problems={ranks.rank: ("a",)})
    found = len(run(folder, data, session={"ranks": ranks}, learner=alike(ranks), max_bad_share=0.0))
    ranks.stop()
    return found


def test_an_unreadable_example_counts_once_though_two_ranks_meet_it(on_ranks, tmp_path):
    assert on_ranks(same_example_as_ranks, 2, tmp_path) == [3, 3]


def two_examples_as_ranks(folder):
    """Each rank meets an unreadable example of its own."""
    ranks = start()
    try:
        data = Steps(problems={0: (f"example-{ranks.rank}",)})
        run(folder, data, session={"ranks": ranks}, learner=alike(ranks))
    except DataError as error:
        return str(error)
    finally:
        ranks.stop()


def test_unreadable_examples_of_all_ranks_are_named_on_every_rank(on_ranks, tmp_path):
    first, second = on_ranks(two_examples_as_ranks, 2, tmp_path)
    assert first == second
    assert first.startswith("2 of 10 examples of 'x' cannot be used (allowed: 1")
    assert first.endswith("\n  example-0 is broken\n  example-1 is broken")
