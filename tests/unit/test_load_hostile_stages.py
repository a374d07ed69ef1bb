"""Damaged folders of beitctl, changed settings, and the stages that begin with a file."""

import json
from dataclasses import replace

import pytest
import torch
from model_files import ABSOLUTE, BEIT, CLASSES, file, logits, native, noted, official, said, whole
from pretraining import run as pretrained
from pretraining import stage as pretraining
from safetensors.torch import load_file, save_file
from small import MODEL, Record, coloured, stored, training, weights

from beitctl.api import Job
from beitctl.checkpoints.adapt import adapted
from beitctl.checkpoints.loading import changed, load_model, read_model
from beitctl.errors import CheckFailed, DataError, UserError
from beitctl.model.heads import Aggregation
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages import export
from beitctl_plugins.stages.export import Export
from beitctl_plugins.stages.finetune import Finetune
from beitctl_plugins.tasks.classification import Classification

# --- a folder of beitctl ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("heads", 2.0, "heads must be a whole number, found the number 2.0"),
        ("norm", "foo", "norm must be one of 'pre', 'sub', found the text \"foo\""),
        ("pixels", "foo", "pixels must be one of"),
        ("final_norm", None, "final_norm must be true or false, found None"),
        ("image_px", [16, 16, 16], "image_px must be a whole number or (height, width)"),
        ("norm_eps", "x", 'norm_eps must be a number, found the text "x"'),
    ],
)
def test_a_setting_of_another_type_in_a_configuration_is_damage(tmp_path, name, value, text):
    noted(native(tmp_path), lambda note: note["model"].update({name: value}))
    message = said(DataError, tmp_path)
    assert message.startswith("PATH/config.json: damaged (")
    assert text in message


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"task": [1]}, "task must be a table with kind, or null"),
        ({"task": {"a": 1}}, "task must be a table with kind, or null"),
        ({"labels": "abc"}, "labels must be a list of texts"),
        ({"labels": [1]}, "labels must be a list of texts"),
    ],
)
def test_other_keys_of_another_type_in_a_configuration_are_damage(tmp_path, change, text):
    noted(native(tmp_path), lambda note: note.update(change))
    assert said(DataError, tmp_path) == f"PATH/config.json: damaged ({text}); copy or export it again"


def test_a_configuration_may_be_written_in_another_way(tmp_path):
    native(tmp_path)
    note = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(note, separators=(",", ":")))
    assert logits(tmp_path).shape == (2, CLASSES)


def test_a_configuration_of_endless_brackets_is_an_error(tmp_path):
    (native(tmp_path) / "config.json").write_text('{"library": "beitctl", "x": ' + "[" * 200_000)
    assert "PATH: cannot be read (" in said(DataError, tmp_path)


def test_endless_brackets_beside_a_foreign_file_are_no_obstacle(tmp_path):
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert logits(file(tmp_path, official())).shape == (2, CLASSES)


def test_weights_without_their_configuration_are_told_what_is_missing(tmp_path):
    (native(tmp_path) / "config.json").unlink()
    assert said(DataError, tmp_path).endswith("which needs the config.json beside them")


def test_a_task_with_settings_that_are_not_known_is_an_error(tmp_path):
    stored(tmp_path, "classification", ("blue", "red"))
    noted(tmp_path, lambda note: note["task"].update(novel=1))
    with pytest.raises(DataError, match=r"config.json: not a task that this beitctl knows \(novel: .*update"):
        read_model(tmp_path).open_task()


@pytest.mark.parametrize("lost", ["linear.weight", "linear.bias"])
def test_a_damaged_head_is_an_error(tmp_path, lost):
    tensors = whole()
    tensors[f"heads.classifier.{lost}2"] = tensors.pop(f"heads.classifier.{lost}")
    message = said(DataError, native(tmp_path, BEIT, tensors))
    assert "its heads are damaged: classifier" in message or f"missing heads.classifier.{lost}" in message


