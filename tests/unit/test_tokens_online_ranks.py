"""Codes computed in the training step on two ranks: what one rank learns."""

from pathlib import Path

import pytest
from coding import Tiny
from pretraining import run
from test_tokens_online import losses, pretrain, tiny  # noqa: F401 - the fixture works by being here

from beitctl.checkpoints import native
from beitctl.engine.dist import start


def losses_on_ranks(folder):
    ranks = start()
    native.load_tokenizer = lambda path: Tiny()
    result, _, _ = run(Path(folder), pretrain(), main=ranks.main)
    found = list(losses(Path(folder)).values()) if ranks.main else []
    ranks.stop()
    return [found, result["image"]["accuracy"]]


def test_two_ranks_learn_what_one_does(on_ranks, tmp_path):
    result, _, _ = run(tmp_path / "one", pretrain())
    alone, accuracy = list(losses(tmp_path / "one").values()), result["image"]["accuracy"]
    (first, found), _ = on_ranks(losses_on_ranks, 2, tmp_path / "two")
    assert len(alone) == 3
    assert first == pytest.approx(alone, abs=1e-5)
    assert found == accuracy
