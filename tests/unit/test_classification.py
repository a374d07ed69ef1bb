"""Classification: mixed pictures, given classes, limited answers, what it tells of its answers."""

from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small import MODEL, Record, coloured, rng, tools, weights
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F

from beitctl.api import Plugin
from beitctl.data.batch import Portion, collate
from beitctl.data.loader import Place, StepData, Stream
from beitctl.data.opening import opened
from beitctl.engine.learner import HALF, MultiwayLearner, Objective, normalise
from beitctl.errors import DataError
from beitctl.model.multiway import Multiway
from beitctl_plugins.sources.embedded import Embedded
from beitctl_plugins.tasks import mixing
from beitctl_plugins.tasks.classification import Classification

LABELS = ("blue", "green", "grey", "red")
PICTURES = coloured("blue", "green", "red", "grey", "red", "blue", "green", "grey")
MIXED = {"mixup": 0.8, "cutmix": 1.0}
CLASSIFIER = replace(MODEL, final_norm=False)


def learner(task, model=CLASSIFIER):
    made = tools(model=model, labels=LABELS)
    found = MultiwayLearner(Multiway(model), [Objective("task", task)], {"task": made})
    with torch.no_grad():
        for name, value in weights(found, "", model).items():
            found.get_parameter(name).copy_(value + 0.1)
    return found


def step(task, samples=8, place=None, model=CLASSIFIER, train=True):
    stream = Stream("task", task, PICTURES.open(), samples, tools(model=model, labels=LABELS, train=train))
    return StepData([stream], model, 0, place or Place())[0]


def seen(made, batch):
    """The pictures that the model sees, and the logits of its task."""
    encoded, group = made.encode(batch), batch.groups["task"]
    return encoded.packed.pixels, made.objectives[0].task.output(encoded, group, dict(made.heads.items()))


def test_the_loss_of_mixed_pictures_is_that_of_timm_with_their_shares():
    task = Classification(**MIXED)
    made, (batch,) = learner(task), step(task)
    group = batch.groups["task"]
    pixels, logits = seen(made, batch)
    assert not torch.equal(pixels, normalise(batch.pixels, HALF))
    total, hits = made(batch)["task"]
    expected, right = 0.0, 0
    for first in range(0, 8, 2):
        pair, share = slice(first, first + 2), float(group.chance[first, 0])
        targets = mixup_target(group.labels[pair], 4, share, 0.1)
        expected += 2 * SoftTargetCrossEntropy()(logits[pair], targets).item()
        right += int((logits[pair].argmax(1) == targets.argmax(1)).sum())
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert hits.item() == right


def test_pictures_are_erased_before_they_are_mixed():
    task = Classification(erase=1.0, **MIXED)
    made, (batch,) = learner(task), step(task)
    chance = batch.groups["task"].chance
    plain = normalise(batch.pixels, HALF)
    expected = mixing.mixed(mixing.erased(plain, chance[:, 5:]), chance[:, :5])
    assert torch.equal(seen(made, batch)[0], expected)


