"""The stage eval: protocols, and requirements that scripts rely on."""

import pytest
import torch
from pydantic import ValidationError
from small import Given, Record, coloured, pieces, png, stored

from beitctl.api import Example, Job
from beitctl.checkpoints.native import read_model, save_model
from beitctl.errors import CheckFailed, DataError, UserError
from beitctl_plugins.stages.eval import Eval
from beitctl_plugins.tasks.classification import Classification


def run(folder, model, protocol, source, **settings):
    log = Record()
    found = Eval(model=str(model), protocol=protocol, source=source, **settings).run(Job(folder, log))
    return found, log


def knn(tmp_path, source=None, reference=None, **settings):
    known = reference or coloured("blue", "red", "green")
    return run(
        tmp_path,
        stored(tmp_path),
        "knn",
        source or coloured("red", "blue"),
        reference=known,
        neighbours=1,
        **settings,
    )[0]


def test_the_nearest_neighbour_of_a_colour_is_that_colour(tmp_path):
    found = knn(tmp_path)
    assert found.pop("protocol").startswith("k-NN, k = 1, cosine similarity, votes weighed by similarity, ")
    assert found.pop("intervals_95") == {"pretrained": [1.0, 1.0], "random_init": [1.0, 1.0]}
    assert found == {
        "pretrained": 1.0, "random_init": 1.0, "majority": 0.5, "examples": 2.0, "left_out": 0.0,
        "reference": 3.0, "reference_left_out": 0.0, "label_not_in_reference": 0.0,
    }  # fmt: skip


def test_a_colour_that_has_another_name_is_not_found(tmp_path):
    blue = coloured("blue").examples[0]
    other = Given(examples=(Example("x", blue.image, label="sky"), *coloured("red").examples))
    found = knn(tmp_path, source=other)
    assert (found["pretrained"], found["label_not_in_reference"]) == (0.5, 1)


def test_knn_compares_with_the_seeds_random_weights(tmp_path):
    assert knn(tmp_path, seed=3)["random_init"] == 1.0


@pytest.mark.parametrize("bad", [Example("x", png()), Example("x", b"torn", label="red")])
@pytest.mark.parametrize("where", ["source", "reference"])
def test_a_picture_without_a_label_or_that_is_torn_is_counted(tmp_path, bad, where):
    good = {"source": coloured("red"), "reference": coloured("red", "blue")}
    found = knn(tmp_path, **good | {where: Given(examples=(*good[where].examples, bad))})
    left_out = {"source": found["left_out"], "reference": found["reference_left_out"]}
    assert (found["examples"], found["reference"]) == (1, 2)
    assert left_out == {"source": float(where == "source"), "reference": float(where == "reference")}


def test_knn_with_a_single_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="reference: k-NN needs at least two classes, all 2 pictures are 'r"):
        knn(tmp_path, reference=coloured("red", "red"))


@pytest.mark.parametrize("feature", ["patches", "class", "both"])
def test_every_feature_of_a_picture_can_be_compared(tmp_path, feature):
    assert knn(tmp_path, feature=feature, temperature=0.07)["examples"] == 2


def test_a_limit_holds_for_every_protocol(tmp_path):
    source = coloured("red", "blue", "red", "blue", "red")
    assert knn(tmp_path, source=source, limit=2)["examples"] == 2
    model = stored(tmp_path / "tuned", "classification", ("blue", "red"))
    assert run(tmp_path, model, "task", source, limit=3)[0]["examples"] == 3


def test_knn_deeper_than_the_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"depth \(9\) must not exceed the model's \d+ blocks"):
        knn(tmp_path, depth=9)


def test_knn_without_any_label_is_refused(tmp_path):
    with pytest.raises(DataError, match="source: none of the 1 examples to measure on can be used: x: no"):
        knn(tmp_path, source=Given(examples=(Example("x", png()),)))


def test_knn_without_a_reference_is_refused():
    with pytest.raises(ValidationError, match="protocol 'knn' needs reference: labelled training pictures"):
        Eval(model="m", protocol="knn", source=coloured("red"))


def test_results_are_logged_as_an_evaluation(tmp_path):
    model, known = stored(tmp_path), coloured("blue", "red")
    found, log = run(tmp_path, model, "knn", coloured("red"), reference=known, neighbours=1)
    assert log.said["evaluation"] == [("knn", 0, found)]


