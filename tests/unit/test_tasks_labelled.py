"""Classification and retrieval: what they prepare, what they score, what the user is told."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small import MODEL, Letters, Record, coloured, png, rng, tools
from torch.nn import functional as F

from beitctl.api import Example
from beitctl.data.batch import Portion, collate
from beitctl.errors import DataError, UserError
from beitctl.model.heads import Classifier, ContrastiveHead
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.tasks.matching import Matches, chance, recalls
from beitctl_plugins.tasks.retrieval import Retrieval, retrieval_gallery

LABELS = ("blue", "green", "red")


def test_the_label_becomes_its_index():
    example = Example("x", png(), label="red")
    assert Classification().prepare(example, rng(), tools(labels=LABELS)).label == 2


@pytest.mark.parametrize("label", ["yellow", None])
def test_an_unknown_label_is_named_with_those_there_are(label):
    with pytest.raises(DataError, match=rf"x: label {label!r} is none of blue, green, red"):
        Classification().prepare(Example("x", png(), label=label), rng(), tools(labels=LABELS))


@pytest.mark.parametrize("labels", [(), ("red",)])
def test_fewer_than_two_classes_are_refused(labels):
    with pytest.raises(
        UserError,
        match=rf'at least two classes, the source has {len(labels)}: .* labels = "folders", or pairs with a',
    ):
        Classification().heads(tools(labels=labels))


def test_training_crops_differ_and_evaluation_crops_do_not():
    gradient = np.linspace(0, 255, 32).astype(np.uint8)[:, None, None].repeat(32, 1).repeat(3, 2)
    picture = _png(gradient)
    kinds = {}
    for train in (True, False):
        made = tools(labels=LABELS, train=train)
        items = [Classification().prepare(Example("x", picture, label="red"), rng(s), made) for s in range(4)]
        kinds[train] = len({item.image.tobytes() for item in items})
    assert kinds == {True: 4, False: 1}


def _png(array):
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def test_an_example_without_a_picture_is_named():
    with pytest.raises(DataError, match="x: no picture"):
        Classification().prepare(Example("x", label="red"), rng(), tools(labels=LABELS))


def test_the_classifier_reads_the_mean_of_the_patches_and_not_the_class_token():
    head = Classifier(replace(MODEL, final_norm=False), 3)
    items = [
        Classification().prepare(Example(x, png(), label=x), rng(), tools(labels=LABELS)) for x in LABELS
    ]
    group = collate([Portion("task", "image", items)], MODEL).groups["task"]
    rows = torch.randn(3 * 17, 8)
    patches = rows.view(3, 17, 8)[:, 1:]
    expected = head.linear(head.norm(patches.mean(1)))
    assert torch.allclose(
        Classification().output(SimpleNamespace(rows=rows), group, {"classifier": head}), expected
    )


def test_the_loss_is_the_smoothed_cross_entropy_of_torch():
    head = Classifier(replace(MODEL, final_norm=False), 3)
    items = [
        Classification().prepare(Example(x, png(), label=x), rng(), tools(labels=LABELS)) for x in LABELS
    ]
    group = collate([Portion("task", "image", items)], MODEL).groups["task"]
    task, rows = Classification(label_smoothing=0.2), torch.randn(3 * 17, 8)
    total, right = task.loss(SimpleNamespace(rows=rows), group, {"classifier": head})[""]
    logits = task.output(SimpleNamespace(rows=rows), group, {"classifier": head})
    truth = torch.tensor([0, 1, 2])
    assert total.item() == pytest.approx(
        3 * F.cross_entropy(logits, truth, label_smoothing=0.2).item(), rel=1e-5
    )
    assert right.item() == (logits.argmax(-1) == truth).sum().item()


def test_the_score_is_accuracy_beside_the_majority_of_the_training_examples():
    said = 3 * torch.eye(3)[[0, 0, 2, 2]]
    held, train = coloured("blue", "green", "red", "blue"), coloured("green", "green", "red")
    found = Classification().score([said[:1], said[1:]], held.examples, tools(labels=LABELS), train.open())
    loss = F.cross_entropy(said, torch.tensor([0, 1, 2, 0])).item()
    assert found.metrics == pytest.approx(
        {"accuracy": 0.5, "majority": 0.25, "loss": loss, "examples": 4.0}, rel=1e-6
    )
    assert found.each["accuracy"].tolist() == [1, 0, 1, 0]


def test_a_classifier_draws_its_confusions_and_answers():
    log, held = Record(), coloured("blue", "green", "red", "blue")
    Classification().draw([torch.eye(3)[[0, 0, 2, 2]]], held.examples, tools(labels=LABELS), log)
    assert [figure[0] for figure in log.said["figure"]] == ["confusion", "answers"]
    assert all(figure[1].startswith(b"\x89PNG") for figure in log.said["figure"])


def test_a_retrieval_item_is_a_picture_and_its_framed_caption():
    item = Retrieval().prepare(Example("x", png(), ("cat",)), rng(), tools())
    assert item.image.shape == (3, 16, 16)
    assert item.text.tolist() == [0, *Letters().encode("cat"), 2]


def test_a_caption_that_is_too_long_is_cut_and_still_ends():
    item = Retrieval().prepare(Example("x", png(), ("a long caption",)), rng(), tools())
    assert (len(item.text), item.text[-1]) == (MODEL.text_tokens, 2)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("x", png()), "x: no caption"),
        (Example("x", captions=("a",)), "x: no picture"),
        (Example("x", png(), ("",)), "x: caption 1 is empty"),
        (Example("x", png(), caption_ids=(np.array([60]),)), "x: id 60 is none of the model's 52"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_a_pair_that_lacks_something_is_named(example, message, train):
    with pytest.raises(DataError, match=message):
        Retrieval().prepare(example, rng(), tools(train=train))


def test_training_draws_one_caption_and_evaluation_holds_all_of_them():
    example, letters = Example("x", png(), ("cat", "a big dog and more", "ox")), Letters()
    drawn = {len(Retrieval().prepare(example, rng(seed), tools()).text) for seed in range(20)}
    assert drawn == {4, 5, 10}
    item = Retrieval().prepare(example, rng(), tools(train=False))
    assert item.text.tolist() == [0, *letters.encode("cat"), 2]
    assert item.extra["lengths"].tolist() == [5, 10, 4]
    assert item.extra["cut"].tolist() == [0, 1, 0]
    assert item.extra["texts"].shape == (3, 10)
    assert item.extra["texts"][2].tolist() == [0, *letters.encode("ox"), 2, *[letters.pad_id] * 6]


def test_captions_that_are_ids_stand_in_place_of_words():
    example = Example("x", png(), caption_ids=(np.array([7, 8]), np.array([9])))
    item = Retrieval().prepare(example, rng(), tools(train=False))
    assert item.extra["texts"].tolist() == [[0, 7, 8, 2], [0, 9, 2, 1]]


def test_a_task_may_cut_captions_sooner_than_the_model():
    item = Retrieval(text_tokens=4).prepare(Example("x", png(), ("a boat",)), rng(), tools())
    assert len(item.text) == 4


def test_retrieval_without_a_tokenizer_names_the_setting():
    with pytest.raises(UserError, match="set text_tokenizer"):
        Retrieval().prepare(Example("x", png(), ("a",)), rng(), tools(tokenizer=None))


@pytest.fixture
def head():
    found = ContrastiveHead(8)
    with torch.no_grad():
        found.logit_scale.fill_(math.log(10))
    return found


def test_vectors_have_length_one_and_the_scale_is_the_exponential(head):
    pictures, texts, scale = head(torch.randn(3, 8), torch.randn(3, 8))
    assert torch.allclose(pictures.norm(dim=1), torch.ones(3))
    assert torch.allclose(texts.norm(dim=1), torch.ones(3))
    assert scale.item() == pytest.approx(10)


def test_the_contrastive_loss_is_the_mean_of_both_ways(head):
    items = [Retrieval().prepare(Example(t, png(), (t,)), rng(), tools()) for t in ("a", "bb", "ccc")]
    group = collate([Portion("task", "dual", items)], MODEL).groups["task"]
    rows = torch.randn(3 * 17 + 12, 8)
    pictures, texts, scale = head(rows[[0, 17, 34]], rows[[51, 54, 58]])
    logits, truth = scale * pictures @ texts.T, torch.arange(3)
    expected = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    total, right = Retrieval().loss(SimpleNamespace(rows=rows), group, {"contrastive": head})[""]
    assert total.item() == pytest.approx(3 * expected.item(), rel=1e-5)
    assert right.item() == (logits.argmax(1) == truth).sum().item()


def of_table(scores, captions=None, duplicates=True):
    """Recalls of a (texts, pictures) table of scores; by default every picture has one caption of its own."""
    matches = Matches.of(captions or [[str(n)] for n in range(scores.shape[1])], duplicates)
    return recalls(matches.ranks(lambda asked: scores.T[asked], lambda asked: scores[asked]), matches)


def test_recalls_of_a_table_made_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.1, 0.6, 0.7]])  # texts by pictures
    found = of_table(scores)
    assert found["t2i_r1"] == pytest.approx(2 / 3)  # text 1 prefers picture 0
    assert found["i2t_r1"] == pytest.approx(2 / 3)  # picture 1 prefers text 2
    assert found["recall@1"] == pytest.approx(2 / 3)
    assert found["mean_recall"] == pytest.approx((2 * 2 / 3 + 4) / 6)
    assert found["t2i_r5"] == found["i2t_r10"] == 1
    assert (found["examples"], found["captions"]) == (3, 3)


def test_recall_at_five_looks_at_five():
    scores = torch.arange(8.0).expand(8, 8)  # every text prefers the last pictures
    found = of_table(scores)
    assert (found["t2i_r1"], found["t2i_r5"]) == (1 / 8, 5 / 8)


@pytest.mark.parametrize(("n", "k", "expected"), [(10, 5, 0.5), (10, 1, 0.1), (4, 5, 1.0)])
def test_chance_with_one_right_answer_is_k_over_n(n, k, expected):
    assert chance(np.ones(n, np.int64), n, k) == pytest.approx(np.full(n, expected))


def test_chance_grows_with_the_right_answers():
    assert chance(np.array([1, 2, 4]), 4, 2) == pytest.approx([2 / 4, 1 - 2 / 4 * 1 / 3, 1])


@pytest.mark.parametrize(("duplicates", "recall"), [(True, 1), (False, 2 / 3)])
def test_a_picture_with_an_equal_caption_is_a_hit_unless_it_is_switched_off(duplicates, recall):
    scores = torch.tensor(
        [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    )  # equal captions score the same
    found = of_table(scores, [["blue"], ["red"], ["blue"]], duplicates)
    assert found["t2i_r1"] == found["i2t_r1"] == pytest.approx(recall)


def said(pictures, texts, counts):
    """What the task says of a batch."""
    return {
        "pictures": pictures, "texts": texts, "counts": torch.tensor(counts),
        "cut": torch.zeros(len(counts), dtype=torch.int64),
    }  # fmt: skip


def test_the_score_joins_the_batches():
    vectors = F.normalize(torch.randn(3, 8), dim=1)
    outputs = [said(vectors[:2], vectors[:2], [1, 1]), said(vectors[2:], vectors[2:], [1])]
    examples = coloured("blue", "red", "green")
    found = Retrieval().score(outputs, examples.examples, tools(), examples.open())
    assert next(iter(found.metrics)) == "recall@1"
    assert [found.metrics[key] for key in ("recall@1", "t2i_r1", "i2t_r1", "examples")] == [1, 1, 1, 3]
    assert found.rows[1] == {
        "id": "1-red", "captions": ["a red square"], "best text": "a red square",
        "rank of the first own caption": 1, "ranks of the picture": [1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("order", "drawn"), [([0, 1, 2], ["retrieval"]), ([1, 0, 2], ["retrieval", "retrieval-mistakes"])]
)
def test_retrieval_draws_a_gallery_and_its_mistakes(order, drawn):
    log, examples = Record(), coloured("blue", "red", "green")
    vectors = torch.eye(3)
    Retrieval().draw([said(vectors, vectors[order], [1, 1, 1])], examples.examples, tools(), log)
    assert [figure[0] for figure in log.said["figure"]] == drawn
    assert all(figure[1].startswith(b"\x89PNG") for figure in log.said["figure"])


def test_a_gallery_of_an_example_without_a_picture_names_it():
    with pytest.raises(DataError, match="x: no picture"):
        retrieval_gallery(lambda _: torch.eye(1), [Example("x", captions=("a",))], tools(), Record())


def test_heads_of_retrieval_have_no_bias_and_one_temperature():
    (found,) = Retrieval().heads(tools()).values()
    shapes = {name: tuple(value.shape) for name, value in found.named_parameters()}
    assert shapes == {"logit_scale": (1,), "vision.weight": (8, 8), "language.weight": (8, 8)}
