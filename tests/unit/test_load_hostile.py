"""What careless and hostile users give to load_model, load_tokenizer and the stages that read files."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretraining import run as pretrained
from pretraining import stage as pretraining
from safetensors.torch import load_file, save_file
from small import MODEL, Record, coloured, stored, training, weights

from beitctl.api import Job
from beitctl.checkpoints.adapt import adapted
from beitctl.checkpoints.loading import changed, load_model, read_model, state_in
from beitctl.checkpoints.native import Stored, fit, load_tokenizer, save_model
from beitctl.errors import CheckFailed, DataError, UserError
from beitctl.model.heads import Aggregation, Classifier
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages import export
from beitctl_plugins.stages.export import Export
from beitctl_plugins.stages.finetune import Finetune
from beitctl_plugins.tasks.classification import Classification

BEIT = replace(
    MODEL, layers=2, vocabulary=0, text_tokens=0, norm="pre", key_bias=False, norm_eps=1e-6, final_norm=False,
    mask_token=False, position="relative-per-block", layer_scale=0.1, init="beit",
)  # fmt: skip
ABSOLUTE = replace(BEIT, position="absolute")
CLASSES = 3
PICTURES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def whole(config=BEIT):
    """A classifier in our names."""
    tensors = weights(Multiway(config), "model.", config)
    return tensors | weights(Classifier(config, CLASSES), "heads.classifier.", config)


def official(config=BEIT, form="unilm BEiT"):
    """The same in the names of another library."""
    return state_in(Stored(Path("made"), config, whole(config)), form)


def file(folder, tree, name="model.pth"):
    path = Path(folder) / name
    torch.save(tree, path)
    return path


def native(folder, config=BEIT, tensors=None):
    save_model(Path(folder), whole(config) if tensors is None else tensors, config)
    return Path(folder)


def noted(folder, change):
    note = json.loads((folder / "config.json").read_text())
    change(note)
    (folder / "config.json").write_text(json.dumps(note))
    return folder


def logits(path, **settings):
    with torch.no_grad():
        return load_model(path, **settings)(PICTURES)


def said(error, path, **settings):
    """What the error says, the path left out."""
    with pytest.raises(error) as caught:
        load_model(path, **settings)
    return str(caught.value).replace(str(path), "PATH")


# --- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"image_px": "384"}, 'image_px must be a whole number or (height, width), found the text "384"'),
        ({"image_px": 16.0}, "image_px must be a whole number or (height, width), found the number 16.0"),
        (
            {"image_px": (16, 16, 16)},
            "image_px must be a whole number or (height, width), found (16, 16, 16)",
        ),
        ({"image_px": (16, "16")}, "image_px must be a whole number or (height, width), found (16, '16')"),
        ({"heads": "2"}, 'heads must be a whole number, found the text "2"'),
        ({"heads": True}, "heads must be a whole number, found true"),
        ({"heads": None}, "heads must be a whole number, found None"),
        ({"drop_path": "0.1"}, 'drop_path must be a number, found the text "0.1"'),
        ({"drop_path": float("nan")}, "drop_path must be a number, found the number nan"),
        ({"final_norm": 0}, "final_norm must be true or false, found the number 0"),
        ({"pixels": "clip2"}, "pixels must be one of 'half', 'imagenet', 'clip', found the text \"clip2\""),
    ],
)
def test_a_setting_of_another_type_is_named_with_what_is_expected(tmp_path, settings, text):
    assert said(UserError, file(tmp_path, official()), **settings) == f"load_model: {text}"


@pytest.mark.parametrize("heads", [0, -2, 5])
def test_heads_that_no_model_can_have_are_the_users_error(tmp_path, heads):
    assert f"heads ({heads})" in said(UserError, file(tmp_path, official(ABSOLUTE)), heads=heads)


def test_a_setting_that_contradicts_the_file_names_the_file(tmp_path):
    message = said(UserError, file(tmp_path, official()), heads=4)
    assert message.startswith("PATH: these settings of the weights cannot be changed (heads: 2 to 4)")


def test_a_configuration_of_another_model_is_suspected_when_settings_contradict_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_args": {"num_heads": 4}}))
    path = file(tmp_path, official(ABSOLUTE, "timm BEiT"))
    message = said(UserError, path, heads=2)
    assert "(heads: 4 to 2)" in message
    assert message.endswith("a config.json is beside it: is that of another model?")


@pytest.mark.parametrize("settings", [{"haeds": 2}, {"heads": "2"}, {"heads": 4}, {"image_px": 32}])
def test_what_a_file_does_not_say_must_not_be_misspelt_or_contradict_it(tmp_path, settings):
    with pytest.raises(UserError) as caught:
        read_model(file(tmp_path, official()), settings)
    told = {
        "haeds": "unknown settings haeds, did you mean 'heads'?",
        "2": 'heads must be a whole number, found the text "2"',
        "4": "says otherwise than the settings given with it (heads is 2, not 4); leave them out",
        "32": "says otherwise than the settings given with it (image_px is (16, 16), not (32, 32)); leave",
    }
    ((name, value),) = settings.items()
    assert told.get(name, told.get(str(value))) in str(caught.value)


def test_settings_that_no_tensor_speaks_of_are_taken_from_the_user(tmp_path):
    found = read_model(file(tmp_path, official()), {"pixels": "imagenet", "drop_path": 0.25, "heads": 2})
    assert (found.model.pixels, found.model.drop_path) == ("imagenet", 0.25)


def test_settings_with_a_file_of_beitctl_are_not_ignored(tmp_path):
    with pytest.raises(UserError, match=r"says otherwise .*\(layers is 2, not 7\)"):
        read_model(native(tmp_path), {"layers": 7})


# --- the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pth", "model.SAFETENSORS", "model"])
def test_safetensors_are_known_by_their_content(tmp_path, name):
    save_file(official(), tmp_path / "plain.safetensors")
    shutil.copy(tmp_path / "plain.safetensors", tmp_path / name)
    assert torch.equal(logits(tmp_path / name), logits(tmp_path / "plain.safetensors"))


def test_a_torch_file_is_known_by_its_content(tmp_path):
    path = file(tmp_path, official())
    assert torch.equal(logits(file(tmp_path, official(), "other.safetensors")), logits(path))


@pytest.mark.parametrize("prefix", ["module.module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_modules_are_taken_off(tmp_path, prefix):
    path = file(tmp_path, {prefix + name: value for name, value in official().items()})
    assert torch.equal(logits(path), logits(file(tmp_path, official(), "plain.pth")))


@pytest.mark.parametrize("kind", [".pth", ".safetensors"])
def test_a_file_name_may_be_no_text(tmp_path, kind):
    save_file(official(), tmp_path / "plain.safetensors")
    source = file(tmp_path, official()) if kind == ".pth" else tmp_path / "plain.safetensors"
    path = os.fsdecode(os.fsencode(tmp_path) + b"/n\xff" + kind.encode())
    shutil.copy(source, path)
    assert torch.equal(logits(path), logits(source))


@pytest.mark.parametrize("name", ["pipe.pth", "pipe.safetensors"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert said(DataError, tmp_path / name) == "PATH: a pipe or a device; name a file"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_path_that_the_system_refuses_is_an_error(load):
    with pytest.raises(DataError, match=r"x{200} \.\.\.: cannot be read \(File name too long\)"):
        load("x" * 5000)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_the_home_of_nobody_is_an_error(load):
    with pytest.raises(DataError, match=r"~nobody-of-that-name/x.pth: there is no such user"):
        load("~nobody-of-that-name/x.pth")


def test_the_home_of_a_tokenizer_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path}/none: no such file or folder"):
        load_tokenizer("~/none")


@pytest.mark.parametrize("tree", [{}, {"model": {}}])
def test_an_empty_state_dict_is_told_in_words(tmp_path, tree):
    keys = " with the keys model" if tree else ""
    assert f"no tensors inside; found dict{keys}. Expected" in said(DataError, file(tmp_path, tree))


def test_names_of_tensors_that_are_no_text_are_told_in_words(tmp_path):
    message = said(DataError, file(tmp_path, {b"weight": torch.ones(2), 3: torch.ones(2)}))
    assert "a name that is no text (tensor), 3 (tensor)" in message


# --- the tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(tmp_path, dtype):
    path = file(tmp_path, official() | {"head.weight": torch.ones(CLASSES, 8, dtype=dtype)})
    text = f"head.weight is {dtype}, expected floating numbers (quantised weights are not read)"
    assert said(DataError, path) == f"PATH: looks like unilm BEiT, but {text}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings", [{}, {"image_px": 32}])
def test_values_that_are_not_finite_are_refused(tmp_path, value, settings):
    state = official()
    state["blocks.1.attn.relative_position_bias_table"][0, 0] = value
    message = said(DataError, file(tmp_path, state), **settings)
    assert "1 tensors hold values that are not finite numbers: model.blocks.1.relative.table." in message


def test_numbers_that_fp32_cannot_hold_are_refused(tmp_path):
    state = official()
    state["head.bias"] = torch.full((CLASSES,), 1e300, dtype=torch.float64)
    assert "not finite numbers: heads.classifier.linear.bias" in said(DataError, file(tmp_path, state))


def test_values_of_a_tokenizer_that_are_not_finite_are_refused(tmp_path):
    module = torch.nn.Linear(2, 2)
    state = {"weight": torch.full((2, 2), float("nan")), "bias": torch.zeros(2)}
    with pytest.raises(DataError, match="1 tensors hold values that are not finite numbers: weight"):
        fit(state, module, "", tmp_path)


def test_heads_of_two_tasks_are_named_with_what_to_do(tmp_path):
    state = official() | {"lm_head.weight": torch.ones(4, 8), "lm_head.bias": torch.ones(4)}
    message = said(DataError, file(tmp_path, state))
    assert "holds heads that no model has: classifier.linear.bias" in message
    assert message.endswith("remove the tensors of all heads but one from the file")


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


# --- tokenizers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["4", 4.0, [4], True])
def test_heads_of_a_tokenizer_must_be_a_whole_number(tmp_path, heads):
    with pytest.raises(UserError, match="load_tokenizer: heads must be a whole number, found"):
        load_tokenizer(file(tmp_path, {"encode_task_layer.0.weight": torch.ones(2)}), heads=heads)


@pytest.mark.parametrize("name", ["beit3.spm", "beit3.model"])
def test_an_empty_text_tokenizer_is_an_error(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="the file is empty"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("text", ['{"kind": 3}', '{"kind": ["vqkd"]}', "[" * 200_000])
def test_a_damaged_note_of_a_tokenizer_is_an_error(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer.json: not the note of a tokenizer \("):
        load_tokenizer(tmp_path)


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
