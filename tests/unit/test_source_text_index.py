import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import examples

from beitctl_plugins.sources.reading import text_index
from beitctl_plugins.sources.text import Text


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Small and large files, in turn."""
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "in"
    folder.mkdir()
    for name, count in {"a": 2, "b": 300, "c": 1, "d": 3, "e": 1500}.items():
        (folder / f"{name}.txt").write_text("".join(f"{name} {number}\n" for number in range(count)))
    (folder / "f.jsonl").write_text('{"text": "x"}\n{}\n' * 200)
    pq.write_table(
        pa.table({"text": [f"p{n}" for n in range(700)]}), folder / "g.parquet", row_group_size=300
    )
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    return folder


def index_of(opened):
    return opened.example.__self__._index


def whole(corpus, monkeypatch, size):
    monkeypatch.setattr(text_index, "INDEX_BYTES", size)
    opened = Text(path=corpus, max_bad_share=0.5).open()
    return {name: array.tolist() for name, array in index_of(opened).items()}, examples(opened), opened.shards


@pytest.mark.parametrize("size", [0, 1000])
def test_files_by_themselves_give_the_same_index_as_all_together(corpus, monkeypatch, size):
    expected = whole(corpus, monkeypatch, 10**9)
    assert whole(corpus, monkeypatch, size) == expected
    assert whole(corpus, monkeypatch, size) == expected, "from the cache"


def test_an_index_that_cannot_be_kept_is_the_same(corpus, monkeypatch, tmp_path):
    expected = whole(corpus, monkeypatch, 10**9)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "file"))
    assert whole(corpus, monkeypatch, 1000) == expected


def test_a_file_that_was_touched_is_the_only_one_that_is_read_again(corpus, monkeypatch):
    monkeypatch.setattr("beitctl_plugins.sources.reading.ahead.MOST_PROCESSES", 1)
    whole(corpus, monkeypatch, 0)
    read = []
    add = text_index._Places.add
    monkeypatch.setattr(
        text_index._Places,
        "add",
        lambda self, n, index, bar: read.append(index.names[n]) or add(self, n, index, bar),
    )
    (corpus / "b.txt").write_text("new\n")
    os.utime(corpus / "b.txt", (1e9 + 7, 1e9 + 7))
    whole(corpus, monkeypatch, 0)
    assert read == ["b.txt"]


def test_indexing_needs_little_more_memory_than_the_index(corpus, monkeypatch):
    monkeypatch.setattr(text_index, "INDEX_BYTES", 0)
    monkeypatch.setattr("beitctl_plugins.sources.reading.ahead.MOST_PROCESSES", 1)
    lines, files = 20_000, 2
    for number in range(files):
        (corpus / f"z{number}.txt").write_text("word\n" * lines)
        os.utime(corpus / f"z{number}.txt", (1e9, 1e9))
    tracemalloc.start()
    opened = Text(path=corpus, max_bad_share=0.5).open()
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(opened) > files * lines
    assert size < 10 * len(opened)
    assert peak < 45 * len(opened)
