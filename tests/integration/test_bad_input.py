"""Bad input through the command line: a message, an exit code, nothing harmed; or counted and survived."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from beitctl import cli

ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "BEITCTL_RUNS")}
ENV |= {"OMP_NUM_THREADS": "1", "CI": "1"}

RECIPE = """
[recipe]
summary = "small"

[train-tokenizer.text]
tokenizer = { kind = "sentencepiece", pieces = 30 }
sources = [{ kind = "pairs", path = "pairs.jsonl" }]

[train-tokenizer.prose]
tokenizer = { kind = "sentencepiece", pieces = 30 }
sources = [{ kind = "text", path = "prose.txt" }]

[train-tokenizer.image]
sources = [{ kind = "image-folder", path = "pictures" }]

[train-tokenizer.image.tokenizer]
kind = "vqkd"
teacher = { kind = "timm", model = "test_efficientnet", weights = "random", stage = 2, input_px = 32 }
shape = { layers = 1, decoder_layers = 1, width = 8, heads = 2, ffn = 16, image_px = 16, patch_px = 4 }
codes = 4
code_width = 4
samples = 6
train = { steps = 4, optim = { peak_lr = 1e-3 } }

[tokenize-images]
tokenizer = "@train-tokenizer.image"
sources = [{ kind = "image-folder", path = "pictures" }]
views = 2

[pretrain]
tokens = "@tokenize-images"
model = { layers = 1, width = 8, heads = 2, ffn = 16, image_px = 16, patch_px = 4 }
train = { steps = 2, optim = { peak_lr = 1e-3 } }

[pretrain.objectives.image]
task = { kind = "masked-image", min_block = 2 }
source = { kind = "image-folder", path = "pictures" }
samples = 6
"""


@pytest.fixture
def folder(tmp_path):
    """A working folder with a recipe and data of every kind."""
    (tmp_path / "beitctl.toml").write_text(RECIPE)
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        Image.new("RGB", (24, 24), (40 * number, 90, 0)).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "prose.txt").write_text("")
    rows = [{"image": f"pictures/{n}.png", "caption": f"picture number {n}"} for n in range(6)]
    rows[4]["caption"] = 4
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


PICTURE = "pretrain.objectives.image"
SOURCES = "train-tokenizer.image.sources"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("train-tokenizer", "--only", "text"),
            3,
            "1 of 6 rows are unusable, more than max_bad_share (0.01) allows; correct them or raise it:\n"
            "  pairs.jsonl:5: caption is not text: 4",
        ),
        (("train-tokenizer", "--only", "prose"), 3, "prose.txt: empty corpus (1 files searched"),
        (
            (
                "train-tokenizer",
                "--only",
                "image",
                "--set",
                f"{SOURCES}=[{{kind='image-folder', path='nowhere'}}]",
            ),
            3,
            "nowhere: no such file or folder; correct 'path' in the recipe",
        ),
        (
            ("pretrain", "--set", "pretrain.train.stepz=3"),
            2,
            "unknown key, did you mean 'steps'?",
        ),
        (
            ("pretrain", "--set", f"{PICTURE}.task.mask_ratio=1.5"),
            2,
            f"{PICTURE}.task.mask_ratio must be less than or equal to 1, found the number 1.5",
        ),
        (
            ("pretrain", "--set", "pretrain.model.heads=3"),
            2,
            "pretrain.model.width must be a multiple of heads (3), found 8",
        ),
    ],
    ids=["caption", "corpus", "folder", "key", "masks", "heads"],
)
def test_bad_input_ends_with_its_exit_code_and_says_what_to_do(
    folder, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("BEITCTL_RUNS", raising=False)
    assert cli.execute(arguments) == code
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")


def manifests(folder: Path, key):
    return [json.loads(file.read_text()) for file in folder.glob(f"runs/beitctl/{key}/*/manifest.json")]


def test_a_run_goes_on_beside_a_corrupt_picture_and_counts_it(folder):
    (folder / "pictures" / "3.png").write_bytes((folder / "pictures" / "3.png").read_bytes()[:40])
    line = [sys.executable, "-m", "beitctl", "pretrain"]
    done = subprocess.run(line, cwd=folder, env=ENV, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "skipped 3.png" in done.stderr
    assert manifests(folder, "tokenize-images")[0]["metrics"]["skipped"] == 1
    assert manifests(folder, "pretrain")[0]["status"] == "ok"
