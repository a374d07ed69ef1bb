import gzip
import os
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import examples, ids

from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources import text
from beitctl_plugins.sources.reading import text_index, text_pieces
from beitctl_plugins.sources.text import Text


def zipped(data):
    return gzip.compress(data, mtime=0)  # the time would be in the name of the test


def test_each_line_is_a_piece_and_blank_lines_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\n  \n two \r\nthree\u2028still three")
    opened = Text(path=tmp_path / "a.txt").open()
    assert [e.text for e in examples(opened)] == ["one", "two", "three\u2028still three"]
    assert ids(opened) == ["a.txt:1", "a.txt:4", "a.txt:5"]


def test_a_folder_of_all_formats_is_read_in_order(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(zipped(b"gz"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.jsonl").write_text('{"text": "lines"}\n\n')
    (tmp_path / "c.jsonl.gz").write_bytes(zipped(b'{"text": "packed"}'))
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


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_corpus_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
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


@pytest.mark.parametrize("data", [b"not gzip", zipped(b"x" * 1000)[:-9], zipped(b"xyz")[:12] + b"\xff" * 20])
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


@pytest.mark.parametrize(
    ("documents", "pieces", "names"),
    [
        ("lines", ["one", "two", "three"], ["a.txt:2", "a.txt:3", "a.txt:6"]),
        ("paragraphs", ["one\n two", "three"], ["a.txt:2", "a.txt:6"]),
        ("files", ["one\n two\n\n \nthree"], ["a.txt:2"]),
    ],
)
def test_a_piece_is_a_line_a_paragraph_or_a_file(tmp_path, documents, pieces, names):
    (tmp_path / "a.txt").write_text("\n one\n two\n\n \nthree\n\n")
    opened = Text(path=tmp_path / "a.txt", documents=documents).open()
    assert [e.text for e in examples(opened)] == pieces
    assert ids(opened) == names


def test_kinds_of_documents_have_their_fingerprints(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo")
    found = (Text(path=tmp_path, documents=kind).open().fingerprint for kind in ("lines", "files"))
    assert len(set(found)) == 2


def test_lengths_are_bytes_and_shards_are_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\nvier\n\n")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.jsonl").write_text('{"text": "é"}')
    pq.write_table(
        pa.table({"text": ["three", "", "four", "fives"]}), tmp_path / "d.parquet", row_group_size=3
    )
    opened = Text(path=tmp_path).open()
    assert list(opened.shards) == [2, 1, 2, 1]
    assert opened.lengths.tolist() == [4, 5, 2, 5, 4, 5]
    assert [e.text for e in examples(opened)] == ["one", "vier", "é", "three", "four", "fives"]


def test_a_large_file_is_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(text_pieces, "RUN", 2)
    (tmp_path / "a.txt").write_text("1\n2\n3\n4\n5\n")
    assert list(Text(path=tmp_path).open().shards) == [2, 2, 1]


def test_pieces_that_are_too_long_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(text_pieces, "PIECE_BYTES", 100)
    (tmp_path / "a.txt").write_text("short\n" + "x" * 200 + "\nshort\n")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "%s"}' % ("x" * 200))
    pq.write_table(pa.table({"text": ["x" * 200, "a"]}), tmp_path / "c.parquet")
    opened = Text(path=tmp_path, max_bad_share=0.5).open()
    assert [problem.partition(": ")[0] for problem in opened.problems] == [
        "a.txt:2",
        "b.jsonl:2",
        "c.parquet:1",
    ]
    assert ids(opened) == ["a.txt:1", "a.txt:3", "b.jsonl:1", "c.parquet:2"]


def test_packed_text_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "UNPACKED_BYTES", 2**20)
    (tmp_path / "bomb.txt.gz").write_bytes(zipped(bytes(5 * 2**20)))
    with pytest.raises(
        DataError, match=r"bomb.txt.gz: packed files with more than 1 MB of text.* with gunzip"
    ):
        Text(path=tmp_path).open()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_text_that_changes_or_goes_ends_the_run(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": ["one"]}), path)
    else:
        path.write_text("one" if name == "a.txt" else '{"text": "one"}')
    opened, gone = Text(path=path).open(), Text(path=path).open()
    assert opened[0].text == "one"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ChangedError, match=rf"{name}: changed since it was opened"):
        opened[0]
    path.unlink()
    with pytest.raises(ChangedError, match=rf"{name}: removed since it was opened"):
        gone[0]


def test_the_places_of_a_large_corpus_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_index, "INDEX_BYTES", 0)
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "a.jsonl"
    file.write_text('{"text": "one"}\n{}\n{"text": "two"}\n')
    os.utime(file, (1e9, 1e9))
    first = Text(path=file, max_bad_share=0.5).open()
    monkeypatch.setattr(text_index._Index, "fill", lambda self, new: pytest.fail("built again"))
    again = Text(path=file, max_bad_share=0.5).open()
    assert examples(again) == examples(first)
    assert (again.problems, again.fingerprint) == (first.problems, first.fingerprint)


def test_text_is_read_by_many_threads_and_forked_processes(tmp_path):
    pq.write_table(pa.table({"text": ["p1", "p2", "p3"]}), tmp_path / "a.parquet", row_group_size=1)
    for number in range(100):
        (tmp_path / f"{number:02d}.txt").write_text(f"line {number}\nmore\n")
    opened = Text(path=tmp_path).open()
    expected = examples(opened)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened.__getitem__, range(len(opened)))) == expected
    child = os.fork()
    if not child:
        os._exit(0 if examples(opened) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.txt", b"Once upon a time\n", {}),
        ("a.txt.gz", zipped(b"Once upon a time\n"), {}),
        ("a.jsonl", b'{"text": "a"}\n', {}),
        ("a.jsonl.gz", zipped(b'{"id": "7", "content": "a"}\n'), {"field": "content"}),
    ],
)
def test_text_is_guessed(tmp_path, name, data, found):
    (tmp_path / name).write_bytes(data)
    assert Text.guess(tmp_path / name) == (2, {"path": str(tmp_path / name), **found})
    assert Text.guess(tmp_path) == (2, {"path": str(tmp_path), **found})


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b"[]\n"),
        ("a.jsonl", b'{"n": 1}'),
        ("a.md", b"a"),
    ],
)
def test_other_files_are_not_guessed_as_text(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert Text.guess(tmp_path / name) is None
    assert Text.guess(tmp_path) is None


@pytest.mark.parametrize(("name", "data"), [("a.txt", b"\xff\xfe\n"), ("a.txt.gz", b"no")])
def test_text_that_is_broken_is_guessed_as_opening_tells_what_is_wrong(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert Text.guess(tmp_path / name) == (1, {"path": str(tmp_path / name)})
    assert Text.guess(tmp_path) == (1, {"path": str(tmp_path)})
    with pytest.raises(DataError):
        Text(path=tmp_path).open()
