import pickle

import pytest
from source_files import examples, fill, ids

from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources.image_folder import ImageFolder


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path, "a/1.png", "2.png", "3.png")


def described(folder, text, name="metadata.csv", **settings):
    (folder / name).write_text(text)
    return ImageFolder(path=folder, **settings).open()


def test_a_csv_table_gives_captions_and_labels(folder):
    opened = described(
        folder, 'file_name,caption,label\n3.png,"three, all\nin one",x\n2.png,two,y\na/1.png,one,x'
    )
    assert ids(opened) == ["2.png", "3.png", "a/1.png"]
    assert [(e.captions, e.label) for e in examples(opened)] == [
        (("two",), "y"),
        (("three, all in one",), "x"),
        (("one",), "x"),
    ]
    assert opened.problems == []
    assert opened.lengths.tolist() == [3, len("three, all in one"), 3]


def test_a_jsonl_table_gives_text_as_captions(folder):
    rows = '{"file_name": "2.png", "text": ["two", "zwei"]}\n{"file_name": "./3.png", "text": "three"}'
    opened = described(folder, rows, "metadata.jsonl")
    assert [e.captions for e in examples(opened)] == [("two", "zwei"), ("three",), ()]


def test_several_rows_of_one_picture_give_several_captions(folder):
    opened = described(folder, "file_name,text\n2.png,two\n3.png,three\n2.png,zwei\na/1.png,one")
    assert opened[0].captions == ("two", "zwei")


def test_rows_and_pictures_without_each_other_are_listed(folder):
    opened = described(folder, "file_name,caption\n2.png,two\n9.png,nine\n3.png, ")
    assert opened.problems == [
        "metadata.csv:3: no picture '9.png' in the folder",
        "metadata.csv:4: caption is not text: ' '",
        "a/1.png: no row in metadata.csv; kept as it is",
    ]
    assert [e.captions for e in examples(opened)] == [("two",), (), ()]


def test_a_label_of_the_table_counts_more_than_the_folder(folder):
    fill(folder, "b/4.png")
    opened = described(folder, "file_name,label\na/1.png,from table\nb/4.png,", labels="folders")
    assert [e.label for e in examples(opened)] == ["from table", "b"]


def test_other_columns_and_another_file_can_be_named(folder):
    table = "file_name\twhat\tkind\n2.png\ttwo\t7\n"
    opened = described(folder, table, "captions.tsv", metadata="captions.tsv", caption="what", label="kind")
    assert (opened[0].captions, opened[0].label) == (("two",), "7")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption": "what"}, r"metadata.csv: no column 'what'; it has caption, file_name"),
        ({"label": "kind"}, r"metadata.csv: no column 'kind'; it has caption, file_name"),
        ({"metadata": "other.csv"}, r"other.csv: no such file that ends in .jsonl, .json, .csv, .tsv"),
        ({"metadata": "a/1.png"}, r"1.png: no such file that ends in .jsonl, .json, .csv, .tsv; correct"),
    ],
)
def test_what_the_table_has_not_is_refused(folder, settings, message):
    with pytest.raises(DataError, match=message):
        described(folder, "file_name,caption\n2.png,two", **settings)


def test_two_tables_are_refused(folder):
    (folder / "metadata.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"both metadata.csv and metadata.jsonl; name one in 'metadata'"):
        described(folder, "file_name,caption\n2.png,two")


def test_a_named_table_of_something_else_is_refused(folder):
    with pytest.raises(DataError, match=r"metadata.csv: no column 'file_name'; it has key, value"):
        described(folder, "key,value\n1,2", metadata="metadata.csv")


def test_a_table_of_something_else_is_listed_and_not_used(folder):
    opened = described(folder, "key,value\n1,2")
    assert opened.problems == ["metadata.csv: not used, as it has no column 'file_name'"]
    assert len(opened) == 3


def test_the_table_that_is_used_is_not_ignored(folder):
    fill(folder, "other.csv")
    assert described(folder, "file_name,caption\n2.png,two").ignored == {".csv": 1}


def test_the_table_is_part_of_the_fingerprint(folder):
    first = described(folder, "file_name,caption\n2.png,two").fingerprint
    assert described(folder, "file_name,caption\n2.png,owt").fingerprint != first


def test_a_table_that_changes_ends_the_run(folder):
    opened = described(folder, "file_name,caption\n2.png,two")
    (folder / "metadata.csv").write_text("file_name,caption\n2.png,two and more")
    with pytest.raises(
        ChangedError, match=r"metadata.csv: changed since it was opened \(27 bytes then, 36 now\)"
    ):
        opened[0]


def test_a_folder_with_a_table_travels_to_worker_processes(folder):
    opened = described(folder, "file_name,caption\n2.png,two")
    assert opened[0].captions == ("two",)
    assert examples(pickle.loads(pickle.dumps(opened))) == examples(opened)
