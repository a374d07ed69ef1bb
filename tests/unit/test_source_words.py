import json
import os

import datasets
import pyarrow as pa
import pytest
from source_files import fill, png, table, tar

from beitctl.errors import DataError
from beitctl_plugins.sources import opened as sources
from beitctl_plugins.sources.hub import Hub
from beitctl_plugins.sources.image_folder import ImageFolder
from beitctl_plugins.sources.mixture import Mixture
from beitctl_plugins.sources.pairs import Pairs
from beitctl_plugins.sources.parquet import Parquet
from beitctl_plugins.sources.path_list import PathList
from beitctl_plugins.sources.reading.rows import Files
from beitctl_plugins.sources.reading.table_files import Groups
from beitctl_plugins.sources.text import Text
from beitctl_plugins.sources.webdataset import WebDataset

PICTURES = [png((number, 0, 0)) for number in range(3)]
WORDS = [("one",), ("two", "zwei"), ("three 3",)]
CLASSES = ["cat", "dog", "cat"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def made():
    rows = {
        "image": [{"bytes": data, "path": None} for data in PICTURES],
        "captions": [["one"], ["two", "zwei"], [" three\n3 "]],
        "label": [0, 1, 0],
    }
    features = datasets.Features(
        image=datasets.Image(),
        captions=datasets.List(datasets.Value("string")),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )
    return datasets.Dataset.from_dict(rows, features=features)


def as_parquet(folder):
    folder.mkdir()
    made().to_parquet(folder / "train-00000-of-00001.parquet", batch_size=2)
    return Parquet(path=folder, label="label")


def as_tar(folder):
    members = []
    for number, (words, label) in enumerate(zip(WORDS, CLASSES, strict=True)):
        members += [(f"{number}.jpg", PICTURES[number]), (f"{number}.cls", label.encode())]
        members += [(f"{number}.json", json.dumps({"captions": words}).encode())]
    return WebDataset(path=tar(folder / "a.tar", members), label="cls")


def as_hub(folder, streaming=False):
    as_parquet(folder)
    return Hub(dataset=str(folder), caption="captions", streaming=streaming)


def as_stream(folder):
    return as_hub(folder, streaming=True)


KINDS = {"parquet": as_parquet, "webdataset": as_tar, "hub": as_hub, "stream": as_stream}


@pytest.fixture(params=KINDS)
def opened(request, tmp_path):
    return KINDS[request.param](tmp_path / "set").open()


def all_words(found):
    return [found.words(place) for place in range(len(found))]


def test_words_are_those_of_the_examples(opened):
    assert all_words(opened) == WORDS
    assert [opened[place].captions for place in range(3)] == WORDS


def test_labels_are_those_of_the_examples(opened):
    assert [opened.label(place) for place in range(3)] == CLASSES
    assert opened.labelled is not None


def test_words_and_labels_are_read_without_pictures(opened, monkeypatch):
    asked, sizes = set(), []
    table, read = Groups.table, Files.read
    monkeypatch.setattr(
        Groups, "table", lambda self, *place: asked.update(self.columns) or table(self, *place)
    )
    monkeypatch.setattr(
        Files,
        "read",
        lambda self, file, first, end: sizes.append(end - first) or read(self, file, first, end),
    )
    [opened.words(place) for place in range(3)]
    [opened.label(place) for place in range(3)]
    assert "image" not in asked
    assert not set(map(len, PICTURES)) & set(sizes)


def test_a_mixture_hands_words_on(tmp_path):
    (tmp_path / "t.txt").write_text("prose\nmore\n")
    parts = [as_tar(tmp_path).model_dump(mode="json"), {"path": str(tmp_path / "t.txt")}]
    parts[0]["kind"], parts[1]["kind"] = "webdataset", "text"
    mixed = Mixture(sources=parts).open()
    assert all_words(mixed) == [*WORDS, ("prose",), ("more",)]


def test_words_are_captions_and_then_the_text(tmp_path):
    path = tmp_path / "a.parquet"
    cells = {"image": PICTURES, "caption": ["a", "b", "c"], "text": [" x", "y ", "z"]}
    pa.parquet.write_table(pa.table(cells), path)
    found = Parquet(path=path, text="text", image="image", caption="caption").open()
    assert all_words(found) == [("a", "x"), ("b", "y"), ("c", "z")]


def test_words_of_a_sample_that_is_broken_are_refused(tmp_path):
    path = tar(tmp_path / "a.tar", [("0.jpg", png()), ("0.json", b"{")])
    with pytest.raises(DataError, match="not JSON"):
        WebDataset(path=path).open().words(0)


def test_pictures_of_a_large_set_are_not_copied_while_it_is_judged(tmp_path, monkeypatch):
    rows = {"image": [{"bytes": bytes([n]) * 10**6, "path": None} for n in range(20)]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(image=datasets.Image()))
    data.save_to_disk(tmp_path / "set")
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        found = Hub(dataset=str(tmp_path / "set")).open()
        assert pool.max_memory() < 2 * 10**6
    finally:
        pa.set_memory_pool(before)
    assert len(found[3].image) == 10**6


def touched(source, path):
    before = source.open()
    stamp = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(stamp, stamp))
    after = source.open()
    assert before.fingerprint == after.fingerprint
    return before.state != after.state and bool(before.state)


def test_the_state_tells_when_a_file_was_touched(tmp_path):
    fill(tmp_path / "folder", "1.png", "2.png")
    (tmp_path / "t.txt").write_text("prose")
    (tmp_path / "list.txt").write_text("folder/1.png\n")
    pairs = table(tmp_path, [{"image": "folder/1.png", "caption": "one"}])
    assert touched(Text(path=tmp_path / "t.txt"), tmp_path / "t.txt")
    assert touched(as_tar(tmp_path), tmp_path / "a.tar")
    assert touched(as_parquet(tmp_path / "set"), next((tmp_path / "set").iterdir()))
    assert touched(ImageFolder(path=tmp_path / "folder"), tmp_path / "folder" / "2.png")
    assert touched(PathList(path=tmp_path / "list.txt"), tmp_path / "folder" / "1.png")
    assert touched(Pairs(path=pairs), pairs)
    assert touched(Pairs(path=pairs), tmp_path / "folder" / "1.png")
