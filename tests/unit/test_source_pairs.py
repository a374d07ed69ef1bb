import pytest
from source_files import ROWS, examples, fill, ids, png, table

from beitctl.errors import DataError
from beitctl_plugins.sources.pairs import Pairs


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
    assert ids(opened) == ["row_00000001", "row_00000002"]
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
        ({"image": "1.png", "caption": ["a", None]}, "caption is not text: ['a', None]"),
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
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(.*\); replace it or correct 'path'"):
        Pairs(path=tmp_path / name).open()


def test_json_that_is_no_list_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"images": 1}')
    with pytest.raises(DataError, match=r"a.json: expected a list of objects, found {'images': 1}"):
        Pairs(path=tmp_path / "a.json").open()


def test_a_table_of_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "a.xml").write_text("")
    with pytest.raises(DataError, match=r"a.xml: expected a file that ends in .jsonl, .json, .csv, .parquet"):
        Pairs(path=tmp_path / "a.xml").open()
