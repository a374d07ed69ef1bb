"""The recipes that ship with beitctl: they validate, and the giant's plan is the paper's."""

import json
import re
from pathlib import Path

import pytest

from beitctl import cli, recipe

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
NAMES = [file.stem for file in FILES]


@pytest.fixture(autouse=True)
def anywhere(monkeypatch, tmp_path):
    """Bundled recipes only, and no data in the working folder."""
    monkeypatch.delenv("BEITCTL_RECIPES", raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_recipes_of_the_checkout_are_those_that_are_found():
    assert recipe.names() == NAMES == ["beit3-base", "beit3-giant", "beit3-large", "demo", "tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_validates(name):
    found = recipe.load(name)
    assert found.meta["summary"]
    assert "pretrain" in found.tables


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


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_and_grid_fit_the_tokenizers(name):
    tables = recipe.load(name).tables
    model = tables["pretrain"].plugin.model
    pieces = tables["train-tokenizer.text"].plugin.tokenizer.pieces
    shape = tables["train-tokenizer.image"].plugin.tokenizer.shape
    assert model.vocabulary >= pieces + 2
    assert model.grid == shape.image_px // shape.patch_px


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
