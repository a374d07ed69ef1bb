import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inspected import found as made
from inspected import picture
from source_files import png

from beitctl.api import Example
from beitctl.data.order import Order, Part
from beitctl.inspecting import checking, showing
from beitctl.inspecting.finding import Found
from beitctl.inspecting.shards import Hashed, ParquetShard, Ready
from beitctl_plugins.sources import opened as sources
from beitctl_plugins.sources.hub import Hub
from beitctl_plugins.sources.mixture import Mixture
from beitctl_plugins.sources.parquet import Parquet
from beitctl_plugins.sources.reading import table_files
from beitctl_plugins.sources.text import Text

WORDS = ["x" * 90 + str(number) for number in range(750)]


@pytest.fixture
def reads(monkeypatch):
    """Groups that were read, with a cache that holds less than two of 75 kB."""
    found = []
    read = table_files.Groups._read
    monkeypatch.setattr(table_files, "MOST_CACHED", 100_000)
    monkeypatch.setattr(
        table_files.Groups,
        "_read",
        lambda self, path, *place: found.append(place) or read(self, path, *place),
    )
    return found


def walk(opened, epochs=1):
    order = Order([Part(len(opened), tuple(opened.shards), window=opened.window)], "texts")
    return [opened[order.at(place, 0)[1]].id for place in range(epochs * len(opened))]


def write(folder, sizes, column="text"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        cells = [WORDS[row % len(WORDS)] for row in range(size)]
        pq.write_table(pa.table({column: cells}), folder / f"{number}.parquet", use_dictionary=False)
    return folder


@pytest.mark.parametrize("sizes", [[750] * 4, [900, 3, 750, 800, 547]])
@pytest.mark.parametrize("kind", ["text", "parquet", "mixture"])
def test_an_epoch_reads_large_groups_about_once(tmp_path, reads, kind, sizes):
    table = {"kind": "text", "path": str(write(tmp_path, sizes))}
    opened = {
        "text": lambda: Text(path=tmp_path),
        "parquet": lambda: Parquet(path=tmp_path, text="text"),
        "mixture": lambda: Mixture(sources=[table]),
    }[kind]().open()
    names = walk(opened, epochs=2)
    assert len(reads) <= 2 * 2 * len(sizes)
    assert sorted(names) == sorted(2 * [opened[place].id for place in range(3000)])
    assert names[:50] != sorted(names[:50]), "mixed within a group"


def test_never_more_than_two_large_groups_are_in_memory(tmp_path, reads, monkeypatch):
    opened = Text(path=write(tmp_path, [750] * 4)).open()
    cache, kept = opened.example.__self__._groups._cache, []
    batches = table_files.ParquetTable.batches
    monkeypatch.setattr(
        table_files.ParquetTable, "batches", lambda *some: kept.append(len(cache)) or batches(*some)
    )
    walk(opened)
    assert max(kept) == 1, "beside the one that is read"
    assert len(cache) == 2


def test_many_small_groups_are_mixed_as_far_as_memory_goes(tmp_path, reads):
    write(tmp_path, [100] * 30)
    opened = Text(path=tmp_path).open()
    assert 400 < opened.window < 560
    walk(opened)
    assert len(reads) <= 60


def test_only_the_columns_that_are_read_count(tmp_path):
    table = pa.table({"text": ["short"] * 10, "other": [b"x" * 10**6 + bytes([n]) for n in range(10)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    (size,) = table_files.opened(tmp_path / "a.parquet").sizes(["text"])
    assert 50 < size < 500


def test_sizes_are_those_in_memory_and_not_in_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 10**6] * 2}), path, use_dictionary=False)
    (size,) = table_files.opened(path).sizes(["text"])
    assert size > 10**6 > path.stat().st_size


def test_parquet_and_other_text_side_by_side_have_the_window_of_the_parquet(tmp_path, reads):
    write(tmp_path, [750, 750])
    (tmp_path / "z.txt").write_text("line\n" * 5000)
    opened = Text(path=tmp_path).open()
    assert 0 < opened.window <= 750


def test_text_without_parquet_is_mixed_as_usual(tmp_path):
    (tmp_path / "z.txt").write_text("line\n" * 50)
    assert Text(path=tmp_path / "z.txt").open().window == 0


def test_large_groups_are_noted(tmp_path, reads):
    write(tmp_path, [750])
    (note,) = Text(path=tmp_path).open().notes
    assert "1 row group is larger than" in note
    assert "`beitctl data pack` writes small ones" in note


def test_check_shows_notes(tmp_path, reads, capsys):
    source = Text(path=write(tmp_path, [750]))
    table = {"path": str(tmp_path)}
    report = checking.check(Found("text", table, source), source.open(), limit=2, quiet=True)
    assert json.loads(json.dumps(report["notes"])) == list(source.open().notes)
    showing.show(report)
    assert "beitctl data pack" in " ".join(capsys.readouterr().out.split())


def test_check_says_nothing_where_there_is_nothing_to_note(capsys):
    report = checking.check(*made([Example("a", picture())]), quiet=True)
    assert report["notes"] == []
    showing.show(report)
    assert "notes" not in capsys.readouterr().out


def test_streams_know_the_sizes_of_their_groups(tmp_path, reads):
    write(tmp_path / "set" / "data", [750, 750])
    opened = Hub(dataset=str(tmp_path / "set"), text="text", streaming=True).open()
    assert 0 < opened.window <= 750
    assert opened.notes


def test_opening_a_pack_leaves_its_pictures_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)
    with (tmp_path / "a.parquet").open("wb") as file:
        shard = ParquetShard(Hashed(file))
        for number in range(4):
            noise = np.random.default_rng(number).integers(0, 255, 10_000, np.uint8)
            shard.add(Ready(str(number), noise.tobytes() if number % 2 else png(), ("words",)))
        shard.close()
    asked = []
    batches = table_files.ParquetTable.batches
    monkeypatch.setattr(
        table_files.ParquetTable,
        "batches",
        lambda self, group, columns, size: asked.extend(columns) or batches(self, group, columns, size),
    )
    opened = Parquet(path=tmp_path, id="id").open()
    assert "image" not in asked
    assert [opened[place].id for place in range(4)] == ["0", "1", "2", "3"]
    assert "image" in asked


def test_the_footer_of_a_pack_repeats_no_pictures():
    stream = io.BytesIO()
    shard = ParquetShard(Hashed(stream))
    for number in range(3):
        shard.add(Ready(str(number), bytes([number]) * 100_000))
    shard.close()
    assert pq.ParquetFile(io.BytesIO(stream.getvalue())).metadata.serialized_size < 3000
