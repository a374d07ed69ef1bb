import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from source_files import ROWS, examples, fill, ids, png, table

from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources.pairs import Pairs
from beitctl_plugins.sources.reading import rows


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path, "1.png", "2.png", "3.png")


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_pairs_are_read_from_json(folder, kind):
    opened = Pairs(path=table(folder, ROWS, kind), label="class").open()
    assert ids(opened) == ["1.png", "2.png", "3.png"]
    assert opened[1].captions == ("two", "zwei drei")
    assert (opened[2].image, opened[2].label) == (folder / "3.png", "a")


def test_pairs_are_read_from_csv(folder):
    (folder / "pairs.csv").write_text('\ufefffile,text\n1.png,"a, b"\n2.png,c\n', encoding="utf-8")
    opened = Pairs(path=folder / "pairs.csv", image="file", caption="text").open()
    assert [e.captions for e in examples(opened)] == [("a, b",), ("c",)]


def test_pictures_may_be_bytes_in_parquet(folder):
    rows = [{"image": png(), "caption": "one"}, {"image": png((0, 0, 9)), "caption": "two"}]
    opened = Pairs(path=table(folder, rows, "parquet")).open()
    assert ids(opened) == ["pairs.parquet:1", "pairs.parquet:2"]
    assert opened[1].image == png((0, 0, 9))


def test_pictures_may_be_structs_of_bytes_and_path(folder):
    rows = [
        {"image": {"bytes": png(), "path": None}, "caption": "one"},
        {"image": {"bytes": None, "path": "2.png"}, "caption": "two"},
    ]
    opened = Pairs(path=table(folder, rows, "parquet")).open()
    assert [e.image for e in examples(opened)] == [png(), folder / "2.png"]


def test_rows_of_one_picture_become_one_example(folder):
    rows = [
        {"image": "1.png", "caption": "one"},
        {"image": "2.png", "caption": "x"},
        {"image": "1.png", "caption": "uno"},
    ]
    opened = Pairs(path=table(folder, rows)).open()
    assert [e.captions for e in examples(opened)] == [("one", "uno"), ("x",)]


def test_where_chooses_rows(folder):
    assert ids(Pairs(path=table(folder, ROWS), where={"split": "test"}).open()) == ["3.png"]


def test_where_without_a_match_is_refused(folder):
    with pytest.raises(DataError, match=r"no row with split = 'dev'; correct 'path' or 'where'"):
        Pairs(path=table(folder, ROWS), where={"split": "dev"}).open()


def test_an_empty_file_of_pairs_is_refused(folder):
    with pytest.raises(DataError, match=r"pairs.jsonl: no row; correct 'path'"):
        Pairs(path=table(folder, [])).open()


def test_pictures_may_lie_in_another_folder(folder, tmp_path):
    (tmp_path / "tables").mkdir()
    assert len(Pairs(path=table(tmp_path / "tables", ROWS), root=str(folder)).open()) == 3


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"image": "1.png", "caption": 7}, "caption is not text: 7"),
        ({"image": "1.png", "caption": " "}, "caption is not text: ' '"),
        ({"image": "1.png", "caption": []}, "caption is not text: []"),
        ({"image": "1.png", "caption": [" ", None]}, "caption is not text: [' ', None]"),
        ({"image": "1.png", "caption": ["a", 3]}, "caption is not text: ['a', 3]"),
        ({"image": "1.png", "caption": None}, "no 'caption'; the row has image, caption"),
        ({"image": "1.png", "text": "a"}, "no 'caption'; the row has image, text"),
        ({"image": "9.png", "caption": "a"}, "no picture /"),
        ({"image": "", "caption": "a"}, "no picture /"),
        ({"image": "\0", "caption": "a"}, "no picture /"),
        ({"image": 4, "caption": "a"}, "picture is neither a path nor bytes: 4"),
        ([1], "expected an object with columns, found [1]"),
        ('{"image": "1.png", ', "not a JSON object (Expecting property name"),
    ],
)
def test_an_unusable_row_is_left_out_and_listed(folder, row, problem):
    opened = Pairs(path=table(folder, [ROWS[0], row, ROWS[1]]), max_bad_share=0.5).open()
    assert ids(opened) == ["1.png", "2.png"]
    assert len(opened.problems) == 1
    assert opened.problems[0].startswith(f"pairs.jsonl:2: {problem}")


def test_a_row_without_the_label_is_left_out(folder):
    opened = Pairs(
        path=table(folder, [ROWS[0], ROWS[1] | {"class": None}]), label="class", max_bad_share=0.5
    ).open()
    assert opened.problems == ["pairs.jsonl:2: no 'class'; the row has image, caption, split, class"]


