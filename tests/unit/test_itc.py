"""Contrastive intermediate tuning (BEiT-3's itc files): the task retrieval beside masked modelling.

Source: model-spec.md, section 2.7.
"""

import math

import pytest
from pretraining import run
from small import MODEL, Codes, Given, Record, coloured, pieces, stored, training

from beitctl.api import Example, Job
from beitctl.checkpoints.native import read_model
from beitctl.config import OptimConfig
from beitctl_plugins.stages import shared
from beitctl_plugins.stages.eval import Eval
from beitctl_plugins.stages.finetune import Finetune
from beitctl_plugins.stages.pretrain import ObjectiveTable, Pretrain
from beitctl_plugins.tasks.masked import MaskedImage, MaskedPair, MaskedText
from beitctl_plugins.tasks.retrieval import Retrieval

COLOURS = ("red", "blue", "green", "grey")
PAIRS = coloured(*COLOURS, captions=("a {} square", "{} everywhere"))
PROSE = Given(examples=tuple(Example(f"t{i}", text="a red boat on the calm sea") for i in range(4)))
TERMS = ("contrast", "image", "pair", "pair_image", "text")


def table(task, source):
    return ObjectiveTable(task=task, source=source, samples=4)


def tuning(tmp_path, steps=4, **settings):
    """All four objectives in every step, from a model that was pretrained without contrast."""
    objectives = {
        "contrast": table(Retrieval(), PAIRS),
        "pair": table(MaskedPair(min_block=2), PAIRS),
        "image": table(MaskedImage(min_block=2), PAIRS),
        "text": table(MaskedText(), PROSE),
    }
    tokenizer = tmp_path / "tokenizer"
    pieces().save(tokenizer)
    made = {"model": MODEL, "train": training(steps), "objectives": objectives}
    return Pretrain(**made | {"text_tokenizer": str(tokenizer)} | settings)


@pytest.fixture
def tokens(monkeypatch):
    monkeypatch.setattr(shared, "open_tokens", lambda job, value: Codes())


@pytest.fixture
def tuned(tokens, tmp_path):
    """Result, weights and notes of a run."""
    init = stored(tmp_path / "init", "masked-text")
    return run(tmp_path / "run", tuning(tmp_path, init=str(init)))


def test_contrast_and_masked_modelling_are_learnt_together(tuned):
    result, _, _ = tuned
    assert result.pop("tokens") == "store"
    assert tuple(sorted(result)) == TERMS
    numbers = [
        found[key] for found in result.values() for key in ("loss_first", "loss_last", "held_out_loss")
    ]
    assert all(math.isfinite(number) and number > 0 for number in numbers)


def test_the_weights_hold_the_heads_of_all_objectives(tuned):
    _, weights, _ = tuned
    heads = {name.split(".")[1] for name in weights if name.startswith("heads.")}
    assert heads == {"contrastive", "image_codes", "text_tokens"}
    assert weights["heads.contrastive.vision.weight"].shape == (8, 8)


def test_the_contrastive_head_is_trained_and_starts_at_random(tuned):
    _, weights, notes = tuned
    assert any("begin at random" in note and "heads.contrastive" in note for note in notes)
    assert weights["heads.contrastive.logit_scale"].item() != pytest.approx(math.log(1 / 0.07), abs=1e-6)


def test_contrast_alone_falls(tokens, tmp_path):
    made = tuning(tmp_path, steps=60, objectives={"contrast": table(Retrieval(), PAIRS)})
    (result, _, _) = run(tmp_path / "run", made)
    assert result["contrast"]["loss_last"] < 0.7 * result["contrast"]["loss_first"]


def test_a_tuned_model_is_measured_and_fine_tuned_from_its_contrastive_head(tuned, tmp_path):
    log = Record()
    stage = Eval(model=str(tmp_path / "run"), protocol="task", source=PAIRS, task=Retrieval())
    found = stage.run(Job(tmp_path / "eval", log))
    assert (found["examples"], found["captions"]) == (4, 8)
    still = training(1, optim=OptimConfig(peak_lr=1e-9, warmup_steps=1))
    made = Finetune(
        init=str(tmp_path / "run"), task=Retrieval(), source=PAIRS, held_out=PAIRS, samples=4,
        train=still, keep_heads=True,
    )  # fmt: skip
    again = made.run(Job(tmp_path / "tune", log))
    assert again["recall@1"] == found["recall@1"]
    kept = read_model(tmp_path / "tune").tensors["heads.contrastive.vision.weight"]
    assert (kept - tuned[1]["heads.contrastive.vision.weight"]).abs().max() < 1e-6