@pytest.mark.parametrize("settings", [MIXED, {"erase": 1.0}, {"augment": "beit3"}], ids=str)
def test_nothing_is_drawn_for_evaluation(settings):
    task = Classification(**settings)
    (batch,) = step(task, train=False)
    assert batch.groups["task"].chance.shape[1] == 0
    made = learner(task)
    assert torch.equal(seen(made, batch)[0], normalise(batch.pixels, HALF))
    total, _ = made(batch)["task"]
    logits, labels = seen(made, batch)[1], batch.groups["task"].labels
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_training_batch_is_not_mixed_in_eval_mode():
    task = Classification(**MIXED)
    made, (batch,) = learner(task).eval(), step(task)
    pixels, logits = seen(made, batch)
    assert torch.equal(pixels, normalise(batch.pixels, HALF))
    labels = batch.groups["task"].labels
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    assert made(batch)["task"][0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("world", "micro"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_loss_and_hits_do_not_depend_on_ranks_and_passes(world, micro):
    task = Classification(erase=0.5, augment="beit3", **MIXED)
    made, (whole,) = learner(task), step(task)
    sums = [
        made(batch)["task"] for rank in range(world) for batch in step(task, place=Place(rank, world, micro))
    ]
    total, hits = made(whole)["task"]
    assert sum(loss.item() for loss, _ in sums) == pytest.approx(total.item(), rel=1e-5)
    assert sum(right.item() for _, right in sums) == hits.item()


def test_a_pass_of_an_odd_number_is_refused():
    task = Classification(**MIXED)
    made, (batch,) = learner(task), step(task, samples=3)
    with pytest.raises(ValueError, match="in twos, but a pass holds 3"):
        made(batch)


@pytest.mark.parametrize(
    ("settings", "even"),
    [({}, False), ({"erase": 0.5}, False), ({"mixup": 0.8}, True), ({"cutmix": 1.0}, True)],
    ids=str,
)
def test_mixing_asks_for_even_passes(settings, even):
    assert Classification(**settings).even_passes is even


def test_gradients_flow_through_mixed_pictures():
    task = Classification(**MIXED)
    made, (batch,) = learner(task), step(task)
    made(batch)["task"][0].backward()
    gradients = [p.grad for n, p in made.named_parameters() if "vision" in n or "classifier" in n]
    assert all(g is not None and g.isfinite().all() for g in gradients)


DEIT = replace(MODEL, distill_token=True, mask_token=False)


class Reddish(Plugin):
    """A teacher that notes what it is shown."""

    def classifier(self, classes):
        return Seen()


class Seen(nn.Module):
    shown: ClassVar[list[torch.Tensor]] = []

    def forward(self, images):
        Seen.shown.append(images)
        return images.mean((2, 3)) @ torch.eye(3, 4)


def test_deit_learns_hard_answers_of_the_teacher_on_mixed_pictures():
    Seen.shown.clear()
    task = Classification.model_construct(
        **{**Classification(pool="cls").__dict__, **MIXED, "distil": Reddish()}
    )
    made, (batch,) = learner(task, DEIT), step(task, model=DEIT)
    encoded, group = made.encode(batch), batch.groups["task"]
    sums = made(batch)
    (shown,) = Seen.shown
    mixed = mixing.mixed(normalise(batch.pixels, HALF), group.chance[:, :5])
    assert torch.allclose(shown, mixed / 2 + 0.5, atol=1e-6)
    by_class, by_teacher = made.heads["classifier"].both(encoded.rows[group.picture_rows])
    said = Seen()(shown).argmax(1)
    targets = mixing.soft_targets(group.labels, group.chance[:, :5], 4, 0.1)
    assert sums["task.teacher"][0].item() == pytest.approx(
        F.cross_entropy(by_teacher, said, reduction="sum").item(), rel=1e-5
    )
    assert sums["task"][0].item() == pytest.approx(mixing.soft_entropy(by_class, targets).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"augment": "randaug"}, "no augmentation"),
        ({"crop_pct": 0}, "greater than 0"),
        ({"crop_scale": (0.5, 0.2)}, "smallest and largest share"),
        ({"mixup": -1}, "greater than or equal to 0"),
        ({"mixup": float("inf")}, "finite"),
        ({"erase": 1.5}, "less than or equal to 1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Classification(**settings)


def listed(tmp_path, text):
    (tmp_path / "names.txt").write_text(text, encoding="utf-8")
    return str(tmp_path / "names.txt")


def test_classes_are_the_labels_that_occur():
    assert Classification().vocabulary(PICTURES.open()) == LABELS


def test_a_file_fixes_the_classes_and_their_order(tmp_path):
    names = listed(tmp_path, "\ufeffred\nyellow green\nblue \ngreen\ngrey\n")
    found = Classification(class_names=names).vocabulary(PICTURES.open())
    assert found == ("red", "yellow green", "blue", "green", "grey")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red\n\nblue\n", "line 2 is empty"),
        ("red\nblue\nred\n", "line 3 repeats 'red' of line 1"),
        (
            "red\nblue\n",
            r"does not have 2 of the labels that occur, those of 4 examples: green, grey; it has red",
        ),
    ],
)
def test_a_file_of_classes_that_cannot_be_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        Classification(class_names=listed(tmp_path, text)).vocabulary(PICTURES.open())


def test_a_missing_file_of_classes_is_named(tmp_path):
    with pytest.raises(DataError, match=r"class_names: .*nowhere\.txt cannot be read"):
        Classification(class_names=str(tmp_path / "nowhere.txt")).vocabulary(PICTURES.open())


def test_of_many_classes_a_message_names_some():
    names = tuple(f"class {number}" for number in range(1200))
    with pytest.raises(DataError, match=r"is none of class 0, .*, class 9, \.\.\. \(1,200 in all\)"):
        Classification().prepare(PICTURES.examples[0], rng(), tools(labels=names))


