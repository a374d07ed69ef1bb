"""A list of captions with a blank one is the same to all sources: that one is dropped."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import fill, png, table, tar

from beitctl_plugins.sources.coco import Coco
from beitctl_plugins.sources.hub import Hub
from beitctl_plugins.sources.image_folder import ImageFolder
from beitctl_plugins.sources.pairs import Pairs
from beitctl_plugins.sources.parquet import Parquet
from beitctl_plugins.sources.webdataset import WebDataset

CAPTIONS = [["one"], ["two", " ", "zwei"], [" ", ""]]
NAMES = ["1.png", "2.png", "3.png"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def as_parquet(folder):
    cells = {"image": [png((n, 0, 0)) for n in range(3)], "captions": CAPTIONS}
    pq.write_table(pa.table(cells), folder / "train.parquet")
    return Parquet(path=folder, caption="captions", max_bad_share=1)


def as_hub(folder):
    as_parquet(folder)
    return Hub(dataset=str(folder), image="image", caption="captions", max_bad_share=1)


def as_pairs(folder, kind="jsonl"):
    rows = [{"image": name, "caption": some} for name, some in zip(NAMES, CAPTIONS, strict=True)]
    return Pairs(path=table(fill(folder, *NAMES), rows, kind), max_bad_share=1)


def as_pairs_in_parquet(folder):
    return as_pairs(folder, "parquet")


def as_coco(folder):
    fill(folder / "val2017", *NAMES)
    images = [{"id": n, "file_name": name} for n, name in enumerate(NAMES)]
    rows = [{"image_id": n, "caption": text} for n, some in enumerate(CAPTIONS) for text in some]
    (folder / "annotations").mkdir()
    text = json.dumps({"images": images, "annotations": rows})
    (folder / "annotations" / "captions_val2017.json").write_text(text)
    return Coco(path=folder, split="val2017", max_bad_share=1)


@pytest.mark.parametrize("make", [as_parquet, as_hub, as_pairs, as_pairs_in_parquet, as_coco])
def test_a_blank_caption_is_dropped_and_a_row_of_blank_ones_is_listed(tmp_path, make):
    opened = make(tmp_path).open()
    assert [opened[place].captions for place in range(len(opened))] == [("one",), ("two", "zwei")]
    assert any("3" in line or "[2]" in line for line in opened.problems)


def test_a_blank_caption_in_a_tar_is_dropped(tmp_path):
    members = [("1.jpg", png()), ("1.json", json.dumps({"captions": CAPTIONS[1]}).encode())]
    assert WebDataset(path=tar(tmp_path / "a.tar", members)).open()[0].captions == ("two", "zwei")


def test_a_blank_caption_beside_a_folder_is_dropped(tmp_path):
    fill(tmp_path, "1.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "caption": CAPTIONS[1]}))
    assert ImageFolder(path=tmp_path).open()[0].captions == ("two", "zwei")


def test_lengths_leave_blank_captions_out(tmp_path):
    assert as_parquet(tmp_path).open().lengths.tolist() == [3, 3]
