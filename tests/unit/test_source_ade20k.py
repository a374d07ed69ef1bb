import named_layouts
import pytest
from source_files import fill, ids

from beitctl.errors import DataError
from beitctl_plugins.sources.ade20k import ADE20K


def source(path, **table):
    return ADE20K(path=path, **({"max_bad_share": 1.0} | table))


@pytest.mark.parametrize("inner", ["", "ADEChallengeData2016"])
def test_pictures_come_with_classes_of_pixels_and_scenes(tmp_path, inner):
    root = named_layouts.ade20k(tmp_path)
    opened = source(tmp_path / inner).open()
    assert ids(opened) == [f"ADE_train_0000000{n}.jpg" for n in (1, 2, 3)]
    assert opened[1].image == root / "images" / "training" / "ADE_train_00000002.jpg"
    assert opened[1].segmentation == root / "annotations" / "training" / "ADE_train_00000002.png"
    assert (opened[1].label, opened.problems) == ("scene_2", [])
    assert len(source(tmp_path / inner, split="validation").open()) == 2


def test_scenes_may_be_missing(tmp_path):
    (named_layouts.ade20k(tmp_path) / "sceneCategories.txt").unlink()
    assert source(tmp_path).open()[0].label is None


def test_pictures_and_annotations_without_each_other_are_listed(tmp_path):
    root = named_layouts.ade20k(tmp_path)
    fill(root, "images/training/a.jpg", "images/training/c.jpg")
    fill(root, "annotations/training/b.png", "annotations/training/c.png")
    assert source(tmp_path).open().problems == [
        "images/training/a.jpg: no picture 'annotations/training/a.png'",
        "images/training/c.jpg: no scene in sceneCategories.txt",
        "annotations/training/b.png: nothing in the annotations names it",
    ]


def test_a_line_without_a_scene_is_refused(tmp_path):
    (named_layouts.ade20k(tmp_path) / "sceneCategories.txt").write_text("ADE_train_00000001 a\nx\n")
    with pytest.raises(DataError, match=r"sceneCategories.txt:2: expected a name and a scene, found 'x'"):
        source(tmp_path).open()


def test_a_wrong_folder_is_refused(tmp_path):
    fill(tmp_path, "images/1.png")
    with pytest.raises(DataError, match=r"not the folder of ADE20K: no images/training/(.|\n)*found images/"):
        source(tmp_path).open()


def test_guess_knows_the_layout(tmp_path):
    named_layouts.ade20k(tmp_path)
    assert ADE20K.guess(tmp_path) == (8, {"path": str(tmp_path), "split": "training"})
    assert ADE20K.guess(tmp_path / "images") is None
