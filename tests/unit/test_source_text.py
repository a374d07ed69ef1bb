import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import examples, ids

from beitctl.errors import DataError
from beitctl_plugins.sources.text import Text


def test_each_line_is_a_piece_and_blank_lines_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\n  \n two \r\nthree\u2028still three")
    opened = Text(path=tmp_path / "a.txt").open()
    assert [e.text for e in examples(opened)] == ["one", "two", "three\u2028still three"]
    assert ids(opened) == ["a.txt:1", "a.txt:4", "a.txt:5"]


def test_a_folder_of_all_formats_is_read_in_order(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"gz"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.jsonl").write_text('{"text": "lines"}\n\n')
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}'))
    pq.write_table(pa.table({"text": ["table"], "other": [1]}), tmp_path / "d.parquet")
    (tmp_path / "ignored.md").write_text("no")
    opened = Text(path=tmp_path).open()
    assert [e.text for e in examples(opened)] == ["gz", "lines", "packed", "table"]
    assert ids(opened) == ["a.txt.gz:1", "b/b.jsonl:1", "c.jsonl.gz:1", "d.parquet:1"]


def test_another_field_holds_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}')
    assert Text(path=tmp_path / "a.jsonl", field="body").open()[0].text == "one"


def test_rows_without_text_are_listed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n{\n[]\n{"text": ""}')
    opened = Text(path=tmp_path / "a.jsonl", max_bad_share=0.9).open()
    assert opened.problems == [f"a.jsonl:{line}: no text in 'text'" for line in (2, 3, 4)]


def test_too_many_rows_without_text_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"1 of 2 rows are unusable, more than max_bad_share \(0.01\) allows"):
        Text(path=tmp_path / "a.parquet").open()


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_corpus_is_refused(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(
            DataError, match=r"empty corpus \(1 files searched that end in .txt, .*correct 'path'"
        ):
            Text(path=path).open()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8_is_refused_with_file_and_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=rf"{name}:2: not UTF-8 \(invalid continuation byte\); convert it"):
        Text(path=tmp_path).open()


@pytest.mark.parametrize(
    "data", [b"not gzip", gzip.compress(b"x" * 1000)[:-9], gzip.compress(b"xyz")[:12] + b"\xff" * 20]
)
def test_damaged_gzip_is_refused(tmp_path, data):
    (tmp_path / "a.txt.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"a.txt.gz: cannot be read \(.*\); replace or remove it"):
        Text(path=tmp_path).open()


def test_a_parquet_file_without_the_column_is_refused(tmp_path):
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no column 'text'; it has a, b"):
        Text(path=tmp_path).open()


def test_text_of_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"a.pdf: expected a file that ends in .txt, .txt.gz, .jsonl"):
        Text(path=tmp_path / "a.pdf").open()
