import os

import pytest
from source_files import examples, fill, ids, png

from beitctl.errors import DataError
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
