"""Held-out examples: who answers for which, what is left out, intervals, predictions on disk."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import ALONE, Given, Record, coloured, stored, tools

from beitctl.api import Example, Job, Measured
from beitctl.checkpoints.native import read_model
from beitctl.data.loader import Stream
from beitctl.engine.dist import start
from beitctl.engine.exchange import gathered, on_host
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.errors import DataError
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages import measuring
from beitctl_plugins.tasks.classification import Classification

LABELS = ("blue", "red")
BROKEN = Example("torn", b"torn", label="red")


def held(folder, source, ranks, size=2, workers=0):
    """What the classifier in a folder says of a source."""
    found = read_model(folder)
    made = replace(tools(labels=LABELS), train=False, model=found.model)

    def make():
        return MultiwayLearner(Multiway(found.model), [Objective("task", Classification())], {"task": made})

    learner = measuring.whole(make, found.tensors, ranks, torch.float32)
    stream = Stream("task", Classification(), source.open(), 1, made)
    return measuring.outputs(learner, stream, ranks, size, workers)


def seven():
    pictures = coloured("red", "blue", "red", "red", "blue", "red").examples
    return Given(examples=(*pictures[:3], BROKEN, *pictures[3:]))


def logits_of(folder):
    """Logits on rank 0 (elsewhere nothing), ids and what was left out, as JSON."""
    ranks = start()
    found = held(Path(folder), seven(), ranks)
    said = torch.cat(found.outputs).tolist() if ranks.main else []
    return said, [example.id for example in found.examples], found.left_out


@pytest.mark.parametrize("world", [2, 4])
def test_outputs_do_not_depend_on_the_number_of_ranks(world, on_ranks, tmp_path):
    folder = stored(tmp_path / "model", "classification", LABELS)
    alone = held(folder, seven(), ALONE)
    first, *others = on_ranks(logits_of, world, folder)
    assert torch.allclose(torch.tensor(first[0]), torch.cat(alone.outputs), atol=1e-6)
    assert first[1] == [example.id for example in alone.examples]
    assert all(said == [] for said, _, _ in others)
    assert all(rest[1:] == first[1:] for rest in others)


def test_an_example_that_cannot_be_read_is_named_and_the_others_keep_their_order(tmp_path):
    found = held(stored(tmp_path, "classification", LABELS), seven(), ALONE)
    assert len(found.examples) == 6
    assert [line.split(":")[0] for line in found.left_out] == ["torn"]


def test_worker_processes_give_the_same(tmp_path):
    folder = stored(tmp_path, "classification", LABELS)
    assert torch.equal(
        torch.cat(held(folder, seven(), ALONE, workers=2).outputs),
        torch.cat(held(folder, seven(), ALONE).outputs),
    )


def broken_on_rank_one(folder):
    """Rank 1 has no example that can be read; says how many are left."""
    source = Given(examples=(*coloured("red", "blue").examples, BROKEN, replace(BROKEN, id="torn-2")))
    return len(held(Path(folder), source, start()).examples)


def test_a_rank_without_a_usable_example_does_no_harm(on_ranks, tmp_path):
    assert on_ranks(broken_on_rank_one, 2, stored(tmp_path / "model", "classification", LABELS)) == [2, 2]


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(DataError, match="none of the 1 examples to measure on can be used: torn"):
        held(stored(tmp_path, "classification", LABELS), Given(examples=(BROKEN,)), ALONE)


def test_the_whole_learner_computes_in_the_type_that_is_asked_for(tmp_path):
    found = read_model(stored(tmp_path, "classification", LABELS))
    made = tools(labels=LABELS, model=found.model)

    def make():
        return MultiwayLearner(Multiway(found.model), [Objective("task", Classification())], {"task": made})

    learner = measuring.whole(make, found.tensors, ALONE, torch.bfloat16)
    assert {p.dtype for p in learner.parameters()} == {torch.bfloat16}
    assert not learner.training


def measured(found, tmp_path, left_out=()):
    class Task:
        def score(self, outputs, examples, tools, train):
            return found

        def draw(self, outputs, examples, tools, log):
            log.note("drawn")

    source, log = coloured("red", "blue").open(), Record()
    stream = Stream("task", Task(), source, 1, tools())
    made = measuring.Held(stream, measuring.Chosen(source, [0, 1]), [], list(left_out))
    return measuring.measured(made, source, ALONE, Job(tmp_path, log), name="held out"), log


def test_predictions_and_files_are_written(tmp_path):
    rows = [{"id": "a", "said": "é", "p": np.float32(0.5)}, {"id": "b", "said": "z", "p": 1.0}]
    found = Measured({"accuracy": 0.5}, rows=rows, files={"results.json": [{"image_id": 1}]})
    measured(found, tmp_path)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{**row, "p": float(row["p"])} for row in rows]
    assert json.loads((tmp_path / "results.json").read_text()) == [{"image_id": 1}]


def test_what_was_left_out_is_counted_warned_of_and_listed(tmp_path):
    metrics, log = measured(Measured({"accuracy": 0.5}), tmp_path, ["torn: not a picture"])
    assert metrics["left_out"] == 1
    assert log.said["warning"][0][:2] == (
        "W401", "1 of 3 examples could not be measured on, such as torn: not a picture",
    )  # fmt: skip
    assert (tmp_path / "left-out-measured.txt").read_text() == "torn: not a picture\n"


def test_the_interval_of_a_mean_covers_it_and_shrinks_with_the_examples():
    rng = np.random.default_rng(0)
    few, many = (rng.random(n) < 0.7 for n in (50, 5000))
    bounds = measuring.intervals({"few": few, "many": many})
    for name, values in (("few", few), ("many", many)):
        low, high = bounds[name]
        assert low < values.mean() < high
    assert bounds["many"][1] - bounds["many"][0] < (bounds["few"][1] - bounds["few"][0]) / 5
    expected = 2 * 1.96 * few.std() / np.sqrt(len(few))
    assert bounds["few"][1] - bounds["few"][0] == pytest.approx(expected, rel=0.2)


def test_an_interval_may_come_from_a_statistic_of_drawn_examples():
    values = np.arange(40.0)
    by_mean = measuring.intervals({"x": values})
    by_statistic = measuring.intervals({"x": (40, lambda drawn: values[drawn].mean())})
    assert by_mean == by_statistic


def test_one_example_has_no_interval():
    assert measuring.intervals({"x": np.ones(1)}) == {}


VALUE = {
    "tensor": torch.arange(6).view(2, 3)[:, 1:], "array": np.eye(2, dtype=np.uint8), "bytes": b"\x00png",
    "rest": [("é", 1, None, True), {"deep": np.float32(0.5)}],
}  # fmt: skip


def exchanged(folder):
    """What rank 0 gets of both ranks' values, as text."""
    ranks = start()
    return [repr(part) for part in gathered(ranks, {**VALUE, "rank": ranks.rank})]


def test_values_of_all_ranks_arrive_on_rank_0_as_they_were(on_ranks, tmp_path):
    first, second = on_ranks(exchanged, 2, tmp_path)
    sent = {**VALUE, "rest": [("é", 1, None, True), {"deep": 0.5}]}
    assert first == [repr({**sent, "rank": rank}) for rank in (0, 1)]
    assert second == []


def test_tensors_are_brought_to_the_host_without_their_graph():
    value = on_host({"x": [torch.ones(2, requires_grad=True) * 2]})
    assert not value["x"][0].requires_grad
