"""The stages finetune and export on the smallest model."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from small import ALONE, MODEL, Record, coloured, pieces, stored, training

from beitctl.api import Job
from beitctl.checkpoints import loading
from beitctl.checkpoints.loading import load_model
from beitctl.checkpoints.native import read_model
from beitctl.engine.optim import OptimConfig
from beitctl.errors import CheckFailed, DataError, UserError
from beitctl_plugins.stages.export import Export
from beitctl_plugins.stages.finetune import Finetune
from beitctl_plugins.stages.shared import check_share
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.tasks.masked import MaskedImage
from beitctl_plugins.tasks.retrieval import Retrieval

TRAIN = coloured("red", "blue", "red", "blue")


def stage(init, task=None, **settings):
    made = {"source": TRAIN, "held_out": coloured("blue", "red"), "samples": 4, "train": training(2)}
    return Finetune(init=str(init), task=task or Classification(), **made | settings)


def run(tmp_path, made):
    log = Record()
    return made.run(Job(tmp_path / "run", log)), log


def test_a_task_for_pretraining_is_refused(tmp_path):
    with pytest.raises(
        UserError,
        match=r"masked-image is for pretraining: it has no score\(\) .*; use .*classification, .*retrieval",
    ):
        run(tmp_path, stage(stored(tmp_path), MaskedImage()))


@pytest.mark.parametrize(("samples", "world", "micro"), [(5, 2, 0), (4, 1, 2)])
def test_a_contrastive_batch_that_is_not_whole_and_even_is_refused(tmp_path, samples, world, micro):
    with pytest.raises(
        UserError,
        match=rf"samples \({samples}\) to be a multiple of the {world} ranks and no accumulation",
    ):
        check_share("samples", Retrieval(), samples, micro, replace(ALONE, world=world))


def test_a_classifier_may_be_uneven_and_accumulate():
    assert check_share("samples", Classification(), 5, 2, replace(ALONE, world=2)) is None


def test_an_uneven_contrastive_batch_is_refused_before_training(tmp_path):
    made = stage(stored(tmp_path), Retrieval(), train=training(2, micro_samples=1))
    with pytest.raises(UserError, match="no accumulation"):
        run(tmp_path, made)
    assert not (tmp_path / "run").exists()


def test_fine_tuning_measures_the_held_out_examples_and_writes_the_model(tmp_path):
    metrics, log = run(tmp_path, stage(stored(tmp_path)))
    found = read_model(tmp_path / "run")
    assert metrics["examples"] == 2
    assert metrics["majority"] == 0.5
    assert found.labels == ("blue", "red")
    assert found.task["kind"] == "classification"
    assert [record[0] for record in log.said["step"]] == [1, 2]


def test_fine_tuning_learns_colours(tmp_path):
    train = training(40, optim=OptimConfig(peak_lr=0.02))
    assert run(tmp_path, stage(stored(tmp_path), train=train))[0]["accuracy"] == 1


def test_metrics_are_averaged_over_seeds_and_the_weights_are_those_of_the_first(tmp_path):
    stored(tmp_path)
    two, _ = run(tmp_path, stage(tmp_path, seeds=[0, 1]))
    weights = load_file(tmp_path / "run" / "weights" / "model.safetensors")
    one, _ = run(tmp_path / "one", stage(tmp_path))
    alone = load_file(tmp_path / "one" / "run" / "weights" / "model.safetensors")
    assert sorted(two["seeds"]) == ["0", "1"]
    assert two["accuracy"] == sum(m["accuracy"] for m in two["seeds"].values()) / 2
    assert two["seeds"]["0"] == one["seeds"]["0"]
    assert all(torch.equal(weights[name], value) for name, value in alone.items())


STILL = training(1, optim=OptimConfig(peak_lr=1e-9, warmup_steps=1))


@pytest.mark.parametrize("scratch", [False, True])
def test_training_starts_from_the_model_or_from_scratch(tmp_path, scratch):
    run(tmp_path, stage(stored(tmp_path), train=replace(STILL, seed=0), from_scratch=scratch, seeds=[5]))
    start, end = read_model(tmp_path).tensors, read_model(tmp_path / "run").tensors
    name = "model.blocks.0.ffn.vision.fc1.weight"
    assert torch.allclose(start[name], end[name], atol=1e-6) is not scratch


def test_stochastic_depth_can_be_set_for_fine_tuning(tmp_path):
    run(tmp_path, stage(stored(tmp_path), drop_path=0.2))
    assert read_model(tmp_path / "run").model == replace(MODEL, drop_path=0.2, final_norm=False)


def test_retrieval_is_fine_tuned_with_the_tokenizer_of_the_model(tmp_path):
    stored(tmp_path, tokenizer=pieces())
    metrics, _ = run(tmp_path, stage(tmp_path, Retrieval()))
    assert metrics["t2i_r5"] == 1
    assert read_model(tmp_path / "run").text_tokenizer().encode("a boat") == pieces().encode("a boat")


def test_a_source_of_one_class_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least two classes, the source has 1"):
        run(tmp_path, stage(stored(tmp_path), source=coloured("red", "red")))


def test_held_out_examples_of_other_classes_only_are_refused(tmp_path):
    with pytest.raises(DataError, match="none of the 2 examples to measure on can be used: 0-green: label"):
        run(tmp_path, stage(stored(tmp_path), held_out=coloured("green", "grey")))


def test_the_plan_says_how_long_it_trains_on_what():
    made = stage("@pretrain", from_scratch=True, seeds=[0, 1])
    assert made.plan() == {
        "init": "@pretrain (shape only)",
        "examples": 4,
        "held out": 2,
        "steps": 2,
        "epochs": 2.0,
        "trainings": 2,
    }


def export(tmp_path, model, **settings):
    log = Record()
    return Export(model=str(model), **settings).run(Job(tmp_path / "run", log))


@pytest.mark.parametrize(
    ("kind", "labels"), [("", ()), ("classification", ("blue", "red")), ("retrieval", ())]
)
def test_an_exported_model_reloads_to_the_same_outputs(tmp_path, kind, labels):
    model = stored(tmp_path, kind, labels)
    found = export(tmp_path, model)
    parameters = sum(value.numel() for value in read_model(model).tensors.values())
    files = [file for file in (tmp_path / "run" / "export").rglob("*") if file.is_file()]
    assert found["max_difference"] == 0
    assert found["parameters"] == parameters
    assert found["bytes"] == sum(file.stat().st_size for file in files) > 4 * parameters


def test_the_tokenizer_is_exported_too(tmp_path):
    export(tmp_path, stored(tmp_path, "retrieval", tokenizer=pieces()))
    assert read_model(tmp_path / "run" / "export").text_tokenizer().size == pieces().size


@pytest.mark.parametrize(("tolerance", "fails"), [(1e-5, True), (10.0, False)])
def test_outputs_that_differ_after_reloading_end_with_exit_code_7(tmp_path, monkeypatch, tolerance, fails):
    def perturbed(path):
        model = load_model(path)
        if path.name == "export":
            with torch.no_grad():
                model.norm["shared"].bias.add_(1)
        return model

    monkeypatch.setattr(loading, "load_model", perturbed)
    if not fails:
        assert export(tmp_path, stored(tmp_path), tolerance=tolerance)["max_difference"] == pytest.approx(1)
        return
    with pytest.raises(
        CheckFailed, match=r"outputs differ by 1.00e\+00 after reloading \(tolerance 1e-05\)"
    ) as e:
        export(tmp_path, stored(tmp_path), tolerance=tolerance)
    assert e.value.exit_code == 7


def test_a_folder_without_a_model_cannot_be_exported(tmp_path):
    with pytest.raises(DataError, match="no model here"):
        export(tmp_path, tmp_path)


def test_the_plan_of_an_export_names_model_and_format():
    assert Export(model="@pretrain").plan() == {"model": "@pretrain", "format": "beitctl"}


def test_a_head_may_begin_as_one_of_pretraining(tmp_path):
    class Renamed(Classification):
        heads_from: ClassVar = {"classifier": "earlier"}

    folder = stored(tmp_path, "classification", ("blue", "red"))
    found = read_model(folder)
    renamed = {
        name.replace("heads.classifier", "heads.earlier"): value + 1 for name, value in found.tensors.items()
    }
    begun = stage(folder, Renamed())._begun(renamed)
    name = "heads.classifier.linear.weight"
    assert torch.equal(begun[name], found.tensors[name] + 1)
    assert not any(name.startswith("heads.earlier") for name in begun)


def test_heads_are_kept_only_when_asked_for(tmp_path):
    weights = read_model(stored(tmp_path, "classification", ("blue", "red"))).tensors
    kept, dropped = (stage(tmp_path, keep_heads=keep)._begun(weights) for keep in (True, False))
    assert set(kept) - set(dropped) == {name for name in weights if name.startswith("heads.")}


def test_a_required_metric_that_is_missed_ends_with_exit_code_7(tmp_path):
    with pytest.raises(CheckFailed, match=r"required but not so: accuracy>1 \(found"):
        run(tmp_path, stage(stored(tmp_path), require=["accuracy>1"]))


def test_the_metrics_come_with_their_intervals_and_what_was_left_out(tmp_path):
    metrics, _ = run(tmp_path, stage(stored(tmp_path)))
    low, high = metrics["seeds"]["0"]["intervals_95"]["accuracy"]
    assert 0 <= low <= metrics["accuracy"] <= high <= 1
    assert metrics["left_out"] == 0