@pytest.mark.parametrize(
    "condition", ["pretrained>=1", " pretrained >= 0.9 ", "examples<3", "examples<=2", "pretrained>9e-1"]
)
def test_a_requirement_that_holds_is_fine(tmp_path, condition):
    assert knn(tmp_path, require=[condition])


@pytest.mark.parametrize(
    "condition", ["pretrained>1", "pretrained>=1.5", "examples<2", "examples<=1", "pretrained < -1"]
)
def test_a_missed_requirement_ends_with_exit_code_7_and_what_was_found(tmp_path, condition):
    with pytest.raises(CheckFailed) as caught:
        knn(tmp_path, require=[condition])
    value = 1 if "pretrained" in condition else 2
    assert caught.value.exit_code == 7
    assert str(caught.value) == f"required but not so: {condition} (found {value})"


def test_all_missed_requirements_are_told(tmp_path):
    with pytest.raises(CheckFailed, match=r"pretrained>1 \(found 1\); examples>5 \(found 2\)"):
        knn(tmp_path, require=["pretrained>1", "reference>2", "examples>5"])


def test_a_requirement_on_an_unknown_metric_names_those_there_are(tmp_path):
    with pytest.raises(
        UserError,
        match="require: no metric 'acuracy'; there are pretrained, random_init, majority, examples, left_out",
    ):
        knn(tmp_path, require=["acuracy>0"])


@pytest.mark.parametrize(
    "condition", ["accuracy", "accuracy=0.5", ">=0.5", "accuracy>=", "accuracy >= high", "a>=1.2.3", "a>=e"]
)
def test_a_requirement_that_cannot_be_read_is_refused(condition):
    with pytest.raises(ValidationError, match=r"is no condition; write METRIC>=NUMBER, or with > < <="):
        Eval(model="m", protocol="task", source=coloured("red"), require=[condition])


def test_a_fine_tuned_classifier_is_scored_by_its_task(tmp_path):
    model = stored(tmp_path, "classification", ("blue", "red"))
    found, log = run(tmp_path, model, "task", coloured("red", "blue", "red"))
    assert {"accuracy", "examples", "intervals_95", "left_out", "majority"} <= set(found)
    assert found["left_out"] == 0
    assert found["majority"] == pytest.approx(2 / 3)
    assert [figure[0] for figure in log.said["figure"]] == ["confusion", "answers"]


def test_a_fine_tuned_retriever_is_scored_with_the_tokenizer_beside_it(tmp_path):
    model = stored(tmp_path, "retrieval", tokenizer=pieces())
    found, _ = run(tmp_path, model, "task", coloured("red", "blue", "green"))
    assert found["examples"] == 3
    assert found["t2i_r5"] == 1


def test_a_model_without_a_task_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"does not say which task .* or use protocol 'knn'"):
        run(tmp_path, stored(tmp_path), "task", coloured("red"))


def unnamed(folder, labels):
    """A classifier whose file says neither task nor labels, as official files do not."""
    found = read_model(stored(folder, "classification", labels))
    save_model(folder, found.tensors, found.model)
    return folder


def test_a_model_whose_file_names_no_task_is_measured_with_the_one_that_is_given(tmp_path):
    source = coloured("red", "blue", "red")
    named, _ = run(tmp_path, stored(tmp_path / "a", "classification", ("blue", "red")), "task", source)
    found, _ = run(tmp_path, unnamed(tmp_path / "b", ("blue", "red")), "task", source, task=Classification())
    assert found == named


def test_labels_come_from_the_reference_where_the_file_has_none(tmp_path):
    model, known = unnamed(tmp_path, ("blue", "green", "red")), coloured("blue", "red", "green")
    found, _ = run(tmp_path, model, "task", coloured("red"), task=Classification(), reference=known)
    assert found["examples"] == 1


def test_heads_of_another_size_are_refused(tmp_path):
    model = unnamed(tmp_path, ("blue", "green", "red"))
    with pytest.raises(UserError, match=r"not those of the task with 2 labels: .*weight \(3, 8\), expected"):
        run(tmp_path, model, "task", coloured("red", "blue"), task=Classification())


