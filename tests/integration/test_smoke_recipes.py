"""``--smoke``: every shipped recipe that pretrains does so for a few steps, and so does one of every task."""

import json
import math
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from beitctl import cli, recipe

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
NAMES = [file.stem for file in FILES if "pretrain" in tomllib.loads(file.read_text(encoding="utf-8"))]
FIRST = "beit3-base"
STEPS = 6
TUNED = {
    "classification": ("beitv2-base-imagenet", "accuracy"),
    "linear-probe": ("beit-base-linear", "accuracy"),
    "segmentation": ("beit-base-ade20k", "miou"),
    "detection": ("beit3-base-coco-detection", "box_map"),
    "retrieval": ("vlmo-base-coco-retrieval", "recall@1"),
    "vqa": ("beit3-base-vqav2", "vqa_score"),
    "nlvr2": ("vlmo-base-nlvr2", "accuracy"),
    "captioning": ("beit3-base-captioning", "cider_d (python tokenizer)"),
}
"""By task a recipe that fine-tunes to it, and the first of its metrics."""
PARENTS = ("train-tokenizer.text", "train-tokenizer.image", "tokenize-images", "pretrain")


def manifests(folder):
    return {
        file.parent.parent.name: json.loads(file.read_text()) for file in folder.glob("*/*/manifest.json")
    }


def losses(folder):
    """The losses of every step, by table."""
    found = {}
    for file in folder.glob("pretrain*/*/events.jsonl"):
        events = [json.loads(line) for line in file.read_text().splitlines()]
        steps = [event["metrics"] for event in events if event["event"] == "step"]
        found[file.parent.parent.name] = [
            [v for k, v in step.items() if k.endswith("loss")] for step in steps
        ]
    return found


def tables(name):
    """Keys of the tables that a recipe pretrains with."""
    return {key for key, table in recipe.load(name).tables.items() if table.stage == "pretrain"}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The runs of one recipe that began with nothing, in a process of its own: tokenizers, codes, model."""
    root = tmp_path_factory.mktemp("first")
    outside = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "BEITCTL_RECIPES")
    given = {key: value for key, value in os.environ.items() if key not in outside}
    done = subprocess.run(
        [sys.executable, "-m", "beitctl", "pretrain", "--recipe", FIRST, "--smoke"],
        env=given | {"OMP_NUM_THREADS": "1", "BEITCTL_RUNS": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return root / f"{FIRST}-smoke"


@pytest.mark.slow
def test_a_smoke_run_makes_all_that_it_needs_in_a_folder_of_its_own(first):
    assert [path.name for path in first.parent.iterdir()] == [f"{FIRST}-smoke"]
    found = manifests(first)
    assert sorted(found) == ["pretrain", "tokenize-images", "train-tokenizer.image", "train-tokenizer.text"]
    assert {manifest["status"] for manifest in found.values()} == {"ok"}


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty working folder, and no settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in ("BEITCTL_RECIPES", "BEITCTL_RUNS", "RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_pretrains_a_few_steps_with_finite_losses(first, alone, capsys, name):
    folder = Path("runs", f"{name}-smoke")
    for parent in ("train-tokenizer.text", "train-tokenizer.image", "tokenize-images"):
        shutil.copytree(first / parent, folder / parent)  # found as done if the tables are the same, else run
    assert cli.execute(["pretrain", "--recipe", name, "--smoke"]) == 0, capsys.readouterr().err
    found = losses(folder)
    assert set(found) == tables(name)
    for steps in found.values():
        assert len(steps) == STEPS
        assert all(step and all(map(math.isfinite, step)) for step in steps), steps


@pytest.fixture(scope="module")
def pretrained(first, tmp_path_factory):
    """The runs that fine-tuning at toy size begins with, those of the recipe tiny."""
    root = tmp_path_factory.mktemp("pretrained")
    for parent in PARENTS[:3]:
        shutil.copytree(first / parent, root / "runs" / "tiny" / parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("BEITCTL_RUNS", raising=False)
        assert cli.execute(["pretrain", "--recipe", str(recipe.bundled("tiny"))]) == 0
    return root / "runs" / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(TUNED))
def test_a_shipped_recipe_of_every_task_is_tuned_and_measured(pretrained, alone, capsys, task):
    name, headline = TUNED[task]
    folder = Path("runs", f"{name}-smoke")
    for parent in PARENTS:
        shutil.copytree(pretrained / parent, folder / parent)
    assert cli.execute(["finetune", "--recipe", name, "--smoke"]) == 0, capsys.readouterr().err
    found = manifests(folder)
    assert {manifest["status"] for manifest in found.values()} == {"ok"}
    metrics = found["finetune"]["metrics"]
    numbers = [value for value in metrics.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    assert 0 <= metrics[headline] <= 10  # CIDEr-D ends at 10, the others at 1
    assert metrics["examples"] + metrics["left_out"] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("tokenize-images", "--recipe", FIRST),
            "--smoke: the stage tokenize-images has no toy size; stages that have one: finetune, pretrain",
        ),
        (("pretrain", "--recipe", "beit3-bas"), "no recipe 'beit3-bas', did you mean 'beit3-base'?"),
        (
            ("pretrain", "--recipe", FIRST, "--set", "model.heads=5"),
            "model.width must be a multiple of heads (5), found 64",
        ),
    ],
    ids=["stage", "recipe", "setting"],
)
def test_wrong_usage_ends_with_2_and_one_error(alone, capsys, arguments, message):
    assert cli.execute([*arguments, "--smoke"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")
    assert "Traceback" not in told
    assert list(Path().iterdir()) == []
