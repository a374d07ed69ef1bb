import pytest
from source_files import examples, fill, ids

from beitctl.errors import DataError
from beitctl_plugins.sources.path_list import PathList


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path, "cat/1.png", "dog/2.png", "3 .png")


def listed(folder, text, **settings):
    (folder / "list.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return PathList(path=folder / "list.txt", **settings).open()


def test_the_listed_pictures_are_read_in_their_order(folder):
    opened = listed(folder, "\ufeff# a comment\ndog/2.png\r\n\n  \n3 .png\ncat/1.png")
    assert ids(opened) == ["dog/2.png", "3 .png", "cat/1.png"]
    assert opened[0].image == folder / "dog/2.png"
    assert opened[0].label is None


def test_paths_may_be_absolute_or_start_elsewhere(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("lists")
    (other / "list.txt").write_text(f"{folder}/cat/1.png\ndog/2.png\n")
    opened = PathList(path=other / "list.txt", root=str(folder)).open()
    assert [e.image for e in examples(opened)] == [folder / "cat/1.png", folder / "dog/2.png"]


def test_the_class_stands_behind_a_tab(folder):
    opened = listed(folder, "cat/1.png\ta cat\ndog/2.png\t dog \n", labels="column")
    assert [e.label for e in examples(opened)] == ["a cat", "dog"]


def test_the_class_is_the_folder_of_the_picture(folder):
    opened = listed(folder, "cat/1.png\tignored\n3 .png", labels="folders")
    assert [e.label for e in examples(opened)] == ["cat", folder.name]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"9.png", "no picture {folder}/9.png"),
        (b"cat", "no picture {folder}/cat"),
        (b"a\0b.png", "no picture {folder}/a\\x00b.png"),
        (b"caf\xe9.png", "not UTF-8: b'caf\\xe9.png'"),
        (b"cat/1.png", "listed before: 'cat/1.png'"),
        (b"x" * 70_000, "too long for a path"),
    ],
)
def test_an_unusable_line_is_left_out_and_listed(folder, line, problem):
    opened = listed(folder, b"cat/1.png\n" + line + b"\ndog/2.png", max_bad_share=0.5)
    assert ids(opened) == ["cat/1.png", "dog/2.png"]
    assert opened.problems == [f"list.txt:2: {problem.format(folder=folder)}"]


def test_a_line_without_its_class_is_left_out(folder):
    opened = listed(folder, "cat/1.png\tcat\ndog/2.png\n", labels="column", max_bad_share=0.5)
    assert opened.problems == ["list.txt:2: no class behind the path and a tab: 'dog/2.png'"]


def test_too_many_missing_pictures_are_refused(folder):
    with pytest.raises(DataError, match=r"1 of 2 rows are unusable, more than max_bad_share"):
        listed(folder, "cat/1.png\n9.png")


@pytest.mark.parametrize("text", ["", "\n# nothing\n"])
def test_an_empty_list_is_refused(folder, text):
    with pytest.raises(DataError, match=r"list.txt: no path in it; correct 'path' in the recipe"):
        listed(folder, text)


def test_a_folder_is_no_list(folder):
    with pytest.raises(DataError, match=r"a folder, but 'path' must be a text file with one path a line"):
        PathList(path=folder).open()


def test_a_missing_list_is_refused(folder):
    with pytest.raises(DataError, match=r"nowhere.txt: no such file or folder"):
        PathList(path=folder / "nowhere.txt").open()


def test_labels_and_contents_are_part_of_the_fingerprint(folder):
    text = "cat/1.png\tcat\ndog/2.png\tdog\n"
    found = [
        listed(folder, text),
        listed(folder, text, labels="column"),
        listed(folder, text.replace("\tdog", "\tcat"), labels="column"),
    ]
    (folder / "cat/1.png").write_bytes(b"other")
    found.append(listed(folder, text))
    assert len({opened.fingerprint for opened in found}) == 4


def test_the_end_of_a_list_is_an_index_error(folder):
    opened = listed(folder, "cat/1.png")
    with pytest.raises(IndexError):
        opened[1]


def test_lists_of_pictures_are_guessed(folder):
    path = folder / "list.txt"
    path.write_text("# all\ncat/1.png\ndog/2.png\n")
    assert PathList.guess(path) == (4, {"path": str(path)})
    path.write_text("cat/1.png\tcat\ndog/2.png\tdog\n")
    assert PathList.guess(path) == (4, {"path": str(path), "labels": "column"})


@pytest.mark.parametrize("text", [b"", b"Once upon a time\ncat/1.png", b"\xff\xfe"])
def test_other_texts_are_not_guessed(folder, text):
    (folder / "list.txt").write_bytes(text)
    assert PathList.guess(folder / "list.txt") is None
    assert PathList.guess(folder) is None
