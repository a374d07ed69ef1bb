"""The stages pretrain and train-tokenizer on the smallest model."""

import json

import numpy as np
import pytest
from pydantic import ValidationError
from small import ALONE, MODEL, Codes, Given, Record, coloured, pieces, png, tools, training

from beitctl.api import Example, Job
from beitctl.checkpoints.native import load_tokenizer, read_model
from beitctl.data.packing import Packed
from beitctl.errors import DataError, UserError
from beitctl.report.events import EventLog
from beitctl_plugins.sources.image_folder import ImageFolder
from beitctl_plugins.sources.mixture import Mixed
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.stages import shared
from beitctl_plugins.stages.pretrain import ObjectiveTable, Pretrain
from beitctl_plugins.stages.train_tokenizer import TrainTokenizer
from beitctl_plugins.tasks.masked import MaskedImage, MaskedPair, MaskedText
from beitctl_plugins.tokenizers.sentencepiece import SentencePiece

PROSE = Given(examples=tuple(Example(f"t{i}", text="a red boat on the calm sea") for i in range(4)))
PAIRS = coloured("red", "blue", "green")


class Same(Codes):
    """A store in which every patch has code 7."""

    def view(self, id, number):
        return super().view(id, number)[0], np.full(16, 7)


@pytest.fixture
def tokens(monkeypatch):
    monkeypatch.setattr(shared, "open_tokens", lambda job, value: Same())


def table(task, source, **settings):
    return ObjectiveTable(task=task, source=source, samples=3, **settings)


def stage(tokenizer="", **objectives):
    made = objectives or {
        "image": table(MaskedImage(min_block=2), PAIRS),
        "text": table(MaskedText(), PROSE),
        "pair": table(MaskedPair(min_block=2), PAIRS),
    }
    return Pretrain(model=MODEL, train=training(3), objectives=made, text_tokenizer=str(tokenizer))


def run(tmp_path, made):
    folder = tmp_path / "run"
    folder.mkdir()
    log = EventLog(
        folder, stage="pretrain", recipe="small", run="1", json_stdout=False, quiet=True, active=True
    )
    with log:
        return made.run(Job(folder, log))


@pytest.fixture
def trained(tokens, tmp_path):
    pieces().save(tmp_path / "tokenizer")
    return run(tmp_path, stage(tmp_path / "tokenizer"))


def test_every_term_has_its_losses_accuracy_and_baseline(trained):
    assert trained.pop("tokens") == "store"
    assert sorted(trained) == ["image", "pair", "pair_image", "text"]
    keys = ["accuracy", "baseline_accuracy", "held_out_loss", "loss_first", "loss_last"]
    assert all(sorted(found) == keys for found in trained.values())


def test_the_baseline_is_the_share_of_the_most_frequent_target(trained):
    assert trained["image"]["baseline_accuracy"] == trained["pair_image"]["baseline_accuracy"] == 1
    assert 0 < trained["pair"]["baseline_accuracy"] < 1


def test_the_weights_hold_model_heads_and_tokenizer(trained, tmp_path):
    found = read_model(tmp_path / "run")
    assert found.model == MODEL
    assert found.tensors["heads.image_codes.weight"].shape == (40, 8)
    assert found.tensors["heads.text_tokens.weight"].shape == (52, 8)
    assert found.text_tokenizer().size == 32


def test_first_and_last_loss_are_those_of_the_log(trained, tmp_path):
    records = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    losses = [r["metrics"]["image/loss"] for r in records if r["event"] == "step"]
    assert len(losses) == 3
    assert trained["image"]["loss_first"] == pytest.approx(losses[0])
    assert trained["image"]["loss_last"] == pytest.approx(losses[-1])


def test_a_metric_that_was_not_logged_is_named(tmp_path):
    (tmp_path / "events.jsonl").write_text("")
    with pytest.raises(UserError, match="nothing was logged for image/loss"):
        shared.first_and_last(Job(tmp_path, Record()), "image/loss")


def test_held_out_examples_are_measured_instead_of_the_source(tokens, tmp_path):
    held = Given(examples=(Example("only", png()),))
    found = run(tmp_path, stage(image=table(MaskedImage(min_block=2), PAIRS, held_out=held)))
    assert found["image"]["accuracy"] in [n / 6 for n in range(7)]


def test_pictures_without_a_token_store_name_the_setting(tmp_path):
    with pytest.raises(UserError, match="this task predicts image codes: set tokens"):
        run(tmp_path, stage(image=table(MaskedImage(), PAIRS)))


def test_text_without_a_tokenizer_names_the_setting(tmp_path):
    with pytest.raises(UserError, match="this task reads text: set text_tokenizer"):
        run(tmp_path, stage(text=table(MaskedText(), PROSE)))


def test_a_folder_that_holds_no_token_store_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no complete token store \(it has no store.json\)"):
        shared.open_tokens(Job(tmp_path, Record()), str(tmp_path))


def test_a_recipe_needs_an_objective():
    with pytest.raises(ValidationError, match="objectives"):
        Pretrain(model=MODEL, train=training(), objectives={})


def test_the_plan_says_that_a_source_is_not_there(tmp_path):
    found = stage(image=table(MaskedImage(), ImageFolder(path=tmp_path / "none"))).plan()["data"]["image"]
    assert found["samples seen"] == 9
    assert found["source"].startswith("not there: ")


def test_the_plan_counts_parameters_before_the_store_exists():
    found = stage(image=table(MaskedImage(), PAIRS)).plan()["parameters"]
    assert found["heads"] == 8192 * (8 + 1)
    assert found["total"] == sum(count for part, count in found.items() if part != "total")


def test_train_tokenizer_writes_a_tokenizer_that_loads(tmp_path):
    made = TrainTokenizer(tokenizer=SentencePiece(pieces=18), sources=[PROSE])
    assert made.plan() == {"tokenizer": "SentencePiece unigram, 18 pieces", "examples": 4}
    assert made.run(Job(tmp_path, Record()))["ids"] == load_tokenizer(tmp_path).size == 20


def test_train_tokenizer_needs_a_source():
    with pytest.raises(ValidationError, match="sources"):
        TrainTokenizer(tokenizer=SentencePiece(pieces=18), sources=[])


class LeftOut(Given):
    """A source that leaves something out."""

    def open(self):
        return Opened(self.examples, lambda example: example, "x", ["a.png: empty file", "b.png: no picture"])


def test_what_a_source_leaves_out_is_told_and_listed(tokens, tmp_path):
    log = Record()
    shared.opened("image", LeftOut(examples=PAIRS.examples), Job(tmp_path, log))
    ((note,),) = log.said["note"]
    assert note.startswith(
        "image: 2 left out by the source, all in left-out-image.txt:\n  a.png: empty file\n"
    )
    assert (tmp_path / "left-out-image.txt").read_text() == "a.png: empty file\nb.png: no picture\n"


def test_each_part_of_a_mixture_is_packed_for_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path))
    mixed = Mixed([PROSE.open(), PROSE.open()], [1, 3])
    made = shared.packed(mixed, tools(), ALONE, Job(tmp_path, Record()))
    assert [weight for weight, _ in made.parts] == [1, 3]
    assert all(isinstance(part, Packed) for _, part in made.parts)


def test_packed_without_a_text_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="packed: set text_tokenizer"):
        shared.packed(PROSE.open(), tools(tokenizer=None), ALONE, Job(tmp_path, Record()))


def test_only_texts_are_packed():
    with pytest.raises(ValidationError, match="packed joins texts; this task reads image"):
        table(MaskedImage(), PAIRS, packed=True)
