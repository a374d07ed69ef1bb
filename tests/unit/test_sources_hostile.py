"""Tables and tars that fuzzing found to do harm, and what was done about them."""

import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import examples, fill, png, tar

from beitctl.errors import DataError
from beitctl.report.naming import printable
from beitctl_plugins.sources.image_folder import ImageFolder
from beitctl_plugins.sources.pairs import Pairs
from beitctl_plugins.sources.parquet import Parquet
from beitctl_plugins.sources.path_list import PathList
from beitctl_plugins.sources.reading import table_files
from beitctl_plugins.sources.reading.wording import listed
from beitctl_plugins.sources.text import Text
from beitctl_plugins.sources.webdataset import WebDataset

GOOD = {"image": "1.png", "file_name": "1.png", "caption": "c", "text": "t"}
HOSTILE = [
    pytest.param("x" * 10**6, id="a million characters"),
    pytest.param("\ud800", id="half a character"),
    pytest.param("a\nb\x1b[31m", id="control characters"),
]


def shown(problems):
    """Whether lines can be printed and read."""
    return all(line.isprintable() and len(line) < 1000 and line.encode() for line in problems)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("where", ["key", "path"])
def test_what_a_row_says_is_short_and_printable_in_problems(tmp_path, hostile, where):
    fill(tmp_path, "1.png")
    bad = {hostile: 1} if where == "key" else {**GOOD, "image": hostile, "file_name": hostile}
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [GOOD, bad])))
    pairs = Pairs(path=tmp_path / "metadata.jsonl", max_bad_share=1).open()
    folder = ImageFolder(path=tmp_path).open()
    assert (len(pairs), len(pairs.problems), len(folder.problems)) == (1, 1, 1)
    assert shown([*pairs.problems, *folder.problems])


@pytest.mark.parametrize("hostile", ["x" * 60_000, "a\x1b[31m"])
def test_a_listed_path_is_short_and_printable_in_problems(tmp_path, hostile):
    fill(tmp_path, "1.png")
    (tmp_path / "a.txt").write_text(f"1.png\n{hostile}\n")
    opened = PathList(path=tmp_path / "a.txt", max_bad_share=1).open()
    assert len(opened.problems) == 1
    assert shown(opened.problems)


@pytest.mark.parametrize("source", [Parquet, Pairs, Text])
def test_the_columns_of_a_table_are_listed_in_few_words(tmp_path, source):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({f"{number}" * 1000: [1] for number in range(100)}), path)
    with pytest.raises(DataError, match="and 80 more") as caught:
        source(path=path).open()
    assert len(str(caught.value)) < 3000


def test_names_are_cut_in_the_middle_and_listed_to_the_twentieth():
    assert printable("a" * 200 + "b" * 200, 10) == "aaaa…bbbbb"
    assert printable("naïve/猫.png") == "naïve/猫.png"
    assert printable("a\nb\udcff") == "a\\nb\\xff"
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(22))).endswith("18, 19 and 2 more")
    assert listed([]) == "nothing"


def test_a_number_of_many_digits_in_a_header_of_a_tar_takes_no_hours(tmp_path):
    path = tmp_path / "a.tar"
    digits = b"1" * 500_000
    odd = tarfile.TarInfo("././@PaxHeader")
    odd.type, odd.size = tarfile.XHDTYPE, len(digits)
    with tarfile.open(tar(path, [("1.png", png())]), "r") as file:
        end = file.offset
    good = path.read_bytes()[:end]
    path.write_bytes(good + odd.tobuf() + digits + bytes(-len(digits) % 512) + bytes(1024))
    opened = WebDataset(path=path, max_bad_share=1).open()
    assert len(opened) == 1
    assert "number of more than 300 digits" in opened.problems[0]


@pytest.mark.parametrize("table", [{"text": "json:a"}, {"label": "json:a"}, {"caption": "json:a"}])
def test_half_characters_in_the_json_of_a_tar_are_an_error_of_their_example(tmp_path, table):
    rows = [("1.png", png()), ("1.json", b'{"a": "x\\ud800"}')]
    opened = WebDataset(path=tar(tmp_path / "a.tar", rows), max_bad_share=1, **table).open()
    with pytest.raises(DataError, match=r"a\.tar:1.*not valid Unicode"):
        examples(opened)


def bomb(path, rows=400):
    """A small file with a large group: all rows share one cell."""
    same = pa.array([0] * rows, pa.int32())
    cells = pa.DictionaryArray.from_arrays(same, pa.array([png().ljust(100_000, b"\0")]))
    words = pa.DictionaryArray.from_arrays(same, pa.array(["word " * 20_000]))
    pq.write_table(pa.table({"image": cells, "text": words}), path, store_schema=False)
    return path


def test_a_group_that_is_far_larger_than_its_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "BOMB_BYTES", 2**20)
    path = bomb(tmp_path / "a.parquet")
    opened = Parquet(path=path, text="text").open()
    assert len(opened) == 400
    with pytest.raises(DataError, match=r"row group 0 has more than \d+ MB, far more than the file"):
        opened[399]


def test_a_large_group_is_read_as_long_as_its_file_is_as_large(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "BOMB_FACTOR", 10**6)
    monkeypatch.setattr(table_files, "BOMB_BYTES", 2**20)
    assert len(Parquet(path=bomb(tmp_path / "a.parquet"), text="text").open()[399].text) == 99_999


@pytest.mark.parametrize(("most", "rows"), [(2**30, [300, 100]), (2**25, [128, 128, 144])])
def test_long_rows_come_in_small_pieces(tmp_path, monkeypatch, most, rows):
    monkeypatch.setattr(table_files, "MOST_PIECE", most)
    monkeypatch.setattr(table_files, "FEW_ROWS", 100 if most == 2**30 else 128)
    file = table_files.opened(bomb(tmp_path / "a.parquet"))
    assert [piece.num_rows for piece in file.batches(0, ["image", "text"], 300)] == rows
