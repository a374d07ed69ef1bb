import named_layouts
import pytest
from source_files import fill, ids

from beitctl.errors import DataError
from beitctl_plugins.sources.flickr30k import Flickr30k


def source(path, **table):
    return Flickr30k(path=path, **({"max_bad_share": 1.0} | table))


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["1000092795.jpg"]),
        ("test", ["1000268201.jpg"]),
        ("all", ["1000092795.jpg", "10002456.jpg", "1000268201.jpg"]),
    ],
)
def test_karpathys_splits_are_read(tmp_path, split, names):
    named_layouts.flickr30k(tmp_path)
    opened = source(tmp_path, split=split).open()
    assert ids(opened) == names
    assert opened[0].captions == (f"First {names[0]}", f"Second {names[0]}")
    assert opened[0].image == tmp_path / "flickr30k-images" / names[0]
    assert not opened.problems


def test_the_original_captions_are_read(tmp_path):
    named_layouts.flickr30k(tmp_path, tokens=True)
    opened = source(tmp_path, split="all").open()
    assert ids(opened) == ["1000092795.jpg", "10002456.jpg", "1000268201.jpg"]
    assert opened[0].captions == ("Caption 0 of 1000092795.jpg .", "Caption 1 of 1000092795.jpg .")


def test_the_original_captions_have_no_splits(tmp_path):
    named_layouts.flickr30k(tmp_path, tokens=True)
    with pytest.raises(DataError, match=r"no dataset_flickr30k.json; correct 'path'. Expected"):
        source(tmp_path).open()


def test_lines_and_pictures_without_each_other_are_listed(tmp_path):
    path = named_layouts.flickr30k(tmp_path, tokens=True)
    path.write_text(path.read_text() + "9.jpg#0\tno picture\nnonsense\n")
    fill(tmp_path, "flickr30k-images/extra.jpg")
    assert source(tmp_path, split="all").open().problems == [
        "results_20130124.token:8: expected name#number, a tab and a caption",
        "results_20130124.token:9.jpg: no picture 'flickr30k-images/9.jpg'",
        "flickr30k-images/extra.jpg: nothing in the annotations names it",
    ]


def test_captions_that_are_not_utf_8_are_refused(tmp_path):
    named_layouts.flickr30k(tmp_path, tokens=True).write_bytes(b"a.jpg#0\t\xff\n")
    with pytest.raises(DataError, match=r"results_20130124.token: cannot be read \(.*utf-8"):
        source(tmp_path, split="all").open()


def test_guess_knows_the_layout(tmp_path):
    named_layouts.flickr30k(tmp_path / "a")
    named_layouts.flickr30k(tmp_path / "b", tokens=True)
    assert Flickr30k.guess(tmp_path / "a") == (8, {"path": str(tmp_path / "a"), "split": "train"})
    assert Flickr30k.guess(tmp_path / "b") == (8, {"path": str(tmp_path / "b"), "split": "all"})
    assert Flickr30k.guess(tmp_path) is None
