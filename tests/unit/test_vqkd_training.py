"""Training of VQ-KD: it learns, goes on where it stopped, and refuses what cannot become any good."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_on_ranks
from small import Record
from teaching import pictures, plugin, trained

from beitctl.api import Job
from beitctl.errors import DataError, DivergedError
from beitctl_plugins.tokenizers.vqkd import VQKD


def same(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value.float(), other[name].float(), rtol=0, atol=tolerance), name


def test_it_comes_closer_to_the_teacher(tmp_path):
    log = Record()
    trained(tmp_path, log, steps=40, centre=True, start_after=40)
    losses = [metrics["similarity/loss"] for _, _, metrics in log.said["step"]]
    assert losses[-1] < 0.8 * losses[0]


def test_the_log_says_how_the_codebook_is_used(tmp_path):
    log = Record()
    trained(tmp_path, log)
    last = log.said["step"][-1][2]
    assert 1 <= last["codebook_used"] <= 16
    assert 1 <= last["codebook_perplexity"] <= 16
    assert 0 <= last["codebook_spread"] <= 1


def test_nothing_is_said_of_a_codebook_that_sleeps(tmp_path):
    log = Record()
    trained(tmp_path, log, start_after=4)
    first, last = log.said["step"][0][2], log.said["step"][-1][2]
    assert "codebook_used" not in first
    assert "codebook_used" in last


def test_the_result_has_use_meaning_and_likeness(tmp_path):
    result = plugin().train([pictures()], Job(tmp_path, Record()))
    assert result["codebook_size"] == 16
    assert 1 <= result["codebook_used"] <= 16
    assert -1 <= result["teacher_cosine"] <= 1
    assert result["mutual_information"] >= 0


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("constant", "same feature for all"),
        ("two clusters", r"tells apart only 2 kinds of patch"),
        ("nan", "not finite"),
    ],
)
def test_a_degenerate_teacher_stops_the_run_with_the_reason(what, words, tmp_path):
    with pytest.raises(DataError, match=words):
        plugin(what, codes=64).train([pictures()], Job(tmp_path, Record()))


def test_a_codebook_that_dies_stops_the_run_with_the_reason(tmp_path):
    """One picture a step uses 16 codes at the most, of which half the 64 are asked for."""
    with pytest.raises(DivergedError, match=r"codebook collapsed: at step .* of 512 codes were used"):
        plugin(codes=512, min_used_share=0.1, steps=40, revive_after=0, samples=64).train(
            [pictures(2)], Job(tmp_path, Record())
        )


def test_passes_give_the_same_tokenizer(tmp_path):
    whole = trained(tmp_path / "whole", revive_after=2, entropy=0.1)
    apart = trained(tmp_path / "apart", revive_after=2, entropy=0.1, micro_samples=3)
    same(whole, apart, 1e-5)


def test_a_run_that_stopped_goes_on_to_the_same_tokenizer(tmp_path):
    whole = trained(tmp_path / "whole", steps=6, revive_after=2, centre=True)
    part = plugin(steps=6, save_every=2, revive_after=2, centre=True)
    (tmp_path / "part").mkdir()
    with pytest.raises(KeyError):
        part.train([pictures()], Job(tmp_path / "part", Stopping()))
    resumed = trained(tmp_path / "part", steps=6, revive_after=2, centre=True)
    same(whole, resumed)


class Stopping(Record):
    """A log that breaks the run after the checkpoint of step 4."""

    def step(self, number, of, metrics):
        if number >= 4:
            raise KeyError


def on_ranks(folder):
    tensors = trained(Path(folder), revive_after=2, steps=5)
    return {name: value.float().flatten().tolist() for name, value in tensors.items()}


def test_two_processes_give_the_tokenizer_of_one(tmp_path):
    (one,) = run_on_ranks(tmp_path / "one", on_ranks, 1, tmp_path / "a")
    found = run_on_ranks(tmp_path / "two", on_ranks, 2, tmp_path / "b")[0]
    for name, value in one.items():
        assert torch.allclose(torch.tensor(value), torch.tensor(found[name]), rtol=0, atol=1e-5), name


def test_what_is_written_says_preset_and_teacher(tmp_path):
    trained(tmp_path, preset="small")
    note = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    assert note["preset"] == "small"
    assert VQKD.load(tmp_path / "tokenizer").fingerprint == note["fingerprint"]
