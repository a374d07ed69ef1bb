"""Visual question answering: what is prepared, learnt, said, scored and refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import COLOURS, MODEL, Given, Letters, Record, png, rng, tools
from torch import nn
from torch.nn import functional as F

from beitctl.api import Example
from beitctl.checkpoints.loading import load_model
from beitctl.checkpoints.models import AnswerModel
from beitctl.checkpoints.native import save_model
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import HALF, MultiwayLearner, Objective, normalise
from beitctl.errors import DataError, UserError
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.vqa import VQA, dense_targets

LABELS = ("red", "yes", "no", "2")
VLMO = replace(MODEL, layers=2, fusion_layers=1, text_norm=True, token_types=2, text_first=True)
MODELS = {"beit3": MODEL, "vlmo": VLMO}


def asked(id="x", text="what?", given=("red",), colour="red"):
    return Example(id, png(COLOURS[colour]), text=text, answers=tuple(given))


def kit(**changes):
    return tools(**{"labels": LABELS} | changes)


def prepared(*examples, task=None, **changes):
    return [(task or VQA()).prepare(example, rng(), kit(**changes)) for example in examples]


def learner(model=MODEL, task=None, labels=LABELS):
    task = task or VQA()
    config = task.fitted(model)
    objective = Objective("task", task)
    made = MultiwayLearner(Multiway(config), [objective], {"task": kit(model=config, labels=labels)}).eval()
    made.load_state_dict({k: initial(k, v.shape, config, 0) for k, v in made.state_dict().items()})
    return made


def batch(items, model=MODEL):
    return collate([Portion("task", "pair", items)], model)


def test_an_item_has_the_picture_the_framed_question_and_sparse_scores():
    (item,) = prepared(asked(given=["red"] * 3 + ["yes"] * 6 + ["else"]))
    assert item.image.shape == (3, 16, 16)
    assert item.text.tolist() == [0, *Letters().encode("what?"), 2]
    assert item.extra["answers"].tolist() == [0, 1]
    assert item.extra["scores"].tolist() == pytest.approx([0.9, 1.0])


def test_a_question_of_ids_is_framed_too():
    (item,) = prepared(Example("x", png(), token_ids=np.array([7, 8]), answers=("red",)))
    assert item.text.tolist() == [0, 7, 8, 2]


def test_a_question_that_is_too_long_is_cut_and_still_ends():
    (item,) = prepared(asked(text="a very long question"), task=VQA(text_tokens=6))
    assert item.text.tolist() == [0, *Letters().encode("a ve"), 2]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("x", text="what?"), "x: no picture"),
        (Example("x", png()), "x: no text"),
        (Example("x", png(), token_ids=np.array([60])), "x: id 60 is none of the model's 52"),
    ],
)
def test_a_question_that_lacks_something_is_named(example, message):
    with pytest.raises(DataError, match=message):
        VQA().prepare(example, rng(), kit())


@pytest.mark.parametrize("labels", [(), ("yes",)])
def test_fewer_than_two_answers_are_refused(labels):
    with pytest.raises(UserError, match=rf"found {len(labels)}: no more .* to 9 questions; lower min_answer"):
        VQA().heads(kit(labels=labels))


def test_a_model_that_reads_no_text_is_refused():
    with pytest.raises(UserError, match="vqa reads text, but the model of init has no language branch"):
        VQA().heads(kit(model=replace(MODEL, vocabulary=0, text_tokens=0)))


def test_heads_have_the_shapes_of_the_released_files():
    for name, norms in (("beit3", ["pooler.norm.bias", "pooler.norm.weight"]), ("vlmo", [])):
        heads = nn.ModuleDict(VQA().heads(kit(model=MODELS[name])))
        shapes = {key: tuple(value.shape) for key, value in heads.state_dict().items()}
        assert sorted(key for key in shapes if key.startswith("pooler.norm")) == norms
        assert shapes["pooler.linear.weight"] == (8, 8)
        assert (shapes["answers.up.weight"], shapes["answers.out.weight"]) == ((16, 8), (4, 16))


def test_the_final_norm_is_off_in_beit3_and_on_in_vlmo():
    assert [VQA().fitted(config).final_norm for config in MODELS.values()] == [False, True]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model_that_the_file_is_loaded_as(tmp_path, name):
    examples = [asked("a", "what?"), asked("b", "is it?", colour="blue")]
    items = prepared(*examples, model=MODELS[name], train=False)
    made = learner(MODELS[name])
    save_model(tmp_path, made.state_dict(), made.model.config, task={"kind": "vqa"}, labels=LABELS)
    loaded = load_model(tmp_path)
    assert type(loaded) is AnswerModel
    text = torch.ones(2, 8, dtype=torch.int64)
    for row, item in enumerate(items):
        text[row, : len(item.text)] = torch.from_numpy(item.text)
    pad = torch.tensor([[i >= len(item.text) for i in range(8)] for item in items])
    pixels = normalise(torch.from_numpy(np.stack([item.image for item in items])), HALF)
    with torch.no_grad():
        expected = loaded(pixels, text, text_pad=pad)
        found = made.outputs(batch(items, made.model.config))["task"]
    assert found.abs().max() > 1e-4
    assert torch.allclose(found, expected, atol=1e-6)


def test_targets_are_dense_where_somebody_answered():
    items = prepared(asked(given=["red"] * 2 + ["2"] * 8), asked(given=()), asked(given=["no"]))
    group = batch(items).groups["task"]
    expected = [[0.6, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert torch.allclose(dense_targets(group, torch.zeros(3, 4)), torch.tensor(expected))


def test_the_loss_is_the_sum_over_answers_averaged_over_samples():
    items = prepared(asked(given=["red"] * 2 + ["2"] * 8), asked(given=["no"]))
    made, packed = learner(), batch(items)
    total, right = made(packed)["task"]
    with torch.no_grad():
        logits = made.outputs(packed)["task"]
    wanted = torch.tensor([[0.6, 0, 0, 1], [0, 0, 1, 0]])
    official = F.binary_cross_entropy_with_logits(logits, wanted, reduction="mean") * 4
    assert total.item() / made.counts(packed)["task"] == pytest.approx(official.item(), rel=1e-5)
    assert right.item() == pytest.approx(sum(wanted[i, logits[i].argmax()].item() for i in range(2)))


def test_a_rank_without_samples_still_uses_every_head():
    made = learner()
    total, _ = made(batch([]))["task"]
    total.backward()
    assert total.item() == 0
    assert all(p.grad is not None for p in made.heads.parameters())


def test_a_few_steps_lower_the_loss():
    made = learner().train()
    packed = batch(prepared(asked(given=["red"]), asked(given=["no"], colour="blue", text="is it?")))
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = made(packed)["task"][0] / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def source(*examples):
    return Given(examples=examples).open()


def test_the_vocabulary_is_made_from_training_answers_or_read_from_a_file(tmp_path):
    train = source(asked(given=["b"]), asked(given=["c"]), asked(given=["c"]))
    assert VQA(min_answer_count=2).vocabulary(train) == ("c",)
    file = tmp_path / "answer2label.txt"
    file.write_text(json.dumps({"answer": "net", "label": 0}))
    assert VQA(answer_file=str(file)).vocabulary(train) == ("net",)


def test_examples_without_an_answer_of_the_list_are_not_trained_on():
    train = source(asked(given=["red"]), asked(given=["else"]), asked(given=()), asked(given=["Two", "no"]))
    assert VQA().usable(train, LABELS) == [0, 3]
    assert VQA(lookup="normalised").usable(source(asked(given=["Two"])), LABELS) == [0]


HELD = (
    asked("10", "what colour?", ["red"] * 10),
    asked("11", "is it?", ["yes"] * 8 + ["no"] * 2),
    asked("12", "how many?", ["2"] * 9 + ["3"]),
    asked("x13", "what else?", ["sea"] * 10),
    asked("14", "is it not?", ()),
)
TRAIN = (
    asked(text="is it so?", given=["no"]),
    asked(text="is it so?", given=["no"]),
    asked(text="what colour?", given=["red"]),
)
SAID = torch.tensor(
    [
        [3.0, 0, 0, 0],  # red: right
        [0, 0, 3.0, 0],  # no: 0.6 of 1
        [0, 0, 0, 3.0],  # 2: right
        [0, 2.0, 0, 0],  # yes: wrong, sea cannot be said
        [0, 1.0, 0, 0],
    ]
)


def scored(held=HELD, train=TRAIN, said=SAID, **changes):
    return VQA().score([said[:2], said[2:]], held, kit(train=False, **changes), source(*train))


def test_the_score_is_the_official_one_beside_that_of_training_and_two_baselines():
    metrics = scored().metrics
    assert metrics["vqa_score"] == pytest.approx((1 + 0.6 + 1 + 0) / 4)
    assert metrics["accuracy"] == pytest.approx((1 + 0.6 + 1 + 0) / 4)
    assert metrics["majority"] == pytest.approx(0.6 / 4)  # no: of the second question alone
    assert metrics["question_only"] == pytest.approx((1 + 0.6) / 4)
    assert next(iter(metrics)) == "vqa_score"


def test_every_question_is_counted_whatever_it_lacks():
    metrics = scored().metrics
    assert metrics["examples"] == 5
    assert metrics["without_answers"] == 1
    assert metrics["without_answer_in_vocabulary"] == 1
    assert metrics["truncated_questions"] == 4  # all but "is it?", with 8 letters at most


def test_scores_are_told_by_kind_of_answer():
    metrics = scored().metrics
    found = {key.removeprefix("vqa_score_"): value for key, value in metrics.items() if "score_" in key}
    assert found == pytest.approx({"yes_no": 0.6, "number": 1.0, "other": 0.5})


def test_both_scores_come_per_question_for_their_intervals():
    each = scored().each
    assert each["vqa_score"].tolist() == pytest.approx([1, 0.6, 1, 0])
    assert each["accuracy"].tolist() == pytest.approx([1, 0.6, 1, 0])


def test_predictions_say_what_was_asked_said_and_given():
    found = scored()
    assert found.rows[1] == {
        "id": "11", "question": "is it?", "predicted": "no", "answers": list(HELD[1].answers),
        "probability": pytest.approx(1 / (1 + np.exp(-3))), "vqa_score": pytest.approx(0.6),
    }  # fmt: skip
    assert "vqa_score" not in found.rows[4]


def test_results_have_the_form_of_the_evaluation_server():
    said = ["red", "no", "2", "yes", "yes"]
    ids = [10, 11, 12, "x13", 14]
    assert scored().files == {
        "vqa-results.json": [{"question_id": i, "answer": a} for i, a in zip(ids, said, strict=True)]
    }


def test_a_test_set_has_predictions_alone():
    found = scored(held=HELD[4:], said=SAID[:3][2:].repeat(2, 1)[:1])
    assert found.metrics == {
        "examples": 1, "without_answers": 1, "without_answer_in_vocabulary": 0, "truncated_questions": 1,
    }  # fmt: skip
    assert (len(found.rows), dict(found.each)) == (1, {})


def test_without_training_answers_there_is_no_baseline():
    metrics = scored(train=(asked(given=()),)).metrics
    assert "vqa_score" in metrics
    assert not {"majority", "question_only"} & set(metrics)


def test_questions_of_ids_are_told_in_words():
    held = (Example("7", png(), token_ids=np.array([7, 8]), answers=("red",)),)
    found = VQA().score([SAID[:1]], held, kit(train=False), source(*TRAIN))
    assert found.rows[0]["question"] == "7 8"


def test_a_gallery_shows_right_answers_mistakes_and_what_nobody_can_judge():
    log = Record()
    VQA().draw([SAID], HELD, kit(train=False), log)
    ((name, data, *_),) = log.said["figure"]
    assert name == "answers"
    assert data.startswith(b"\x89PNG")


def test_smoke_keeps_every_answer_and_names_its_data():
    small = VQA.smoke({"answer_file": "a.txt", "augment": "beit3", "text_tokens": 64})
    assert VQA(**small) == VQA(min_answer_count=1, augment="beit3")
    assert VQA.smoke_data("test") == {"kind": "embedded", "content": "questions", "split": "test"}