def test_examples_of_other_classes_only_are_refused(tmp_path):
    model = stored(tmp_path, "classification", ("blue", "red"))
    with pytest.raises(
        DataError, match="none of the 1 examples to measure on can be used: 0-green: label 'green' is none of"
    ):
        run(tmp_path, model, "task", coloured("green"))


def test_zero_shot_retrieval_needs_a_head_for_text(tmp_path):
    with pytest.raises(
        UserError, match="no head for text tokens; zero-shot retrieval needs a pretrained model"
    ):
        run(tmp_path, stored(tmp_path), "zero-shot-retrieval", coloured("red", "blue"))


def test_zero_shot_retrieval_needs_two_captioned_pictures(tmp_path):
    source = Given(examples=(*coloured("red").examples, Example("x", png())))
    with pytest.raises(
        UserError, match="retrieval needs at least two pictures with captions, the source has 1"
    ):
        run(tmp_path, stored(tmp_path), "zero-shot-retrieval", source)


def test_zero_shot_retrieval_needs_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="this task reads text: set text_tokenizer"):
        run(tmp_path, stored(tmp_path, "masked-text"), "zero-shot-retrieval", coloured("red", "blue"))


def test_zero_shot_retrieval_measures_recalls_within_the_limit(tmp_path):
    model = stored(tmp_path, "masked-text", tokenizer=pieces())
    source = coloured("red", "blue", "green", "grey")
    found, log = run(tmp_path, model, "zero-shot-retrieval", source, limit=3)
    assert (found["examples"], found["left_out"]) == (3, 0)
    assert found["protocol"].startswith("first caption of every picture")
    assert found["chance_r5"] == 1
    assert [figure[0] for figure in log.said["figure"]] == ["retrieval"]


def test_zero_shot_retrieval_counts_pictures_without_a_caption(tmp_path):
    model = stored(tmp_path, "masked-text", tokenizer=pieces())
    source = Given(examples=(*coloured("red", "blue").examples, Example("x", png())))
    found, log = run(tmp_path, model, "zero-shot-retrieval", source)
    assert (found["examples"], found["left_out"]) == (2, 1)
    assert log.said["warning"][0][:2] == ("W401", "1 of 3 pictures have no caption, such as x")


def test_zero_shot_retrieval_of_a_model_with_a_contrastive_head_is_by_its_vectors(tmp_path):
    model = stored(tmp_path, "retrieval", tokenizer=pieces())
    source = coloured("red", "blue", "green", captions=("a {} square", "{}"))
    by_task, _ = run(tmp_path, model, "task", source)
    found, log = run(tmp_path, model, "zero-shot-retrieval", source)
    assert found.pop("protocol") == log.said["note"][0][0].removeprefix("protocol: ")
    assert found == by_task
    assert found["captions"] == 6
    assert run(tmp_path, model, "zero-shot-retrieval", source, limit=2)[0]["examples"] == 2


def test_zero_shot_retrieval_leaves_the_heads_of_pretraining_alone(tmp_path):
    found = read_model(stored(tmp_path / "a", "retrieval", tokenizer=pieces()))
    other = {"heads.text_tokens.weight": torch.zeros(52, 8), "heads.text_tokens.bias": torch.zeros(52)}
    save_model(tmp_path / "b", found.tensors | other, found.model, tokenizer=pieces())
    source = coloured("red", "blue", "green")
    tuned, _ = run(tmp_path, tmp_path / "b", "zero-shot-retrieval", source)
    assert tuned == run(tmp_path, tmp_path / "a", "zero-shot-retrieval", source)[0]


def test_zero_shot_retrieval_by_another_task_is_refused(tmp_path):
    model = stored(tmp_path, "retrieval", tokenizer=pieces())
    with pytest.raises(UserError, match="task must be of the kind retrieval, or left out"):
        run(tmp_path, model, "zero-shot-retrieval", coloured("red", "blue"), task=Classification())


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UserError, match="none: no such file or folder"):
        run(tmp_path, tmp_path / "none", "task", coloured("red"))


def test_the_plan_counts_examples():
    made = Eval(model="@pretrain", protocol="task", source=coloured("red", "blue"))
    assert made.plan() == {"protocol": "task", "model": "@pretrain", "examples": 2}