SEVEN = ("blue", "fog", "green", "grey", "mud", "red", "sea")
HELD = coloured("blue", "green", "red")
LOGITS = torch.tensor(
    [[1.0, 5, 0, 0, 0, 4, 0], [6, 5, 1, 4, 3, 2, 0], [0.0, 0, 0, 0, 0, 9, 0]]
)  # best: fog, blue, red


def scored(**settings):
    made = tools(labels=SEVEN, train=False)
    return Classification(**settings).score([LOGITS[:2], LOGITS[2:]], HELD.examples, made, HELD.open())


def test_the_first_five_are_counted_where_there_are_more_classes():
    metrics = scored().metrics
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["accuracy_top5"] == pytest.approx(2 / 3)
    assert next(iter(metrics)) == "accuracy"


def test_every_answer_is_a_row():
    first, second, third = scored().rows
    assert {key: first[key] for key in ("id", "label", "predicted")} == {
        "id": "0-blue", "label": "blue", "predicted": "fog",
    }  # fmt: skip
    assert first["probability"] == pytest.approx(LOGITS[0].softmax(0)[1].item())
    assert second["top5"] == ["blue", "fog", "grey", "mud", "red"]
    assert third["predicted"] == "red"


def test_answers_can_be_limited_to_what_occurs():
    found = scored(restrict_to="occurring")
    assert [row["predicted"] for row in found.rows] == ["red", "blue", "red"]
    assert set(found.rows[0]["top5"]) == {"blue", "green", "red"}
    assert "accuracy_top5" not in found.metrics
    kept = LOGITS[:, [0, 2, 5]]
    assert found.metrics["loss"] == pytest.approx(F.cross_entropy(kept, torch.arange(3)).item(), rel=1e-6)


def test_answers_can_be_limited_to_a_list(tmp_path):
    found = scored(restrict_to=listed(tmp_path, "red\ngreen\nblue\ngrey\nsea\nmud\n"))
    assert [row["predicted"] for row in found.rows] == ["red", "blue", "red"]
    assert found.metrics["accuracy_top5"] == 1
    assert all("fog" not in row["top5"] for row in found.rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red\nblue\ngreen\nnight\n", r"names classes that the model does not know: night"),
        ("red\nblue\n", r"lacks classes of the measured examples: green"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        scored(restrict_to=listed(tmp_path, text))


def test_figures_hold_the_classes_that_occur_and_a_table_begins_with_the_hardest():
    log = Record()
    Classification().draw([LOGITS], HELD.examples, tools(labels=SEVEN, train=False), log)
    ((name, _, columns, rows),) = log.said["table"]
    assert (name, columns[0]) == ("classes", "class")
    assert rows == [("blue", 1, 0.0, "fog (1)"), ("green", 1, 0.0, "blue (1)"), ("red", 1, 1.0, "")]
    assert [figure[0] for figure in log.said["figure"]] == ["confusion", "answers"]


def test_the_toy_size_learns_the_embedded_classes_without_a_floor():
    table = {"mixup": 0.8, "cutmix": 1.0, "class_names": "imagenet.txt", "augment": "beit3", "erase": 0.25}
    made = Classification(**Classification.smoke(table))
    assert (made.label_smoothing, made.even_passes, made.class_names) == (0, False, "")
    assert (made.augment, made.erase) == ("beit3", 0.25)
    source = Embedded(**{k: v for k, v in Classification.smoke_data("test").items() if k != "kind"})
    assert len(made.vocabulary(opened(source))) > 5


def test_items_of_other_tasks_have_no_numbers_for_mixing():
    item = Classification().prepare(PICTURES.examples[0], rng(), tools(labels=LABELS))
    assert item.chance == ()
    group = collate([Portion("task", "image", [item])], MODEL).groups["task"]
    x = torch.randn(1, 3, 16, 16)
    assert Classification().augmented(x, group) is x
    assert Classification(**MIXED).augmented(x, SimpleNamespace(chance=torch.zeros(1, 0))) is x


def test_mixing_changes_no_crop():
    plain = Classification().prepare(PICTURES.examples[0], rng(1), tools(labels=LABELS))
    mixed = Classification(erase=0.5, **MIXED).prepare(PICTURES.examples[0], rng(1), tools(labels=LABELS))
    assert np.array_equal(plain.image, mixed.image)
    assert len(mixed.chance) == 10
