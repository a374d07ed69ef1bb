"""Text classification: what is prepared, learnt, said, scored and refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import MODEL, Given, Letters, Record, rng, tools
from torch.nn import functional as F

from beitctl.api import Example
from beitctl.checkpoints.loading import load_model
from beitctl.checkpoints.models import TextClassificationModel
from beitctl.checkpoints.native import save_model
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.errors import DataError, UserError
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.text_classification import TextClassification

LABELS = ("letter", "novel")


def text(words="call me", label="novel", id="x"):
    return Example(id, text=words, label=label)


def kit(**changes):
    return tools(**{"labels": LABELS} | changes)


def prepared(*examples, task=None):
    return [(task or TextClassification()).prepare(example, rng(), kit()) for example in examples]


def learner(task=None):
    task = task or TextClassification()
    config = task.fitted(MODEL)
    made = MultiwayLearner(Multiway(config), [Objective("task", task)], {"task": kit()}).eval()
    made.load_state_dict({k: initial(k, v.shape, config, 0) for k, v in made.state_dict().items()})
    return made


def batch(items):
    return collate([Portion("task", "text", items)], MODEL)


def test_an_item_is_the_framed_text_and_its_class():
    (item,) = prepared(text())
    assert item.text.tolist() == [0, *Letters().encode("call me"), 2]
    assert (item.label, item.image) == (1, None)


def test_of_a_long_text_the_beginning_is_read():
    (item,) = prepared(text("call me Ishmael"), task=TextClassification(text_tokens=6))
    assert item.text.tolist() == [0, *Letters().encode("call"), 2]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (text(""), "x: no text"),
        (text(label="poem"), "x: label 'poem' is none of letter, novel"),
        (text(label=None), "x: label None is none of letter, novel"),
    ],
)
def test_a_text_that_lacks_something_is_named(example, message):
    with pytest.raises(DataError, match=message):
        TextClassification().prepare(example, rng(), kit())


@pytest.mark.parametrize("labels", [(), ("novel",)])
def test_fewer_than_two_classes_are_refused(labels):
    with pytest.raises(UserError, match=rf"at least two classes, the source has {len(labels)}"):
        TextClassification().heads(kit(labels=labels))


def test_a_model_that_reads_no_text_is_refused():
    with pytest.raises(UserError, match="text-classification reads text, but the model of init has no"):
        TextClassification().heads(kit(model=replace(MODEL, vocabulary=0, text_tokens=0)))


def test_the_final_norm_is_on():
    assert TextClassification().fitted(replace(MODEL, final_norm=False)).final_norm


def test_logits_are_those_of_the_model_that_the_file_is_loaded_as(tmp_path):
    items = prepared(text("call me"), text("dear", "letter"))
    made = learner()
    save_model(
        tmp_path, made.state_dict(), made.model.config, task={"kind": "text-classification"}, labels=LABELS
    )
    loaded = load_model(tmp_path)
    assert type(loaded) is TextClassificationModel
    ids = torch.ones(2, 10, dtype=torch.int64)
    for row, item in enumerate(items):
        ids[row, : len(item.text)] = torch.from_numpy(item.text)
    pad = torch.tensor([[i >= len(item.text) for i in range(10)] for item in items])
    with torch.no_grad():
        found = made.outputs(batch(items))["task"]
        assert torch.allclose(found, loaded(ids, text_pad=pad), atol=1e-6)
    first = loaded.model(text=ids, text_pad=pad)[:, 0]
    assert torch.allclose(found, loaded.heads["text_classifier"](first), atol=1e-6)


def test_the_loss_is_smoothed_cross_entropy():
    made = learner(TextClassification(label_smoothing=0.2))
    packed = batch(prepared(text("call me"), text("dear", "letter")))
    total, right = made(packed)["task"]
    logits, truth = made.outputs(packed)["task"], torch.tensor([1, 0])
    expected = 2 * F.cross_entropy(logits, truth, label_smoothing=0.2)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert right.item() == (logits.argmax(1) == truth).sum().item()


HELD = (text("call me"), text("dear sir of old", "letter", "y"), text("me", "novel", "z"))
SAID = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])


def scored(train):
    return TextClassification().score([SAID[:1], SAID[1:]], HELD, kit(), Given(examples=train).open())


def test_the_score_is_accuracy_beside_the_majority_of_the_training_examples():
    found = scored((text(label="letter"), text(label="letter"), text()))
    assert found.metrics == {
        "accuracy": pytest.approx(2 / 3), "majority": pytest.approx(1 / 3), "examples": 3,
        "truncated_texts": 1,
    }  # fmt: skip
    assert found.each["accuracy"].tolist() == [True, False, True]
    assert found.rows[1] == {
        "id": "y", "predicted": "novel", "label": "letter",
        "probability": pytest.approx(1 / (1 + np.exp(-2))),
    }  # fmt: skip


def test_without_training_labels_there_is_no_majority():
    assert "majority" not in scored((text(label=None),)).metrics


def test_confusions_and_texts_are_drawn():
    log = Record()
    TextClassification().draw([SAID], HELD, kit(), log)
    assert [figure[0] for figure in log.said["figure"]] == ["confusion", "texts"]
    assert all(figure[1].startswith(b"\x89PNG") for figure in log.said["figure"])


def test_smoke_is_unsmoothed_and_names_its_data():
    small = TextClassification.smoke({"label_smoothing": 0.1, "text_tokens": 64})
    assert TextClassification(**small) == TextClassification()
    assert TextClassification.smoke_data("train") == {"kind": "embedded", "content": "text", "split": "train"}
