import os

import pytest
from source_files import examples, fill, ids, png

from beitctl.data.arrays import Texts
from beitctl.errors import DataError
from beitctl.report import bars
from beitctl_plugins.sources.image_folder import ImageFolder
from beitctl_plugins.sources.pairs import Pairs
from beitctl_plugins.sources.text import Text


def test_pictures_are_found_at_any_depth_in_order(tmp_path):
    fill(tmp_path, "b/2.JPG", "a/x/y/1.png", "c.webp", "a/notes.txt", ".hidden.png", ".cache/1.png")
    opened = ImageFolder(path=tmp_path).open()
    assert ids(opened) == ["a/x/y/1.png", "b/2.JPG", "c.webp"]
    assert opened[1].image == tmp_path / "b/2.JPG"
    assert opened.problems == []


def test_the_first_folder_is_the_label(tmp_path):
    opened = ImageFolder(
        path=fill(tmp_path, "cat/1.png", "dog/deep/2.png", "stray.png"), labels="folders"
    ).open()
    assert [e.label for e in examples(opened)] == ["cat", "dog"]
    assert opened.problems == ["stray.png: lies in no class folder"]


def test_without_labels_there_is_none(tmp_path):
    assert ImageFolder(path=fill(tmp_path, "cat/1.png")).open()[0].label is None


def test_only_the_given_extensions_are_read(tmp_path):
    fill(tmp_path, "1.png", "2.jpg", "3.xpng")
    assert ids(ImageFolder(path=tmp_path, extensions=[".PNG"]).open()) == ["1.png"]


def test_a_loop_of_links_is_left_out_and_counted(tmp_path):
    fill(tmp_path, "a/1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    opened = ImageFolder(path=tmp_path).open()
    assert ids(opened) == ["a/1.png"]
    assert opened.problems == ["a/up: link to a folder that it lies in"]


def test_linked_folders_are_read(tmp_path):
    fill(tmp_path, "elsewhere/1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert ids(ImageFolder(path=tmp_path / "root").open()) == ["link/1.png"]


def test_empty_files_and_broken_links_are_counted(tmp_path):
    fill(tmp_path, "ok.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    opened = ImageFolder(path=tmp_path).open()
    assert ids(opened) == ["ok.png"]
    assert opened.problems == [
        "empty.png: empty file",
        "gone.png: cannot be read (No such file or directory)",
    ]


def test_a_name_that_is_not_utf8_is_counted(tmp_path):
    fill(tmp_path, "ok.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(png())
    opened = ImageFolder(path=tmp_path).open()
    assert ids(opened) == ["ok.png"]
    assert opened.problems == ["caf\\xe9.png: name is not UTF-8"]


def test_unreadable_folders_and_files_are_counted(tmp_path, monkeypatch):
    fill(tmp_path, "open/1.png", "closed/2.png", "open/secret.png")
    scan, access = os.scandir, os.access

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: "secret" not in str(path) and access(path, mode))
    opened = ImageFolder(path=tmp_path).open()
    assert ids(opened) == ["open/1.png"]
    assert opened.problems == [
        "closed: folder cannot be read (Permission denied)",
        "open/secret.png: cannot be read (Permission denied)",
    ]


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "empty.png").write_bytes(b"")
    expected = r"no picture in it or below \(2 folders searched for files .*\n  empty.png: empty file"
    with pytest.raises(DataError, match=expected):
        ImageFolder(path=tmp_path).open()


@pytest.mark.parametrize("source", [ImageFolder, Pairs, Text])
def test_a_missing_path_is_refused(source, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; correct 'path' in the recipe"):
        source(path=tmp_path / "nowhere").open()


def test_a_file_is_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"1.png: a file, but 'path' must be a folder of pictures"):
        ImageFolder(path=fill(tmp_path, "1.png") / "1.png").open()


def test_a_link_to_itself_is_left_out_and_counted(tmp_path):
    fill(tmp_path, "ok.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert ImageFolder(path=tmp_path).open().problems == [
        "loop.png: cannot be read (Too many levels of symbolic links)"
    ]


def test_links_that_cross_do_not_multiply(tmp_path):
    for name in "abcdefgh":
        fill(tmp_path, f"{name}/1.png")
    for name in "abcdefgh":
        for other in "abcdefgh":
            (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    opened = ImageFolder(path=tmp_path).open()
    assert len(opened) == 8 + 8
    assert "h/to-g: link to a folder that another link leads to" in opened.problems


def test_a_pipe_is_left_out_and_never_read(tmp_path):
    fill(tmp_path, "ok.png")
    os.mkfifo(tmp_path / "pipe.png")
    opened = ImageFolder(path=tmp_path).open()
    assert opened.problems == ["pipe.png: neither a file nor a folder"]


def test_names_with_newlines_and_unicode_are_read(tmp_path):
    names = ["a\nb.png", "čeština/ñ.png", "日本 語.png", "\U0001f600.png"]
    fill(tmp_path, *names)
    opened = ImageFolder(path=tmp_path).open()
    assert ids(opened) == sorted(names)
    assert all(example.image.read_bytes() for example in examples(opened))


def test_a_problem_stays_on_one_line(tmp_path):
    fill(tmp_path, "ok.png")
    (tmp_path / "a\nb.png").touch()
    assert ImageFolder(path=tmp_path).open().problems == ["a\\nb.png: empty file"]


def test_ignored_files_are_counted_by_ending(tmp_path):
    fill(tmp_path, "1.png", "2.HEIC", "a/3.heic", "4.svg", "5.pdf", "README", "x.000123", ".DS_Store")
    assert ImageFolder(path=tmp_path).open().ignored == {
        ".heic": 2,
        ".svg": 1,
        ".pdf": 1,
        "": 2,
        "(hidden)": 1,
    }


def test_names_are_not_kept_as_objects(tmp_path):
    assert isinstance(ImageFolder(path=fill(tmp_path, "1.png")).open().rows, Texts)


def test_a_folder_of_pictures_is_guessed(tmp_path):
    fill(tmp_path, "a/b/1.png", "2.png")
    assert ImageFolder.guess(tmp_path) == (2, {"path": str(tmp_path)})


def test_class_folders_are_guessed(tmp_path):
    fill(tmp_path, "cat/1.png", "dog/x/2.png")
    assert ImageFolder.guess(tmp_path) == (3, {"path": str(tmp_path), "labels": "folders"})


def test_folders_of_splits_are_no_classes(tmp_path):
    fill(tmp_path, "train/1.png", "test/2.png")
    assert ImageFolder.guess(tmp_path) == (2, {"path": str(tmp_path)})


def test_a_folder_with_metadata_is_guessed(tmp_path):
    fill(tmp_path, "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a"}')
    assert ImageFolder.guess(tmp_path) == (5, {"path": str(tmp_path)})


def test_folders_without_pictures_and_files_are_not_guessed(tmp_path):
    assert ImageFolder.guess(tmp_path) is None
    assert ImageFolder.guess(fill(tmp_path, "1.png") / "1.png") is None


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_search_counts_on_a_terminal_only(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(bars, "PATIENCE", 0)
    monkeypatch.setattr(bars, "on_terminal", lambda: terminal)
    ImageFolder(path=fill(tmp_path, "1.png")).open()
    out, err = capsys.readouterr()
    assert out == ""
    assert ("files in" in err) == terminal
