"""Pretraining tables at toy size."""

import copy

import pytest

from beitctl_plugins.stages import toy
from beitctl_plugins.stages.pretrain import Pretrain
from beitctl_plugins.tasks.masked import MaskedImage

MODEL = {
    "layers": 12, "width": 768, "heads": 12, "ffn": 3072, "image_px": 224, "patch_px": 16,
    "vocabulary": 64010, "text_tokens": 128, "attention": "decoupled", "norm": "pre", "key_bias": False,
    "fusion_layers": 3, "drop_path": 0.1, "init": "beit",
}  # fmt: skip
OPTIM = {"peak_lr": 2e-3, "min_lr": 1e-5, "warmup_steps": 10_000, "betas": [0.9, 0.98], "layer_decay": 0.9}
TRAIN = {
    "steps": 1_000_000, "precision": "bf16", "micro_samples": 768, "save_every_steps": 5000,
    "log_every_steps": 50, "workers": 8, "seed": 3, "optim": OPTIM,
}  # fmt: skip
OBJECTIVE = {
    "task": {"kind": "masked-image", "mask_ratio": 0.4},
    "source": {"kind": "image-folder", "path": "data"},
    "samples": 2048,
    "weight": 0.5,
}
TABLE = {
    "text_tokenizer": "beit3.spm",
    "tokens": "store",
    "expect_codes": 100,
    "model": MODEL,
    "train": TRAIN,
    "objectives": {"image": OBJECTIVE},
}


def test_the_model_has_toy_sizes_and_keeps_its_structure():
    assert toy.model(MODEL) == {
        "layers": 4, "width": 64, "heads": 4, "ffn": 128, "image_px": 32, "patch_px": 8,
        "vocabulary": 402, "text_tokens": 24, "attention": "decoupled", "norm": "pre", "key_bias": False,
        "fusion_layers": 2, "drop_path": 0.1, "init": "beit",
    }  # fmt: skip


def test_what_is_small_already_does_not_grow():
    found = toy.model({**MODEL, "layers": 1, "fusion_layers": 1, "text_tokens": 5})
    assert [found[key] for key in ("layers", "fusion_layers", "text_tokens")] == [1, 1, 5]


@pytest.mark.parametrize("absent", [{}, {"vocabulary": 0}])
def test_a_model_without_language_gets_none(absent):
    given = {key: MODEL[key] for key in ("layers", "width", "heads", "ffn")} | absent
    assert toy.model(given).get("vocabulary", 0) == 0
    assert "text_tokens" not in toy.model(given)


def test_a_model_setting_that_toy_does_not_know_is_kept():
    assert toy.model({**MODEL, "newest": [1, 2]})["newest"] == [1, 2]


def test_training_takes_a_few_steps_and_keeps_the_other_settings():
    assert toy.train(TRAIN) == {
        "steps": 6, "precision": "auto", "micro_samples": 0, "save_every_steps": 3, "log_every_steps": 1,
        "workers": 0, "seed": 3,
        "optim": {
            "peak_lr": 1e-3, "min_lr": 0.0, "warmup_steps": 2, "betas": [0.9, 0.98], "layer_decay": 0.9,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("masked-image", "pictures"),
        ("classification", "pictures"),
        ("masked-text", "text"),
        ("masked-pair", "pairs"),
        ("retrieval", "pairs"),
    ],
)
def test_an_objective_reads_the_embedded_examples_that_its_task_can_use(kind, content):
    found = toy.objective({**OBJECTIVE, "task": {"kind": kind}})
    assert found["source"] == {"kind": "embedded", "content": content, "limit": 96}
    assert found["held_out"] == {"kind": "embedded", "content": content, "split": "test", "limit": 32}


def test_an_objective_draws_few_samples_and_keeps_task_weight_and_what_else_it_has():
    found = toy.objective({**OBJECTIVE, "newest": 1})
    assert {key: found[key] for key in ("task", "samples", "weight", "newest")} == {
        "task": {**OBJECTIVE["task"], "min_block": 4},
        "samples": 8,
        "weight": 0.5,
        "newest": 1,
    }


def test_a_task_may_make_its_table_small_itself(monkeypatch):
    smoke = classmethod(lambda cls, table: {**table, "min_block": 2, "seen": "kind" in table})
    monkeypatch.setattr(MaskedImage, "smoke", smoke, raising=False)
    task = {"kind": "masked-image", "mask_ratio": 0.4, "min_block": 2, "seen": False}
    assert toy.objective(OBJECTIVE)["task"] == task


def test_tokenizer_and_codes_come_from_tiny():
    found = Pretrain.smoke(TABLE)
    assert (found["text_tokenizer"], found["tokens"]) == ("@train-tokenizer.text", "@tokenize-images")


@pytest.mark.parametrize("absent", [{}, {"text_tokenizer": "", "tokens": ""}])
def test_a_recipe_without_tokenizer_and_codes_gets_none(absent):
    given = {key: TABLE[key] for key in ("model", "train", "objectives")} | absent
    assert not {"@train-tokenizer.text", "@tokenize-images"} & set(map(str, Pretrain.smoke(given).values()))


@pytest.mark.parametrize(
    ("init", "kept"), [("@pretrain.vision", True), ("beit_base.pth", False), ("", False)]
)
def test_only_a_stage_of_the_recipe_is_started_from(init, kept):
    assert ("init" in Pretrain.smoke({**TABLE, "init": init})) is kept


def test_a_setting_of_the_stage_that_toy_does_not_know_is_kept():
    assert Pretrain.smoke({**TABLE, "newest": {"a": 1}})["newest"] == {"a": 1}


def test_the_given_table_is_left_as_it_is():
    given = copy.deepcopy(TABLE)
    Pretrain.smoke(given)
    assert given == TABLE


def test_the_small_table_is_one_that_the_stage_accepts():
    made = Pretrain.model_validate(Pretrain.smoke(TABLE))
    assert (made.model.layers, made.expect_codes, made.objectives["image"].samples) == (4, 100, 8)


def test_a_tokenizer_inside_the_step_becomes_that_of_the_recipe_tiny():
    given = {**TABLE, "image_tokenizer": "vqkd.pth", "image_tokenizer_settings": {"heads": 12}}
    given = {key: value for key, value in given.items() if key != "tokens"}
    found = Pretrain.smoke(given)
    assert found["image_tokenizer"] == "@train-tokenizer.image"
    assert "image_tokenizer_settings" not in found
