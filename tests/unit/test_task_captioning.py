"""Captioning: what is hidden, what is lost, what is found, what is told."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import MODEL, Given, Letters, Record, coloured, pieces, png, rng, stored, tools, training
from torch.nn import functional as F

from beitctl.api import Example, Job
from beitctl.checkpoints.loading import load_model
from beitctl.checkpoints.native import read_model, save_model
from beitctl.config import OptimConfig
from beitctl.data.batch import collate
from beitctl.data.loader import portion_of
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.errors import ChangedError, DataError, UserError
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages.eval import Eval
from beitctl_plugins.stages.finetune import Finetune
from beitctl_plugins.tasks.captioning import (
    CIDER,
    Captioning,
    hidden,
    image_id,
    image_ids,
    most_frequent,
    random_ids,
    smoothed,
    spread,
)

IDS = np.array([0, 10, 11, 12, 13, 14, 15, 16, 17, 2])


@pytest.mark.parametrize(("ratio", "count"), [(0.7, 7), (0.65, 7), (0.64, 6), (0.01, 1), (1.0, 9)])
def test_so_many_tokens_are_hidden_and_never_the_start(ratio, count):
    for seed in range(20):
        shown, targets = hidden(IDS, ratio, rng(seed), Letters())
        places = np.flatnonzero(targets >= 0)
        assert (len(places), shown[0], targets[0]) == (count, 0, -1)
        assert (targets[places] == IDS[places]).all()
        assert (shown[targets < 0] == IDS[targets < 0]).all()


def test_the_end_is_hidden_as_often_as_a_word():
    ends = [hidden(IDS, 0.5, rng(seed), Letters())[1][-1] >= 0 for seed in range(400)]
    assert 0.45 < np.mean(ends) < 0.65


def test_hidden_tokens_show_a_mask_themselves_or_another_id():
    shares = np.zeros(3)
    for seed in range(300):
        shown, targets = hidden(IDS, 0.7, rng(seed), Letters())
        places = targets >= 0
        same, mask = shown[places] == targets[places], shown[places] == Letters.mask_id
        shares += [mask.sum(), same.sum(), (~same & ~mask).sum()]
    assert shares / shares.sum() == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_random_ids_are_all_but_start_end_and_padding():
    assert random_ids(Letters()).tolist() == list(range(3, 52))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_loss_is_the_divergence_from_the_smoothed_target(smoothing):
    logits, targets = (
        torch.randn(5, 52, generator=torch.Generator().manual_seed(0)),
        torch.tensor([3, 9, 3, 51, 0]),
    )
    wanted = torch.full((5, 52), smoothing / 51)
    wanted[torch.arange(5), targets] = 1 - smoothing
    expected = F.kl_div(logits.log_softmax(-1), wanted, reduction="none").sum(-1)
    assert torch.allclose(smoothed(logits, targets, smoothing), expected, atol=1e-5)


def test_the_best_prediction_loses_nothing():
    logits = torch.log(torch.full((1, 52), 0.1 / 51))
    logits[0, 7] = np.log(0.9)
    assert float(smoothed(logits, torch.tensor([7]), 0.1)) == pytest.approx(0, abs=1e-6)


CAPTIONED = coloured("red", "blue", "green", captions=("a {} square",))


def learner_and_batch(task, step=0):
    made = tools()
    torch.manual_seed(0)
    learner = MultiwayLearner(Multiway(MODEL), [Objective("task", task)], {"task": made})
    for parameter in learner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    items = [task.prepare(example, rng(n), made) for n, example in enumerate(CAPTIONED.examples)]
    return learner.eval(), collate([portion_of("task", task, items)], MODEL, step=step)


def test_text_sees_its_picture_and_earlier_words_alone():
    learner, batch = learner_and_batch(Captioning(mask_ratio=1.0))
    before = learner.outputs(batch)["task"]
    changed = batch.ids.clone()
    changed[9] = 40  # the end of the first caption
    after = learner.outputs(replace(batch, ids=changed))["task"]
    assert batch.plan.causal_text
    assert torch.allclose(before[:8], after[:8], atol=1e-6)
    assert not torch.allclose(before[8], after[8], atol=1e-3)


def test_late_steps_learn_from_the_tokens_with_the_smallest_losses():
    task = Captioning(drop_worst_after=5, drop_worst=0.5)
    learner, early = learner_and_batch(task, 5)
    _, late = learner_and_batch(task, 6)
    group = early.groups["task"]
    losses = smoothed(learner.outputs(early)["task"], group.text_targets, 0.1).detach()
    count = len(losses)
    best = losses.sort().values[: count // 2]
    with torch.no_grad():
        assert float(learner(early)["task"][0]) / count == pytest.approx(float(losses.mean()), rel=1e-5)
        assert float(learner(late)["task"][0]) / count == pytest.approx(float(best.mean()), rel=1e-5)


def test_a_caption_of_ids_is_hidden_like_one_of_words():
    task, ids = Captioning(mask_ratio=1.0), np.array([7, 8, 9])
    item = task.prepare(Example("x", png(), caption_ids=(ids,)), rng(), tools())
    assert item.text_targets.tolist() == [-1, 7, 8, 9, 2]


def test_captions_are_cut_to_the_longest_text():
    item = Captioning(text_tokens=5).prepare(Example("x", png(), ("a long red square",)), rng(), tools())
    assert len(item.text) == 5


def test_training_needs_a_caption_and_evaluation_none():
    example = Example("x", png())
    with pytest.raises(DataError, match="x: no caption"):
        Captioning().prepare(example, rng(), tools())
    assert Captioning().prepare(example, rng(), tools(train=False)).image is not None


@pytest.mark.parametrize("wrong", [52, -1])
def test_an_id_that_the_model_has_not_is_refused(wrong):
    example = Example("x", png(), caption_ids=(np.array([7, wrong]),))
    with pytest.raises(DataError, match=f"x: id {wrong} is none of the model's 52"):
        Captioning().prepare(example, rng(), tools())


def test_a_length_without_room_for_a_word_is_refused():
    assert Captioning(text_tokens=4).heads(tools())
    with pytest.raises(UserError, match="no room for a word in 3 tokens"):
        Captioning(text_tokens=3).heads(tools())


def test_relative_positions_are_refused():
    with pytest.raises(UserError, match='needs position = "absolute"'):
        Captioning().heads(tools(model=replace(MODEL, position="relative-shared")))


def started(folder):
    """A model with a text tokenizer, and what pretraining leaves."""
    stored(folder, tokenizer=pieces())
    found = read_model(folder)
    more = {"heads.text_tokens.weight": torch.randn(52, 8) * 0.02, "heads.text_tokens.bias": torch.zeros(52)}
    save_model(folder, found.tensors | more, found.model, tokenizer=found.text_tokenizer())
    return folder


def captioned(*colours):
    names = {"red": "boat", "blue": "dogs", "green": "the sea"}
    return Given(examples=tuple(
        replace(example, captions=(names[example.label],)) for example in coloured(*colours).examples
    ))  # fmt: skip


def run(tmp_path, task=None, steps=120, held_out=None):
    stage = Finetune(
        init=str(started(tmp_path / "model")), task=task or Captioning(crop_scale=(1, 1)),
        source=captioned("red", "blue", "green"), held_out=held_out or captioned("blue", "red", "green"),
        samples=6, train=training(steps, optim=OptimConfig(peak_lr=0.02)),
    )  # fmt: skip
    return stage.run(Job(tmp_path / "run", Record()))


def test_it_learns_to_describe_colours(tmp_path):
    metrics = run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == [row["references"][0] for row in rows]
    assert metrics[CIDER] > metrics["baseline_cider_d"]
    assert metrics["bleu1"] > 0.9
    results = json.loads((tmp_path / "run" / "captions.json").read_text())
    assert [set(row) for row in results] == [{"image_id", "caption"}] * 3
    again = Eval(model=str(tmp_path / "run"), protocol="task", source=captioned("blue", "red", "green"))
    assert again.run(Job(tmp_path / "again", Record()))[CIDER] == pytest.approx(metrics[CIDER])
    assert load_model(tmp_path / "run")(
        torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, dtype=torch.int64)
    ).shape == (1, 3, 52)  # fmt: skip


def test_the_head_begins_as_that_of_the_pretrained_words(tmp_path):
    still = training(1, optim=OptimConfig(peak_lr=1e-9, warmup_steps=1))
    stage = Finetune(
        init=str(started(tmp_path / "model")), task=Captioning(), source=captioned("red", "blue"),
        held_out=captioned("red"), samples=2, train=still,
    )  # fmt: skip
    stage.run(Job(tmp_path / "run", Record()))
    before, after = read_model(tmp_path / "model").tensors, read_model(tmp_path / "run").tensors
    assert torch.allclose(before["heads.text_tokens.weight"], after["heads.captions.weight"], atol=1e-6)


def test_pictures_without_captions_are_captioned_and_counted(tmp_path):
    bare = Given(examples=tuple(replace(e, captions=()) for e in captioned("blue", "red").examples))
    metrics = run(tmp_path, steps=2, held_out=bare)
    assert (metrics["examples"], metrics["without_references"]) == (2, 2)
    assert CIDER not in metrics


def test_an_empty_caption_is_scored(tmp_path):
    examples = CAPTIONED.examples
    found = Captioning().score([["", "a red square", "x"]], examples, tools(), CAPTIONED.open())
    assert np.isfinite(found.metrics[CIDER])
    assert found.rows[0]["caption"] == ""


def scored(captions, examples, train=CAPTIONED):
    return Captioning().score([captions], examples, tools(), train.open())


def with_captions(id, *captions):
    return Example(id, png(), captions)


def test_one_example_is_scored_and_drawn():
    found, log = scored(["a red square"], CAPTIONED.examples[:1]), Record()
    assert found.metrics["rouge_l"] == pytest.approx(1)
    Captioning().draw([["a red square"]], CAPTIONED.examples[:1], tools(), log)
    assert [values[0] for values in log.said["figure"]] == ["captions"]


def test_captions_without_references_are_drawn():
    log = Record()
    Captioning().draw([["a", ""]], [with_captions("1"), with_captions("2")], tools(), log)
    assert len(log.said["figure"]) == 1


def test_examples_without_captions_change_no_score_of_others():
    bare = with_captions("bare")
    alone, both = (
        scored(["a red square", "blue", *more], [*CAPTIONED.examples[:2], *rest]).metrics
        for more, rest in (([], []), (["x"], [bare]))
    )
    assert {k: both[k] for k in (CIDER, "bleu4", "bleu1", "rouge_l")} == {
        k: alone[k] for k in (CIDER, "bleu4", "bleu1", "rouge_l")
    }
    assert (both["examples"], both["without_references"], both["references"]) == (3, 1, 2)


def test_blank_captions_are_no_references():
    metrics = scored(["a", "b"], [with_captions("1", "", " "), with_captions("2", "a b", "")]).metrics
    assert (metrics["without_references"], metrics["references"]) == (1, 1)


def test_the_score_of_all_is_the_mean_of_each():
    found = scored(["a red square", "x", ""], CAPTIONED.examples)
    assert float(np.mean(found.each[CIDER])) == pytest.approx(found.metrics[CIDER])
    assert found.metrics["distinct"] == 1


def test_the_baseline_is_the_most_frequent_caption_of_training():
    train = Given(
        examples=(with_captions("1", "x", "a b"), with_captions("2", "a b"), with_captions("3", " "))
    )
    assert most_frequent(train.open(), tools()) == "a b"
    right = scored(
        ["a red square"] * 3, CAPTIONED.examples, Given(examples=(with_captions("1", "a red square"),))
    )
    assert right.metrics["baseline_cider_d"] == pytest.approx(right.metrics[CIDER])
    assert right.metrics[CIDER] > 0


def test_the_baseline_of_captions_as_ids_is_in_words():
    ids = tuple(np.array(one) for one in ([7, 8], [9], [7, 8]))
    assert most_frequent(Given(examples=(Example("x", png(), caption_ids=ids),)).open(), tools()) == "7 8"


def test_without_training_captions_there_is_no_baseline():
    assert (
        "baseline_cider_d"
        not in scored(["x"] * 3, CAPTIONED.examples, Given(examples=(with_captions("1"),))).metrics
    )


class Broken:
    fingerprint = "broken"

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise self.error


def test_changed_training_data_end_the_measurement_and_unreadable_ones_do_not():
    assert most_frequent(Broken(DataError("bad")), tools()) is None
    with pytest.raises(ChangedError, match="changed"):
        most_frequent(Broken(ChangedError("changed")), tools())


@pytest.mark.parametrize(("count", "places"), [(0, []), (1, [0]), (3, [0, 1, 2]), (9, [0, 3, 5, 8])])
def test_places_are_spread_evenly(count, places):
    assert spread(count, 4) == places


def test_pictures_that_would_have_one_number_keep_their_ids():
    assert image_ids(["9.jpg", "10.jpg"]) == [9, 10]
    assert image_ids(["9.jpg", "9.png"]) == ["9.jpg", "9.png"]
    found = scored(["a", "b"], [with_captions("9.jpg"), with_captions("9.png")])
    assert [row["image_id"] for row in found.files["captions.json"]] == ["9.jpg", "9.png"]


@pytest.mark.parametrize(
    ("id", "number"),
    [
        ("COCO_val2014_000000000042.jpg", 42),
        ("000000000009.jpg", 9),
        ("17", 17),
        ("pictures/9.jpg", "pictures/9.jpg"),
        ("val2014/COCO_val2014_000000000042.jpg", 42),
        ("\u0663", "\u0663"),
    ],
)
def test_a_picture_of_coco_has_its_number(id, number):
    assert image_id(id) == number
