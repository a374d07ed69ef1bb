"""Codes computed in the training step: of the crop that the model sees, by a tokenizer that is not kept."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from coding import Noise, Quiet, Tiny, stage, tokenize
from pretraining import run
from pydantic import ValidationError
from small import ALONE, COLOURS, MODEL, Given, coloured, rng, tools, training

from beitctl.api import Example, Item, Job, OnlineCodes
from beitctl.checkpoints import native
from beitctl.config import OptimConfig
from beitctl.data.batch import Portion, collate
from beitctl.data.images import Pictures, random_crop
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.errors import DataError, UserError
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages import shared
from beitctl_plugins.stages.image_codes import Online
from beitctl_plugins.stages.pretrain import ObjectiveTable, Pretrain
from beitctl_plugins.tasks.classification import Classification
from beitctl_plugins.tasks.masked import MaskedImage, MaskedPair

GRID = replace(MODEL, image_px=16, patch_px=8)
"""A model with the 2 x 2 patches of the tokenizer."""
TASK = MaskedImage(mask_ratio=0.5, min_block=1)
SIZES = OnlineCodes(codes=64, grid=2, image_px=16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    made = Tiny()
    monkeypatch.setattr(native, "load_tokenizer", lambda path: made)
    return made


def online(**changes):
    return tools(model=GRID, tokens=None, online=SIZES, **changes)


def coder(tokenizer=None):
    return Online(tokenizer or Tiny(), torch.device("cpu"), torch.float32)


def noise(number=3):
    return Noise(count=9).open()[number]


def learner(task=TASK):
    found = MultiwayLearner(Multiway(GRID), [Objective("image", task)], {"image": online()})
    found.code_with(coder())
    return found


# --- what a task prepares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [TASK, MaskedPair(image_mask_ratio=0.5, min_block=1)])
def test_model_and_tokenizer_see_one_crop_each_at_its_own_size(task):
    example = replace(noise(), captions=("a picture",))
    sizes = replace(SIZES, image_px=8)
    small = task.prepare(example, rng(5), tools(model=GRID, tokens=None, online=sizes))
    same = task.prepare(example, rng(5), online())
    assert (same.image.shape, small.code_view.shape) == ((3, 16, 16), (3, 8, 8))
    assert (small.image == same.image).all()
    assert same.code_view is same.image
    shrunk = same.image.reshape(3, 8, 2, 8, 2).mean((2, 4))
    assert np.corrcoef(shrunk.ravel(), small.code_view.ravel())[0, 1] > 0.8


def test_the_crop_is_drawn_anew_by_the_tasks_settings():
    item = MaskedImage(mask_ratio=0.5, min_block=1, crop_scale=(0.1, 0.2), jitter=0.4).prepare(
        noise(), rng(5), online()
    )
    pictures = Pictures()
    picture = pictures.open(noise().image)
    crop = random_crop(*picture.size, rng(5), scale=(0.1, 0.2), jitter=0.4)
    assert (item.image == pictures.crop(picture, crop, 16)).all()


def test_by_default_the_crop_is_that_of_beit_v2_without_jitter():
    pictures = Pictures()
    picture = pictures.open(noise().image)
    crop = random_crop(*picture.size, rng(5), scale=(0.2, 1.0))
    assert (TASK.prepare(noise(), rng(5), online()).image == pictures.crop(picture, crop, 16)).all()


def test_hidden_patches_ask_for_codes_that_are_not_known_yet():
    item = TASK.prepare(noise(), rng(), online())
    assert item.patch_targets.tolist() == np.where(item.image_mask, 0, -1).tolist()


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.2, 1.5), (-1.0, 1.0)])
def test_shares_of_a_crop_that_mean_nothing_are_refused(scale):
    for made in (MaskedImage, MaskedPair, lambda **settings: stage(**settings)):
        with pytest.raises(ValidationError, match="0 < smallest <= largest <= 1, not"):
            made(crop_scale=scale)


def test_a_tokenizer_of_another_grid_is_refused():
    with pytest.raises(
        UserError, match="the image tokenizer has 3 x 3 codes a picture, the model 2 x 2 patches"
    ):
        TASK.heads(tools(model=GRID, tokens=None, online=replace(SIZES, grid=3)))


def test_without_store_and_tokenizer_both_settings_are_named():
    with pytest.raises(
        UserError, match=r'set tokens, .* or image_tokenizer, for example to "@train-tokenizer'
    ):
        TASK.heads(tools(model=GRID, tokens=None))


# --- what the learner makes of it ---------------------------------------------------------------------------


def test_targets_are_the_tokenizers_codes_of_the_crop():
    items = [TASK.prepare(noise(number), rng(number), online()) for number in range(4)]
    pairs = [
        MaskedPair(image_mask_ratio=0.5, min_block=1).prepare(
            replace(noise(number), captions=("words",)), rng(number), online()
        )
        for number in (4, 5)
    ]
    portions = [Portion("pair", "pair", pairs), Portion("image", "image", items)]
    found = learner().coded(collate(portions, GRID))
    for name, mine in (("image", items), ("pair", pairs)):
        codes = Tiny().encode(torch.from_numpy(np.stack([item.code_view for item in mine])))
        hidden = torch.from_numpy(np.stack([item.image_mask for item in mine]))
        assert found.groups[name].patch_targets.tolist() == codes[hidden].tolist()
        assert len(codes[hidden]) == 2 * len(mine)


def test_a_batch_with_known_codes_stays_as_it_is():
    batch = collate([Portion("image", "image", [TASK.prepare(noise(), rng(), online())])], GRID)
    coded = learner().coded(batch)
    assert coded.code_views is None
    assert learner().coded(coded) is coded


def test_no_gradient_reaches_the_tokenizer_and_none_of_it_is_kept(tiny):
    made = learner()
    made.code_with(Online(tiny, torch.device("cpu"), torch.float32))
    batch = collate([Portion("image", "image", [TASK.prepare(noise(), rng(), online())])], GRID)
    made.train()
    made(batch)["image"][0].backward()
    assert [p.grad for p in tiny.model.parameters()] == [None] * 4
    assert not tiny.model.training
    names = [*dict(made.named_parameters()), *made.state_dict(), *(name for name, _ in made.named_modules())]
    assert [name for name in names if "coder" in name or "tokenizer" in name] == []


def test_codes_for_a_learner_without_a_tokenizer_are_our_fault():
    made = MultiwayLearner(Multiway(GRID), [Objective("image", TASK)], {"image": online()})
    batch = collate([Portion("image", "image", [TASK.prepare(noise(), rng(), online())])], GRID)
    with pytest.raises(ValueError, match="needs codes, but the learner has no image tokenizer"):
        made(batch)


def test_either_all_items_of_an_objective_have_a_view_or_none():
    item = TASK.prepare(noise(), rng(), online())
    with pytest.raises(ValueError, match="image: 1 of 2 items have a code_view"):
        collate([Portion("image", "image", [item, replace(item, code_view=None)])], GRID)


def test_items_are_filled_with_codes_and_others_left_alone():
    items = [TASK.prepare(noise(number), rng(number), online()) for number in range(3)]
    plain = Item(text=np.arange(3))
    first, untouched, *_ = coder().filled([items[0], plain, *items[1:]])
    codes = Tiny().encode(torch.from_numpy(items[0].code_view[None]))[0].numpy()
    assert first.patch_targets.tolist() == np.where(items[0].image_mask, codes, -1).tolist()
    assert first.code_view is None
    assert untouched is plain


# --- the stage ----------------------------------------------------------------------------------------------


def objective(task=TASK, source=None, **settings):
    return ObjectiveTable(task=task, source=source or Noise(count=9), samples=4, **settings)


def pretrain(steps=3, **settings):
    train = training(steps, precision="fp32", optim=OptimConfig(peak_lr=0.01))
    made = {"model": GRID, "train": train, "objectives": {"image": objective()}, "image_tokenizer": "."}
    return Pretrain(**made | settings)


def test_a_run_says_that_its_codes_were_computed_online(tmp_path):
    result, tensors, _ = run(tmp_path, pretrain())
    assert result["tokens"] == "online"
    assert tensors["heads.image_codes.weight"].shape == (64, 8)
    assert {"accuracy", "baseline_accuracy", "held_out_loss"} < result["image"].keys()
    assert 0 < result["image"]["baseline_accuracy"] < 1


def test_the_weights_and_the_checkpoints_hold_nothing_of_the_tokenizer(tmp_path, tiny):
    _, tensors, _ = run(tmp_path, pretrain())
    assert {name.partition(".")[0] for name in tensors} == {"model", "heads"}
    biggest = max(p.numel() * 4 for p in tiny.model.parameters())
    stored = b"".join(path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    weight = max(tiny.model.parameters(), key=torch.numel).numpy().tobytes()
    assert len(weight) == biggest
    assert weight[:256] not in stored


def losses(folder):
    records = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {r["step"]: r["metrics"]["image/loss"] for r in records if r["event"] == "step"}


def test_passes_of_a_few_samples_learn_what_one_pass_does(tmp_path):
    whole, parts = pretrain(), pretrain()
    run(tmp_path / "whole", whole)
    run(tmp_path / "parts", parts.model_copy(update={"train": replace(parts.train, micro_samples=1)}))
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_a_run_that_is_continued_equals_one_that_was_not(tmp_path):
    made = pretrain(4)
    made = made.model_copy(update={"train": replace(made.train, save_every_steps=2)})
    _, straight, _ = run(tmp_path, made)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    _, continued, notes = run(tmp_path, made)
    assert notes == ["resuming from step 2"]
    assert [name for name in straight if not torch.equal(straight[name], continued[name])] == []


def test_the_patches_of_pairs_may_be_coded_online_too(tmp_path):
    pairs = coloured(*COLOURS)
    table = {"pair": objective(MaskedPair(image_mask_ratio=0.5, min_block=1), pairs)}
    with pytest.raises(UserError, match="set text_tokenizer"):
        run(tmp_path, pretrain(objectives=table))


def test_codes_come_from_one_place():
    with pytest.raises(ValidationError, match="codes come from one of them, remove the other"):
        pretrain(tokens="store")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tokens_from": "x"}, "tokens_from says which tokenizer made tokens, which is not set"),
        ({"image_tokenizer_settings": {"heads": 2}}, "belong to image_tokenizer, which is not set"),
    ],
)
def test_a_setting_without_what_it_belongs_to_is_refused(settings, told):
    with pytest.raises(ValidationError, match=told):
        pretrain(image_tokenizer="", **settings)


def test_the_plan_says_where_codes_come_from():
    assert pretrain(expect_codes=64).plan()["image codes"] == "online, ."


def test_a_tokenizer_that_is_named_but_not_needed_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "load_tokenizer", lambda path: 1 / 0)
    table = {"image": objective(Classification(pool="cls"), coloured("red", "blue"))}
    assert "tokens" not in run(tmp_path, pretrain(objectives=table))[0]


# --- the store ----------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    tokenize(tmp_path / "store", stage(Noise(count=9), jitter=0.0))
    return tmp_path / "store"


def from_store(store, **settings):
    return pretrain(image_tokenizer="", tokens=str(store), **settings)


def test_a_run_says_that_its_codes_came_from_a_store(store, tmp_path):
    assert run(tmp_path / "run", from_store(store, tokens_from="."))[0]["tokens"] == "store"


def test_the_store_of_another_tokenizer_is_refused_by_name(store, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "load_tokenizer", lambda path: Tiny(1))
    expected = r"made with tokenizer = 'tiny-0', but tokens_from \(\.\) is 'tiny-1'"
    with pytest.raises(DataError, match=expected):
        run(tmp_path / "run", from_store(store, tokens_from="."))


def test_the_store_of_another_grid_is_refused_by_name(store, tmp_path):
    with pytest.raises(UserError, match="the token store has 2 x 2 codes a picture, the model 4 x 4 patches"):
        run(tmp_path / "run", from_store(store, model=MODEL))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"jitter": 0.4}, "jitter = 0.4, the token store was made with jitter = 0.0"),
        (
            {"crop_scale": (0.08, 1.0)},
            r"crop_scale = \(0.08, 1.0\), the token store .* crop_scale = \(0.2, 1.0\)",
        ),
    ],
)
def test_a_store_with_other_preprocessing_than_the_task_says_is_refused_by_name(
    store, tmp_path, settings, told
):
    task = MaskedImage(mask_ratio=0.5, min_block=1, **settings)
    with pytest.raises(UserError, match=told):
        run(tmp_path / "run", from_store(store, objectives={"image": objective(task)}))


def test_a_task_may_say_the_preprocessing_of_its_store(store, tmp_path):
    task = MaskedImage(mask_ratio=0.5, min_block=1, jitter=0.0, crop_scale=(0.2, 1.0))
    run(tmp_path / "run", from_store(store, objectives={"image": objective(task)}))


def test_a_picture_that_has_changed_since_is_refused_before_training(store, tmp_path):
    examples = [noise(number) for number in range(9)]
    source = Given(examples=(*examples[:4], Example("n4", examples[5].image), *examples[5:]))
    with pytest.raises(DataError, match=r"n4: not the picture that its codes in .* were made of"):
        run(tmp_path / "run", from_store(store, objectives={"image": objective(source=source)}))


def test_pictures_that_no_store_knows_are_left_to_the_loader(store, tmp_path):
    job, source = Job(tmp_path, Quiet()), Noise(count=3, start=20)
    found = shared.open_tokens(job, str(store))
    stream = pretrain()._stream("image", objective(source=source), source, tools(), ALONE, job)
    from_store(store)._check_tokens(found, [stream], job)
    assert not any(example.id in found for example in map(noise_at, (20, 21, 22)))


def noise_at(number):
    return Noise(count=1, start=number).open()[0]
