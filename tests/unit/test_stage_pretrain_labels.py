"""Pretraining on labels, with and without a teacher (ViT, DeiT)."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from pretraining import PICTURES, objective, run, stage
from pydantic import ValidationError
from small import MODEL, Codes, Record, coloured, training
from torch import nn
from torch.nn import functional as F

from beitctl.api import Job, Plugin, Tools
from beitctl.checkpoints.loading import load_model, read_model
from beitctl.config import OptimConfig
from beitctl.data.loader import Place, StepData, Stream
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.shard import fill
from beitctl.errors import UserError
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages import shared
from beitctl_plugins.stages.eval import Eval
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.teachers.timm import TimmTeacher


@pytest.fixture(autouse=True)
def tokens(monkeypatch):
    monkeypatch.setattr(shared, "open_tokens", lambda job, value: Codes())


LABELS = Classification(pool="cls", label_smoothing=0.0)
LEARN = training(40, optim=OptimConfig(peak_lr=0.02))


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervised")
    held = coloured("blue", "red", "blue")
    table = objective(LABELS, held_out=held)
    return folder, *run(folder, stage(task=LABELS, train=LEARN, objectives={"image": table}))


def test_pretraining_learns_labels(supervised):
    assert supervised[1]["image"]["accuracy"] == 1


def test_the_baseline_of_labels_is_the_most_frequent_class(supervised):
    assert supervised[1]["image"]["baseline_accuracy"] in (1 / 3, 2 / 3)


def test_weights_of_a_supervised_run_hold_classes_and_task(supervised):
    found = read_model(supervised[0])
    assert found.labels == ("blue", "red")
    assert found.open_task() == LABELS


def test_a_supervised_run_is_measured_by_its_task(supervised, tmp_path):
    made = Eval(model=str(supervised[0]), protocol="task", source=coloured("blue", "red", "red"))
    found = made.run(Job(tmp_path, Record()))
    assert (found["accuracy"], found["examples"]) == (1, 3)


def test_a_supervised_run_loads_as_a_classifier(supervised):
    assert load_model(supervised[0])(torch.zeros(2, 3, 16, 16)).shape == (2, 2)


def test_classes_are_those_of_all_sources_with_labels(tmp_path):
    tables = {
        "a": objective(LABELS, coloured("red", "green")),
        "b": objective(LABELS, coloured("blue", "red")),
        "c": objective(source=coloured("grey")),
    }
    assert stage(objectives=tables)._labels() == ("blue", "green", "red")


def test_weights_of_several_objectives_name_no_task(tmp_path):
    tables = {"labels": objective(LABELS), "image": objective()}
    run(tmp_path / "run", stage(objectives=tables))
    assert read_model(tmp_path / "run").task is None


@pytest.mark.parametrize(
    ("pool", "final_norm", "wanted"), [("mean", True, "false"), ("cls", False, "true")], ids=["mean", "cls"]
)
def test_a_model_that_would_not_be_read_as_the_task_says_is_refused(pool, final_norm, wanted):
    with pytest.raises(
        ValidationError,
        match=rf"objectives.image: its task reads a model with final_norm = {wanted}; set that in model",
    ):
        stage(model=replace(MODEL, final_norm=final_norm), task=Classification(pool=pool))


def test_the_mean_patch_can_be_pretrained_on_labels(tmp_path):
    model = replace(MODEL, final_norm=False)
    _, found, _ = run(tmp_path / "run", stage(model=model, task=Classification(pool="mean")))
    assert "heads.classifier.norm.weight" in found


def test_a_source_of_one_class_is_refused(tmp_path):
    table = objective(LABELS, coloured("red", "red"))
    with pytest.raises(UserError, match="at least two classes, the source has 1"):
        run(tmp_path / "run", stage(objectives={"image": table}))


DEIT = replace(MODEL, distill_token=True, mask_token=False)


class Reddish(Plugin):
    """A teacher that takes red for blue, and notes what it is shown."""

    def open(self, grid):
        raise NotImplementedError

    def classifier(self, classes):
        return Seen()


class Seen(nn.Module):
    shown: ClassVar[list[torch.Tensor]] = []

    def forward(self, images):
        Seen.shown.append(images)
        red = images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2))
        return torch.stack([red, ~red], 1).float()


def deit(teacher, **settings):
    return Classification(**{"pool": "cls", "distil": teacher, "label_smoothing": 0.1} | settings)


def one_pass(task, model=DEIT):
    """Losses of one pass, the two logits of the head, and the labels."""
    made = Tools(model, labels=("blue", "red"), pictures=shared.pictures())
    learner = MultiwayLearner(Multiway(model), [Objective("image", task)], {"image": made})
    fill(learner, lambda name, shape: initial(name, shape, model, 0) + 0.1)
    (batch,) = StepData([Stream("image", task, PICTURES.open(), 4, made)], model, 0, Place())[0]
    group = batch.groups["image"]
    logits = learner.heads["classifier"].both(learner.encode(batch).rows[group.picture_rows])
    return learner(batch), logits, group.labels, learner


def test_the_class_token_learns_labels_and_the_distillation_token_the_teachers_answers():
    sums, (by_class, by_teacher), labels, _ = one_pass(deit(Reddish()))
    said = 1 - labels
    assert sums["image"][0].item() == pytest.approx(
        F.cross_entropy(by_class, labels, reduction="sum", label_smoothing=0.1).item(), rel=1e-5
    )
    assert sums["image.teacher"][0].item() == pytest.approx(
        F.cross_entropy(by_teacher, said, reduction="sum").item(), rel=1e-5
    )


def test_labels_and_teacher_count_half_each():
    assert one_pass(deit(Reddish()))[3].weights == {"image": 0.5, "image.teacher": 0.5}


@pytest.mark.parametrize("pixels", ["half", "imagenet"])
def test_the_teacher_sees_the_picture_between_0_and_1(pixels):
    Seen.shown.clear()
    one_pass(deit(Reddish()), replace(DEIT, pixels=pixels))
    (shown,) = Seen.shown
    assert shown.shape == (4, 3, 16, 16)
    assert sorted({round(x, 3) for x in shown.mean((2, 3)).flatten().tolist()}) == [0, 1]


def test_a_teacher_needs_a_token_that_learns_from_it(tmp_path):
    with pytest.raises(UserError, match='set distill_token = true and pool = "cls"'):
        run(tmp_path / "run", stage(task=deit(Reddish())))


def test_a_mean_patch_does_not_learn_from_a_teacher(tmp_path):
    model = replace(DEIT, final_norm=False)
    with pytest.raises(UserError, match='set distill_token = true and pool = "cls"'):
        run(tmp_path / "run", stage(model=model, task=deit(Reddish(), pool="mean")))


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    import timm

    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "teacher.pth")
    teacher = TimmTeacher(model="test_efficientnet", weights=str(tmp_path / "teacher.pth"), input_px=32)
    with pytest.raises(
        UserError, match="the teacher test_efficientnet knows 1000 classes, the data have 2: it has to know"
    ):
        run(tmp_path / "run", stage(model=DEIT, task=deit(teacher)))


def test_a_distilled_run_reports_labels_and_teacher(tmp_path):
    teacher = TimmTeacher(model="test_efficientnet", weights="random", input_px=32)
    found, _, _ = run(tmp_path / "run", stage(model=DEIT, task=deit(teacher)))
    assert sorted(found) == ["image", "image_teacher"]


def test_a_second_class_token_learns_labels_without_a_teacher():
    sums, (by_class, by_teacher), labels, _ = one_pass(deit(None, label_smoothing=0.0))
    mean = (by_class + by_teacher) / 2
    assert list(sums) == ["image"]
    assert sums["image"][0].item() == pytest.approx(
        F.cross_entropy(mean, labels, reduction="sum").item(), rel=1e-5
    )
