"""What bad data do to training: a picture is replaced and listed; too many, or a shard that goes, end it."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_files import (
    PAIR,
    PICTURES,
    beitctl,
    beside,
    jpeg,
    png,
    rows,
    settle,
    tarred,
    write,
)

from beitctl.data.images import Crop
from beitctl_plugins.stages import shared


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    return settle(tmp_path, monkeypatch)


RECIPE = """
[recipe]
summary = "small"

[pretrain]
tokens = "."
model = { layers = 1, width = 8, heads = 2, ffn = 16, image_px = 16, patch_px = 4 }
train = { steps = 4, save_every_steps = 1, optim = { peak_lr = 1e-3 } }

[pretrain.objectives.image]
task = { kind = "masked-image", min_block = 2 }
source = { kind = "SOURCE", path = "PATH" }
samples = 2
"""


class Tokens:
    """A token store; in the third step it lets something happen."""

    views, codes, grid, fingerprint = 2, 40, 4, "tokens"

    def __init__(self, happens):
        self.happens, self.count = happens, 0

    def view(self, id, number):
        self.count += 1
        if self.count == 5:
            self.happens()
        return Crop(0, 0, 20, 20), np.arange(16)


@pytest.fixture
def pretrain(capsys, monkeypatch):
    """``pretrain(kind, path, happens)``: what a small run on a source ends with."""

    def run(kind, path, happens=lambda: None):
        Path("beitctl.toml").write_text(RECIPE.replace("SOURCE", kind).replace("PATH", path))
        monkeypatch.setattr(shared, "open_tokens", lambda job, value: Tokens(happens))
        code, _, err = beitctl(capsys, "pretrain", "--out", "run")
        return code, err

    return run


def quarantined():
    return [json.loads(line) for line in Path("run/quarantine.jsonl").read_text().splitlines()]


def status():
    return json.loads(Path("run/manifest.json").read_text())["status"]


def checkpoints():
    return sorted(path.name for path in Path("run/checkpoints").iterdir())


def test_a_broken_picture_is_replaced_and_listed_and_training_goes_on(pretrain, monkeypatch):
    beside(("x.jpg", jpeg()[:999]))(monkeypatch)
    code, err = pretrain("image-folder", "data")
    assert (code, status()) == (0, "ok")
    assert "warning W301: skipped image/x.jpg: x.jpg (data/x.jpg): not a readable picture" in err
    (row,) = quarantined()
    assert (row["id"], "truncated" in row["reason"], row["step"] in (1, 2)) == ("image/x.jpg", True, True)


def test_too_many_broken_pictures_end_training_with_their_names(pretrain, monkeypatch):
    beside(("x.jpg", b"x"), ("y.jpg", b"%PDF"))(monkeypatch)
    code, err = pretrain("image-folder", "data")
    assert (code, status()) == (3, "failed")
    assert (
        "2 of 5 examples of 'image' cannot be used (allowed: 1, max_bad_share = 0.001; all are in run" in err
    )
    assert "\n  x.jpg (data/x.jpg): not a readable picture (unknown format)" in err
    assert "\n  y.jpg (data/y.jpg): not a readable picture (PDF, " in err
    assert sorted(row["id"] for row in quarantined()) == ["image/x.jpg", "image/y.jpg"]


def test_a_source_that_is_unusable_ends_training_before_it_begins(pretrain):
    rows(PAIR)(None)
    code, err = pretrain("pairs", "data.jsonl")
    assert (code, "data.jsonl:4: no 'caption'; the row has image" in err) == (3, True)
    assert not Path("run/checkpoints").exists()


def four_shards(_):
    """Pictures in four files."""
    for number in range(4):
        columns = {"image": PICTURES[number : number + 1], "id": [str(number)]}
        write(f"data/{number}.parquet", b"")
        pq.write_table(pa.table(columns), f"data/{number}.parquet")


def change(name):
    with open(name, "ab") as opened:
        opened.write(b"x")


def remove_all(pattern):
    for path in Path().glob(pattern):
        path.unlink()


def change_all(pattern):
    for path in Path().glob(pattern):
        change(path)


@pytest.mark.parametrize(
    ("make", "kind", "path", "files", "happens", "says"),
    [
        (tarred(), "webdataset", "data.tar", "data.tar", remove_all, "removed since it was opened"),
        (tarred(), "webdataset", "data.tar", "data.tar", change_all, "changed since it was opened"),
        (four_shards, "parquet", "data", "data/*.parquet", remove_all, "removed since it was opened"),
        (four_shards, "parquet", "data", "data/*.parquet", change_all, "changed since it was opened"),
        (rows(), "pairs", "data.jsonl", "data.jsonl", change_all, "changed since it was opened"),
    ],
    ids=["tar removed", "tar changed", "Parquet removed", "Parquet changed", "JSONL changed"],
)
def test_a_shard_that_goes_or_changes_ends_training(pretrain, make, kind, path, files, happens, says):
    make(None)
    code, err = pretrain(kind, path, lambda: happens(files))
    assert (code, status()) == (3, "failed")
    assert re.search(rf"error: {files.replace('*', '[0-3]')}: {says}", err), err
    assert checkpoints() == ["step-00000001", "step-00000002"]
    assert not Path("run/quarantine.jsonl").exists()


def test_a_run_does_not_go_on_with_other_data(pretrain):
    tarred()(None)
    assert pretrain("webdataset", "data.tar", lambda: change("data.tar"))[0] == 3
    tarred(("3.png", png(3)))(None)
    code, err = pretrain("webdataset", "data.tar")
    assert (code, "run: the data are not those that this run started with; choose another" in err) == (
        3,
        True,
    )
    tarred()(None)
    assert pretrain("webdataset", "data.tar")[0] == 0
