"""What careless and hostile users give to load_model and load_tokenizer: settings, files, tensors."""

import json
import os
import shutil

import pytest
import torch
from model_files import ABSOLUTE, CLASSES, file, logits, native, official, said
from safetensors.torch import save_file

from beitctl.checkpoints import files
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.loading import load_model, read_model
from beitctl.checkpoints.native import fit, load_tokenizer
from beitctl.errors import DataError, UserError

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


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(official(), path)
    found = read_tensors(path)
    path.write_bytes(b"")
    assert all(torch.equal(found[name], value) for name, value in official().items())


@pytest.mark.parametrize("read", ["_safetensors", "_pickled"])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, read):
    path = file(tmp_path, official())
    if read == "_safetensors":
        save_file(official(), path)
    whole = getattr(files, read)
    monkeypatch.setattr(files, read, lambda path: (whole(path), path.write_bytes(b"other"))[0])
    assert (
        said(DataError, path) == "PATH: changed while it was read; wait until it is written, then try again"
    )


def test_weights_of_a_run_that_change_while_they_are_read_are_an_error(tmp_path, monkeypatch):
    weights = native(tmp_path) / "model.safetensors"
    whole = files.safetensors_in(weights)
    monkeypatch.setattr(
        "beitctl.checkpoints.native.safetensors_in", lambda path: (path.write_bytes(b"other"), whole)[1]
    )
    assert said(DataError, tmp_path).endswith(
        "changed while it was read; wait until it is written, then try again"
    )


def test_a_kind_of_numbers_that_is_too_new_is_an_error(tmp_path):
    header = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "new.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    assert "PATH: cannot be read as safetensors (" in said(DataError, tmp_path / "new.safetensors")


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
