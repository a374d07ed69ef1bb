import datetime
import pickle
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import examples, fill, ids

from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources.pairs import Pairs
from beitctl_plugins.sources.reading import table_files


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path, "1.png", "2.png", "3.png")


def write(folder, columns, group=2):
    pq.write_table(pa.table(columns), folder / "a.parquet", row_group_size=group)
    return folder / "a.parquet"


NAMES = ["1.png", "2.png", "1.png", "3.png", "1.png"]


def test_rows_of_a_picture_in_several_groups_are_one_example(folder):
    path = write(folder, {"image": NAMES, "caption": list("abcde"), "other": [b"x"] * 5})
    opened = Pairs(path=path).open()
    assert ids(opened) == ["1.png", "2.png", "3.png"]
    assert [e.captions for e in examples(opened)] == [("a", "c", "e"), ("b",), ("d",)]
    assert pickle.loads(pickle.dumps(opened))[0].captions == ("a", "c", "e")


def test_shards_are_the_groups_that_pictures_come_first_in(folder):
    opened = Pairs(path=write(folder, {"image": NAMES, "caption": list("abcde")})).open()
    assert opened.shards == [2, 1]
    assert opened.window > 3


def test_a_file_that_changes_ends_the_run(folder):
    path = write(folder, {"image": NAMES, "caption": list("abcde")})
    opened = Pairs(path=path).open()
    write(folder, {"image": NAMES[:2], "caption": list("ab")})
    with pytest.raises(ChangedError, match=r"a.parquet: changed since it was opened"):
        opened[0]


def test_rows_are_not_kept_in_memory(folder):
    path = write(
        folder, {"image": ["1.png"] * 2000, "caption": [f"{n}" + "x" * 2000 for n in range(2000)]}, 200
    )
    Pairs(path=path, check_files=False).open()
    tracemalloc.start()
    kept = Pairs(path=path, check_files=False).open()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == 1
    assert size < 500_000


def test_where_on_a_date_is_refused(folder):
    days = [datetime.date(2020, 1, 1)] * 5
    path = write(folder, {"image": NAMES, "caption": list("abcde"), "day": days})
    with pytest.raises(
        DataError, match=r"a.parquet: column 'day' holds date32\[day\]; expected texts or num"
    ):
        Pairs(path=path, where={"day": "2020-01-01"}).open()


def test_captions_of_bytes_are_refused(folder):
    path = write(folder, {"image": NAMES, "caption": [b"x"] * 5})
    with pytest.raises(DataError, match=r"a.parquet: column 'caption' holds binary; expected texts or lists"):
        Pairs(path=path).open()


def test_a_damaged_group_is_refused(folder):
    path = write(folder, {"image": NAMES, "caption": list("abcde")})
    data = bytearray(path.read_bytes())
    data[4:60] = bytes(56)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet: cannot be read"):
        Pairs(path=path).open()


def test_large_groups_are_noted(folder, monkeypatch):
    monkeypatch.setattr(table_files, "MOST_CACHED", 100)
    (note,) = Pairs(path=write(folder, {"image": NAMES, "caption": list("abcde")})).open().notes
    assert "row groups are larger" in note