def test_too_many_unusable_rows_are_refused(folder):
    with pytest.raises(
        DataError, match=r"1 of 3 rows are unusable, more than max_bad_share \(0.01\) allows.*\n  pairs"
    ):
        Pairs(path=table(folder, [*ROWS[:2], {"image": "1.png"}])).open()


def test_a_hundredth_of_unusable_rows_is_survived(folder):
    assert len(Pairs(path=table(folder, [ROWS[0]] * 99 + [{}])).open()) == 1


def test_pairs_of_which_none_is_usable_are_refused(folder):
    with pytest.raises(
        DataError, match=r"nothing usable in it; 7 rows were left out:(\n  pairs.*){5}\n  \.\.\."
    ):
        Pairs(path=table(folder, [{"image": "1.png"}] * 7), max_bad_share=1).open()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b"{"),
        ("a.json", b"\xff\xfe"),
        ("a.csv", b"image,caption\n\xff,a"),
        ("a.parquet", b"PAR1"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*\); replace "):
        Pairs(path=tmp_path / name).open()


def test_json_that_is_no_list_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"images": 1}')
    with pytest.raises(DataError, match=r"a.json: expected a list of objects, found {'images': 1}"):
        Pairs(path=tmp_path / "a.json").open()


def test_a_table_of_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "a.xml").write_text("")
    with pytest.raises(DataError, match=r"a.xml: expected a file that ends in .jsonl, .json, .csv, .parquet"):
        Pairs(path=tmp_path / "a.xml").open()


def test_pairs_are_read_from_tsv(folder):
    (folder / "pairs.tsv").write_text("image\tcaption\n1.png\ta, b\n")
    assert Pairs(path=folder / "pairs.tsv").open()[0].captions == ("a, b",)


def test_cells_of_csv_may_hold_lines_and_quotes(folder):
    (folder / "a.csv").write_bytes(b'image,caption\r\n1.png,"one\r\n""two"""\r\n\r\n2.png,x\r\n')
    opened = Pairs(path=folder / "a.csv").open()
    assert [e.captions for e in examples(opened)] == [('one "two"',), ("x",)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('2.png,a "cat", sits', "3 cells for 2 columns; put quotes around cells with a comma"),
        (
            '2.png,"a "big" cat"',
            "wrong quoting (',' expected after '\"'); write quotes inside of cells twice",
        ),
        ("2.png", "no 'caption'; the row has image"),
        ("2.png,", "caption is not text: ''"),
        ("2.png,a\0b", "holds a NUL byte; the file must be UTF-8"),
    ],
)
def test_a_wrong_row_of_csv_is_left_out_with_its_line(folder, row, problem):
    (folder / "a.csv").write_text(f"image,caption\n1.png,one\n{row}\n3.png,three\n")
    opened = Pairs(path=folder / "a.csv", max_bad_share=0.5).open()
    assert ids(opened) == ["1.png", "3.png"]
    assert opened.problems == [f"a.csv:3: {problem}"]


def test_a_quote_that_is_never_closed_is_refused_with_its_line(folder):
    (folder / "a.csv").write_text('image,caption\n1.png,one\n2.png,"two\n3.png,three\n')
    with pytest.raises(DataError, match=r"a.csv:3: a quote that opens in this row is never closed; close it"):
        Pairs(path=folder / "a.csv").open()


def test_a_quote_that_swallows_a_large_file_is_refused_early(folder, monkeypatch):
    monkeypatch.setattr(rows, "ROW_BYTES", 1000)
    (folder / "a.csv").write_text('image,caption\n1.png,one\n2.png,"two\n' + "3.png,three\n" * 1000)
    with pytest.raises(DataError, match=r"a.csv:3: the row that begins here is longer than .* is not closed"):
        Pairs(path=folder / "a.csv").open()


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_row_of_ten_megabytes_is_left_out(folder, name):
    row, head = (
        ('{"image": "1.png", "caption": "%s"}', "\n")
        if name == "a.jsonl"
        else ("1.png,%s", "image,caption\n")
    )
    found = [row % "one", row % ("x" * 11 * 2**20), row % "one"]
    (folder / name).write_text(head + "\n".join(found))
    opened = Pairs(path=folder / name, max_bad_share=0.5).open()
    assert opened.problems == [f"{name}:3: row is longer than 10 MB"]
    assert opened[0].captions == ("one", "one")


