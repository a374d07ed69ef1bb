"""What the plan says of a training that has run out of memory."""

from beitctl.planning import hint
from beitctl.recipe import load


def test_the_plans_numbers_for_a_pretraining():
    found = hint.memory(load("beit3-base", [], stage="pretrain"), "pretrain", 1)
    assert found.startswith("beitctl plan counts ")
    assert "of it activations (compiled)" in found


def test_nothing_of_a_table_that_cannot_be_planned():
    assert hint.memory(load("tiny", [], stage="pretrain"), "train-tokenizer.text", 1) == ""
