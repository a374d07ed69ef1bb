"""The recipes that ship with beitctl: they validate, and the giant's plan is the paper's."""

import json
import re
from pathlib import Path

import pytest

from beitctl import cli, recipe

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
NAMES = sorted(file.stem for file in FILES)
OURS = ("cifar10", "codebook-embedded", "codebook-emoji", "demo", "dvae", "easyvqa", "tasks", "tiny")
"""Recipes of no paper."""
TUNED = [
    *(f"beit-{size}-{task}" for size in ("base", "large") for task in ("ade20k", "imagenet", "linear")),
    *(f"beitv2-{size}-{task}" for size in ("base", "large") for task in ("ade20k", "imagenet")),
    *(f"beit3-{size}-{task}" for size in ("base", "large") for task in ("imagenet", "captioning", "nocaps")),
    *(
        f"{family}-{size}-{task}"
        for family in ("beit3", "vlmo")
        for size in ("base", "large")
        for task in ("vqav2", "nlvr2", "coco-retrieval", "flickr30k-retrieval")
    ),
]
"""Recipes of published rows that begin with a released file."""
UNPUBLISHED = ["beit3-base-ade20k", "beit3-base-coco-detection"]
"""Those that users asked for and no paper has."""


@pytest.fixture(autouse=True)
def anywhere(monkeypatch, tmp_path):
    """Bundled recipes only, and no data in the working folder."""
    monkeypatch.delenv("BEITCTL_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_recipes_of_the_checkout_are_those_that_are_found():
    beit = [f"beit-{size}-{data}" for size in ("base", "large") for data in ("in1k", "in22k")]
    beit3 = ["beit3-base", "beit3-base-itc", "beit3-giant", "beit3-large"]
    rest = ["beitv2-base", "beitv2-large", "deit-base", "vit-base", "vlmo-base"]
    assert recipe.names() == NAMES == sorted([*beit, *beit3, *rest, *OURS, *TUNED, *UNPUBLISHED])


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_validates(name):
    found = recipe.load(name)
    assert found.meta["summary"]
    without = name.startswith("codebook-") or name in (*TUNED, *UNPUBLISHED)
    assert any(table.stage == "pretrain" for table in found.tables.values()) != without


@pytest.mark.parametrize("name", NAMES)
def test_recipes_check_says_ok(name, capsys):
    assert cli.execute(["recipes", "check", name]) == 0
    assert capsys.readouterr().out == f"{name}: ok\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_reference_leads_to_an_earlier_table(name):
    seen = []
    for key, table in recipe.load(name).tables.items():
        assert set(table.references) <= set(seen)
        seen.append(key)


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_recipes_that_run_anywhere_have_all_six_stages(name):
    stages = {table.stage for table in recipe.load(name).tables.values()}
    assert stages == {"train-tokenizer", "tokenize-images", "pretrain", "finetune", "eval", "export"}


def pretraining(name):
    found = recipe.load(name).tables
    return found, [table.plugin for table in found.values() if table.stage == "pretrain"]


@pytest.mark.parametrize("name", [n for n in NAMES if "train-tokenizer.text" in recipe.load(n).tables])
def test_the_vocabulary_fits_the_text_tokenizer(name):
    tables, stages = pretraining(name)
    pieces = tables["train-tokenizer.text"].plugin.tokenizer.pieces
    assert all(stage.model.vocabulary >= pieces + 2 for stage in stages if stage.text_tokenizer)


@pytest.mark.parametrize("name", [n for n in NAMES if "train-tokenizer.image" in recipe.load(n).tables])
def test_the_grid_is_that_of_the_image_tokenizer(name):
    tables, stages = pretraining(name)
    shape = tables["train-tokenizer.image"].plugin.tokenizer.shape
    assert {stage.model.grid for stage in stages} == {(shape.image_px // shape.patch_px,) * 2}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OURS])
def test_a_recipe_of_a_paper_says_what_to_expect_and_what_it_needs(name):
    meta = recipe.load(name).meta
    assert meta["needs"]
    assert all(isinstance(value, int | float) and value > 0 for value in meta["published"].values())
    assert bool(meta["published"]) != (name in UNPUBLISHED)
    text = recipe.find(name).read_text()
    if name in (*TUNED, *UNPUBLISHED):
        settings = text.split("[finetune", 1)[1]
    else:
        settings = text.split("[pretrain", 1)[1].split("[finetune", 1)[0]
    numbers = [
        line
        for line in settings.splitlines()
        if re.match(r"(peak_lr|betas|weight_decay|samples|steps) =", line)
    ]
    assert [line for line in numbers if not re.search(r"# .*\[[A-Z]\d?\]", line)] == []


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("beit-base-in22k", 91_965_776),  # model-spec 1.1: pretraining models with their heads
        ("beit-large-in22k", 311_534_016),
        ("beitv2-base", 106_143_056),  # model-spec 1.2
        ("beitv2-large", 336_728_512),
        ("vit-base", 86_567_656),  # timm vit_base_patch16_224 with 1000 classes
    ],
)
def test_the_model_of_a_recipe_is_as_large_as_published(name, published, capsys):
    assert cli.execute(["pretrain", "--recipe", name, "--dry-run", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)["pretrain"]["parameters"]
    heads = (
        2 * (768 + 1) if name == "vit-base" else 0
    )  # two classes stand for those of data that are not here
    whole = 1000 * (768 + 1) if name == "vit-base" else 0
    assert parts["total"] - heads + whole == published


@pytest.fixture
def plan(capsys):
    """What the dry run of the giant prints."""
    assert cli.execute(["pretrain", "--recipe", "beit3-giant", "--dry-run"]) == 0
    return capsys.readouterr().out


def number(plan, section, key):
    found = re.search(rf"^  {section}:\n(?:    .*\n)*?    {key}: ([\d ]+)$", plan, re.MULTILINE)
    assert found, plan
    return int(found[1].replace(" ", ""))


PARTS = ("vision experts", "language experts", "fusion experts", "attention", "embeddings", "norms", "heads")


def test_the_giant_has_nearly_two_billion_parameters_in_parts_that_add_up(plan):
    total = number(plan, "parameters", "total")
    assert total == pytest.approx(1.95e9, rel=0.01)
    assert sum(number(plan, "parameters", part) for part in PARTS) == total


def test_the_giants_batch_is_6144(plan):
    assert [number(plan, "batch", key) for key in ("image", "text", "pair", "total")] == [2048] * 3 + [6144]


def test_the_giants_plan_says_what_data_it_needs(plan):
    assert re.search(r"^    pair:\n      samples seen: 2 048 000 000$", plan, re.MULTILINE)
    assert "not there: data/pairs.parquet: no such file or folder" in plan


def test_a_dry_run_writes_nothing(plan, tmp_path):
    assert list(tmp_path.iterdir()) == []


def test_the_plan_counts_examples_and_epochs_where_there_are_data(capsys):
    assert cli.execute(["pretrain", "--recipe", "tiny", "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["pretrain"]["data"]
    assert data["image"] == {"samples seen": 160, "examples": 96, "epochs": pytest.approx(160 / 96)}