def test_a_caption_of_more_than_a_megabyte_is_left_out(folder):
    row = {"image": "2.png", "caption": "é" * 600_000}
    opened = Pairs(path=table(folder, [ROWS[0], row]), max_bad_share=0.5).open()
    assert opened.problems == ["pairs.jsonl:2: caption is longer than 1 MB (600,000 characters)"]


def test_a_caption_that_is_no_unicode_is_left_out(folder):
    row = '{"image": "2.png", "caption": "half \\ud800"}'
    opened = Pairs(path=table(folder, [ROWS[0], row]), max_bad_share=0.5).open()
    assert opened.problems == ["pairs.jsonl:2: not valid Unicode: 'half \\ud800'"]


def test_an_empty_picture_is_left_out(folder):
    (folder / "2.png").write_bytes(b"")
    opened = Pairs(path=table(folder, ROWS), max_bad_share=0.5).open()
    assert opened.problems == [f"pairs.jsonl:2: empty picture {folder / '2.png'}"]


def test_pictures_are_not_looked_for_if_so_set(folder):
    opened = Pairs(
        path=table(folder, [*ROWS, {"image": "9.png", "caption": "nine"}]), check_files=False
    ).open()
    assert ids(opened) == ["1.png", "2.png", "3.png", "9.png"]


def test_paths_in_parquet_are_merged(folder):
    found = [{"image": "1.png", "caption": "one"}, {"image": "1.png", "caption": "uno"}]
    opened = Pairs(path=table(folder, found, "parquet")).open()
    assert [e.captions for e in examples(opened)] == [("one", "uno")]


def test_parquet_without_the_column_is_refused(folder):
    path = table(folder, [{"image": "1.png", "text": "one"}], "parquet")
    with pytest.raises(DataError, match=r"pairs.parquet: no column 'caption'; it has image, text"):
        Pairs(path=path).open()


def test_lengths_are_the_bytes_of_a_caption(folder):
    found = [{"image": "1.png", "caption": ["four", "é"]}, {"image": "2.png", "caption": "seven"}]
    assert Pairs(path=table(folder, found)).open().lengths.tolist() == [3, 5]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_table_that_changes_or_goes_ends_the_run(folder, kind):
    path = folder / f"pairs.{kind}"
    path.write_text('{"image": "1.png", "caption": "one"}' if kind == "jsonl" else "image,caption\n1.png,one")
    opened, gone = Pairs(path=path).open(), Pairs(path=path).open()
    assert opened[0].captions == ("one",)
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ChangedError, match=rf"pairs.{kind}: changed since it was opened"):
        opened[0]
    path.unlink()
    with pytest.raises(ChangedError, match=rf"pairs.{kind}: removed since it was opened; put it back"):
        gone[0]


def test_rows_are_read_by_many_threads_and_forked_processes(folder):
    opened = Pairs(path=table(folder, ROWS)).open()
    expected = examples(opened) * 30
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened.__getitem__, list(range(3)) * 30)) == expected
    child = os.fork()
    if not child:
        os._exit(0 if examples(opened) == expected[:3] else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        (
            "a.jsonl",
            '{"image_path": "1.png", "captions": ["a"]}',
            {"image": "image_path", "caption": "captions"},
        ),
        ("a.json", '[{"file_name": "1", "caption": "a"}, {', {"image": "file_name", "caption": "caption"}),
        ("a.csv", "filepath,title\n1.png,a", {"image": "filepath", "caption": "title"}),
        ("a.tsv", "URL\ttext\n1\ta", {"image": "URL", "caption": "text"}),
        ("a.csv", "image,caption,label\n1,a,x", {"image": "image", "caption": "caption", "label": "label"}),
    ],
)
def test_tables_of_pairs_are_guessed(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    assert Pairs.guess(tmp_path / name) == (5, {"path": str(tmp_path / name), **found})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"text": "a"}'),
        ("a.json", '{"images": []}'),
        ("a.json", ""),
        ("a.md", ""),
    ],
)
def test_other_tables_are_not_guessed(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="latin-1")
    assert Pairs.guess(tmp_path / name) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", ""),
        ("a.csv", "\xff\0"),
        ("a.tsv", "a\tb\n1\t2"),
        ("a.jsonl", "{"),
        ("a.jsonl", '{"image": "1"}'),
    ],
)
def test_tables_that_are_broken_are_guessed_as_opening_tells_what_is_wrong(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="latin-1")
    assert Pairs.guess(tmp_path / name) == (1, {"path": str(tmp_path / name)})
    with pytest.raises(DataError):
        Pairs(path=tmp_path / name).open()
