"""beitctl's own model files: what is accepted, what is refused and why."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import MODEL, coloured, pieces, rng, stored, tools, weights
from torch import nn

from beitctl.checkpoints.loading import TaskModel, load_model
from beitctl.checkpoints.native import fit, load_tokenizer, read_model
from beitctl.config import ModelConfig
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import HALF, MultiwayLearner, Objective, normalise
from beitctl.errors import DataError, PluginError, UserError
from beitctl.model.multiway import Multiway
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.tasks.retrieval import Retrieval


def note_of(folder, **changes):
    file = folder / "config.json"
    note = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(note))
    return folder


def test_what_was_saved_is_read_back(tmp_path):
    found = read_model(stored(tmp_path, "classification", ("blue", "red")))
    expected = weights(Multiway(MODEL), "model.")
    assert found.model == MODEL
    assert found.labels == ("blue", "red")
    assert found.task == {"kind": "classification"}
    assert {name for name in found.tensors if name.startswith("model.")} == set(expected)
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.items())


def test_no_draft_is_left_behind(tmp_path):
    assert sorted(p.name for p in stored(tmp_path).iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("place", ["", "weights", "weights/model.safetensors"])
def test_a_run_folder_its_weights_and_the_file_are_accepted(tmp_path, place):
    stored(tmp_path / "weights")
    assert read_model(tmp_path / place).folder == tmp_path / "weights"


def test_another_file_beside_the_model_is_not_taken_for_it(tmp_path):
    other = stored(tmp_path) / "other.safetensors"
    other.write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"other.safetensors: no model here"):
        read_model(other)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_the_two_files_is_refused(tmp_path, missing):
    (stored(tmp_path) / missing).unlink()
    with pytest.raises(
        DataError, match=r"no model here; expected model.safetensors and config.json in it or in its folder"
    ):
        read_model(tmp_path)


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(DataError, match="none: no such file"):
        load_model(tmp_path / "none")


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    file = stored(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"cannot be read \(.*\); copy or export it again"):
        read_model(tmp_path)


class Harm:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("save", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_the_name_of_a_safetensors_file_is_refused_and_not_executed(tmp_path, save):
    save(Harm(), stored(tmp_path) / "model.safetensors")
    with pytest.raises(DataError, match="cannot be read"):
        read_model(tmp_path)


def test_a_later_format_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"config.json: format 2, this beitctl reads 1"):
        read_model(note_of(stored(tmp_path), format=2))


def test_the_configuration_of_another_library_is_refused(tmp_path):
    (stored(tmp_path) / "config.json").write_text('{"architectures": ["BeitModel"]}')
    with pytest.raises(DataError, match="format None, this beitctl reads 1"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 1, "model": {"layers": 1}, "task": null, "labels": []}',
        '{"format": 1, "model": {"layers": 1, "width": 7, "heads": 2, "ffn": 4}, "task": null, "labels": []}',
    ],
)
def test_a_damaged_configuration_is_refused(tmp_path, text):
    (stored(tmp_path) / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"config.json|cannot be read"):
        read_model(tmp_path)


def test_model_settings_of_a_later_version_are_named(tmp_path):
    note_of(stored(tmp_path), model={**vars(MODEL), "rotary": True, "experts": 3})
    with pytest.raises(DataError, match="unknown model settings experts, rotary; update beitctl"):
        read_model(tmp_path)


def test_settings_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(UserError, match="load_model: unknown settings dropout, rotary"):
        load_model(stored(tmp_path), rotary=1, dropout=0.1)


def test_a_setting_changes_the_model(tmp_path):
    assert load_model(stored(tmp_path), drop_path=0.5).config.drop_path == 0.5


def test_a_setting_that_does_not_fit_the_tensors_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot be changed \(text_tokens: 10 to 12\); what can: image_px"):
        load_model(stored(tmp_path), text_tokens=12)


def test_missing_and_left_over_tensors_are_listed(tmp_path):
    own = nn.Linear(2, 3).state_dict()
    with pytest.raises(DataError) as caught:
        fit({"x.weight": own["weight"], "x.scale": own["bias"]}, nn.Linear(2, 3), "x.", tmp_path)
    assert str(caught.value) == f"{tmp_path}: does not fit the model: missing bias; left over scale"


def test_fit_takes_the_tensors_below_its_prefix_only(tmp_path):
    module, weight = nn.Linear(2, 3, bias=False), torch.ones(3, 2)
    fit({"x.weight": weight, "y.weight": torch.zeros(9)}, module, "x.", tmp_path)
    assert torch.equal(module.weight, weight)


def test_a_model_without_a_task_is_loaded_as_it_is_in_eval_mode(tmp_path):
    model = load_model(stored(tmp_path))
    assert isinstance(model, Multiway)
    assert not model.training


def with_strange_head(folder):
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"heads.strange.weight": torch.ones(2)}, file)
    return folder


def test_heads_that_no_model_has_are_named(tmp_path):
    with pytest.raises(DataError, match=r"holds heads that no model has: strange\.weight"):
        load_model(with_strange_head(stored(tmp_path)))


def test_a_task_that_is_not_installed_is_named(tmp_path):
    note_of(with_strange_head(stored(tmp_path)), task={"kind": "clasification"})
    with pytest.raises(PluginError, match="did you mean 'classification'"):
        load_model(tmp_path)


def loaded(tmp_path, kind, task, labels=()):
    """A model with its task's head, and the task's own output for a batch of two, with their items."""
    model = load_model(stored(tmp_path, kind, labels))
    fixed = tools(train=False, labels=labels)
    examples = coloured("blue", "red", captions=("{}",)).open()
    items = [task.prepare(examples[i], rng(), fixed) for i in range(2)]
    learner = MultiwayLearner(Multiway(MODEL), [Objective("task", task)], {"task": fixed}).eval()
    fit(read_model(tmp_path).tensors, learner.model, "model.", tmp_path)
    fit(read_model(tmp_path).tensors, learner.heads, "heads.", tmp_path)
    batch = collate([Portion("task", task.layout, items)], MODEL)
    with torch.no_grad():
        return model, learner.outputs(batch)["task"], items


def pixels(items):
    return normalise(torch.stack([torch.from_numpy(item.image) for item in items]), HALF)


def test_a_classifier_gives_the_logits_of_its_task(tmp_path):
    model, expected, items = loaded(tmp_path, "classification", Classification(), ("blue", "red"))
    with torch.no_grad():
        assert torch.allclose(model(pixels(items)), expected, atol=1e-6)


def test_a_retriever_gives_the_vectors_of_its_task_whatever_the_padding(tmp_path):
    model, expected, items = loaded(tmp_path, "retrieval", Retrieval())
    texts = [torch.from_numpy(item.text) for item in items]
    assert [len(text) for text in texts] == [6, 5]
    text = nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=1)
    with torch.no_grad():
        found = model(pixels(items), text, text_pad=text == 1)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_a_text_of_padding_only_is_refused_by_a_retriever(tmp_path):
    model = load_model(stored(tmp_path, "retrieval"))
    text = torch.full((2, 3), 5)
    with pytest.raises(ValueError, match="text 1 of the batch has no token that is not padding"):
        model(torch.zeros(2, 3, 16, 16), text, text_pad=torch.tensor([[False] * 3, [True] * 3]))


@pytest.mark.parametrize(("task", "wanted"), [(Classification(), "image"), (Retrieval(), "image and text")])
def test_a_missing_input_of_a_plugin_task_is_named(task, wanted):
    model = TaskModel(Multiway(MODEL), nn.ModuleDict(), task)
    with pytest.raises(ValueError, match=f"this task needs {wanted}$"):
        model(None if wanted == "image" else torch.zeros(1, 3, 16, 16))


def test_a_plugin_task_gives_its_own_output(tmp_path):
    task = Classification()
    heads = nn.ModuleDict(task.heads(tools(labels=("blue", "red"))))
    found = TaskModel(Multiway(MODEL), heads, task)(torch.zeros(3, 3, 16, 16))
    assert found.shape == (3, 2)


def test_the_tokenizer_beside_the_weights_is_found_from_the_run_folder(tmp_path):
    stored(tmp_path / "weights", tokenizer=pieces())
    assert load_tokenizer(tmp_path).encode("a red boat") == pieces().encode("a red boat")


def test_a_model_without_a_tokenizer_has_none(tmp_path):
    assert read_model(stored(tmp_path)).text_tokenizer() is None


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_note_of_a_tokenizer_is_refused(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer.json: not the note of a tokenizer"):
        load_tokenizer(tmp_path)


def test_the_kind_of_a_tokenizer_must_be_installed(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"kind": "letters"}')
    with pytest.raises(PluginError, match=r"no 'letters' in beitctl.tokenizers"):
        load_tokenizer(tmp_path)


def test_a_model_without_language_is_saved_and_loaded(tmp_path):
    from beitctl.checkpoints.native import save_model

    config = ModelConfig(layers=1, width=8, heads=2, ffn=8, image_px=8, patch_px=4)
    save_model(tmp_path, weights(Multiway(config), "model.", config), config)
    assert load_model(tmp_path)(torch.zeros(1, 3, 8, 8)).shape == (1, 5, 8)