def test_the_run_folder_of_an_export_is_a_model(tmp_path):
    Export(model=str(native(tmp_path / "a"))).run(Job(tmp_path / "run", Record()))
    assert torch.equal(logits(tmp_path / "run"), logits(tmp_path / "a"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_fp32(tmp_path, dtype):
    weight = native(tmp_path) / "model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(weight).items()}, weight)
    assert {value.dtype for value in read_model(tmp_path).tensors.values()} == {torch.float32}


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_a_body_that_is_not_whole_is_refused_by_whatever_reads_it(tmp_path, change):
    tensors = whole()
    value = tensors.pop("model.vision_embed.cls_token")
    extra = {"model.more": value, "model.vision_embed.cls_token": value} if change == "left over" else {}
    with pytest.raises(DataError, match=rf"does not fit the model: {change} model\."):
        read_model(native(tmp_path, BEIT, tensors | extra))


def test_tensors_that_a_file_ties_are_written_both(tmp_path):
    table = torch.randn(52, 8, generator=torch.Generator().manual_seed(0))
    tied = {"model.text_embed.token.weight": table, "heads.text_tokens.weight": table}
    tensors = weights(Multiway(MODEL), "model.") | tied | {"heads.text_tokens.bias": torch.zeros(52)}
    found = read_model(native(tmp_path, MODEL, tensors)).tensors
    assert all(torch.equal(found[name], table) for name in tied)


# --- other settings --------------------------------------------------------------------------------------


def bottleneck(config):
    tensors = weights(Multiway(config), "model.", config)
    return tensors | weights(Aggregation(config, 1, 1), "heads.aggregation.", config) | {
        "heads.image_codes.weight": torch.ones(5, 8), "heads.image_codes.bias": torch.ones(5),
    }  # fmt: skip


@pytest.mark.parametrize("settings", [{"position": "relative-per-block"}, {"image_px": 32}])
def test_the_blocks_of_the_bottleneck_have_positions_too(tmp_path, settings):
    config = replace(BEIT, position="relative-shared", final_norm=True)
    tensors, table = bottleneck(config), "model.relative.table"
    tensors[table] = torch.randn(tensors[table].shape, generator=torch.Generator().manual_seed(1))
    path = native(tmp_path, config, tensors)
    side = settings.get("image_px", 16)
    seen = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = load_model(path, image_px=side, position="relative-per-block")(seen)["class"]
        assert torch.allclose(own, load_model(path, image_px=side)(seen)["class"], atol=1e-6)


def test_tables_of_the_bottleneck_are_resampled(tmp_path):
    path = native(tmp_path, replace(BEIT, final_norm=True), bottleneck(replace(BEIT, final_norm=True)))
    assert load_model(path, image_px=32).model.config.image_px == 32


@pytest.mark.parametrize(
    ("source", "change", "listed"),
    [
        (BEIT, {"layer_scale": 0.0}, "layer_scale: 0.1 to 0.0"),
        (replace(MODEL, fusion_layers=1), {"fusion_layers": 0}, "fusion_layers: 1 to 0"),
    ],
)
def test_a_training_does_not_throw_away_parts_of_what_it_begins_with(source, change, listed):
    tensors = weights(Multiway(source), "model.", source)
    with pytest.raises(UserError, match=rf"cannot be changed \({listed}\)"):
        adapted(tensors, source, replace(source, **change), grown=True)


def test_what_cannot_be_changed_names_the_file(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: these settings of the weights cannot be changed"):
        changed(read_model(native(tmp_path)), replace(BEIT, layers=1))


# --- stages ----------------------------------------------------------------------------------------------


def tuned(tmp_path, init, **settings):
    source = coloured("red", "blue", "red", "blue")
    made = Finetune(
        init=str(init), task=Classification(), source=source, held_out=source, samples=4, train=training(1),
        **settings,
    )  # fmt: skip
    return made.run(Job(tmp_path / "run", Record()))


@pytest.mark.parametrize("settings", [{"haeds": 2}, {"heads": 4}, {"image_px": 32}])
def test_finetune_refuses_settings_that_it_would_ignore(tmp_path, settings):
    with pytest.raises(UserError, match=r"unknown settings haeds|says otherwise"):
        tuned(tmp_path, file(tmp_path, official()), init_settings=settings)


def test_pretrain_refuses_settings_that_it_would_ignore(tmp_path):
    with pytest.raises(UserError, match="unknown settings haeds"):
        pretrained(tmp_path / "run", pretraining(native(tmp_path / "a"), init_settings={"haeds": 2}))


def test_finetune_refuses_a_body_that_is_not_whole(tmp_path):
    tensors = {name: value for name, value in whole().items() if name != "model.vision_embed.cls_token"}
    with pytest.raises(DataError, match=r"missing model.vision_embed.cls_token"):
        tuned(tmp_path, native(tmp_path / "a", BEIT, tensors))


def test_finetune_refuses_weights_that_are_not_finite(tmp_path):
    state = official() | {"cls_token": torch.full((1, 1, 8), float("nan"))}
    with pytest.raises(DataError, match=r"not finite numbers: model.vision_embed.cls_token"):
        tuned(tmp_path, file(tmp_path, state))


def test_finetune_of_an_official_file_at_another_size_runs(tmp_path):
    path = file(tmp_path, official(ABSOLUTE))
    assert tuned(tmp_path, path, init_settings={"heads": 2}, image_px=32, drop_path=0.1)
    assert read_model(tmp_path / "run").model.image_px == 32


def test_export_does_not_pass_a_model_whose_outputs_are_no_numbers(tmp_path, monkeypatch):
    nothing = [torch.zeros(2), torch.full((2,), float("nan"))]
    monkeypatch.setattr(export, "_probe", lambda model, config: nothing)
    with pytest.raises(CheckFailed, match="outputs differ by nan after reloading"):
        Export(model=str(native(tmp_path / "a"))).run(Job(tmp_path / "run", Record()))
