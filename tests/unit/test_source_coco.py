import json

import named_layouts
import pytest
from source_files import examples, fill, ids, png

from beitctl.errors import DataError
from beitctl_plugins.sources.coco import Coco


def source(path, **table):
    return Coco(path=path, **({"split": "val2017", "max_bad_share": 1.0} | table))


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_pictures_come_with_all_their_captions(tmp_path):
    named_layouts.coco(tmp_path)
    opened = source(tmp_path).open()
    assert ids(opened) == [f"{number:012d}.jpg" for number in (1, 2, 3)]
    assert opened[1].captions == ("A picture 2", "Number 2")
    assert opened[1].image == tmp_path / "val2017" / "000000000002.jpg"
    assert (opened.problems, opened.lengths.tolist()) == ([], [9, 9, 9])


def test_pictures_may_lie_in_images(tmp_path):
    named_layouts.coco(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "images" / "val2017")
    assert len(source(tmp_path).open()) == 3


def test_pictures_without_captions_by_nature_are_read(tmp_path):
    fill(tmp_path, "unlabeled2017/1.jpg")
    (found,) = examples(source(tmp_path, split="unlabeled2017").open())
    assert (found.id, found.captions) == ("1.jpg", ())


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (
            lambda c: c["annotations"].append({"image_id": 9, "caption": "x"}),
            "annotations 7: no picture with the id 9",
        ),
        (
            lambda c: c["annotations"].append({"image_id": 1}),
            "annotations 7: no str 'caption' in {'image_id': 1}",
        ),
        (lambda c: c["annotations"].append(None), "annotations 7: no int 'image_id' in None"),
        (
            lambda c: [row.update(caption=" ") for row in c["annotations"] if row["image_id"] == 1],
            "000000000001.jpg: caption is not text",
        ),
        (lambda c: c["images"].append({"id": 9, "file_name": "9.jpg"}), "9.jpg: no picture 'val2017/9.jpg'"),
        (
            lambda c: c["images"].append({"id": 9, "file_name": "../9"}),
            "../9: its path leads out of the data set",
        ),
        (
            lambda c: c["images"][0].update(file_name="\ud800\n"),
            "\\ud800\\n: no picture 'val2017/\\ud800\\n'",
        ),
        (lambda c: c["annotations"][0].update(caption="\ud800"), "000000000001.jpg: not valid Unicode"),
        (lambda c: c["images"].append({"id": "a"}), "images 4: no str 'file_name' in {'id': 'a'}"),
    ],
)
def test_what_cannot_be_used_is_listed(tmp_path, edit, problem):
    change(named_layouts.coco(tmp_path), edit)
    opened = source(tmp_path).open()
    assert opened.problems[0].startswith(f"captions_val2017.json:{problem}")
    with pytest.raises(DataError, match="rows are unusable, more than max_bad_share"):
        source(tmp_path, max_bad_share=0.01).open()


def test_pictures_without_annotation_and_empty_ones_are_listed(tmp_path):
    named_layouts.coco(tmp_path)
    fill(tmp_path, "val2017/extra.jpg")
    (tmp_path / "val2017" / "000000000002.jpg").write_bytes(b"")
    opened = source(tmp_path).open()
    assert opened.problems == [
        "captions_val2017.json:000000000002.jpg: empty picture val2017/000000000002.jpg",
        "val2017/extra.jpg: nothing in the annotations names it",
    ]


@pytest.mark.parametrize(("split", "ends"), [("train", ["1", "2"]), ("val", ["3"]), ("test", ["4"])])
def test_karpathys_splits_are_read(tmp_path, split, ends):
    named_layouts.coco_karpathy(tmp_path)
    opened = source(tmp_path, karpathy=split).open()
    assert [id[-5] for id in ids(opened)] == ends
    assert opened[0].captions == (f"caption {ends[0]}", f"number {ends[0]}")


def test_karpathys_splits_find_the_pictures_of_2017(tmp_path):
    named_layouts.coco_karpathy(tmp_path)
    for number in (1, 2):
        fill(tmp_path, f"train2017/{number:012d}.jpg")
    for folder in ("train2014", "val2014"):
        (tmp_path / folder).rename(tmp_path / f"old_{folder}")
    opened = source(tmp_path, karpathy="train").open()
    assert [e.image.name for e in examples(opened)] == ["000000000001.jpg", "000000000002.jpg"]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b'{"images": 3}', b"[" * 100000])
def test_damaged_annotations_are_refused(tmp_path, data):
    named_layouts.coco(tmp_path).write_bytes(data)
    with pytest.raises(
        DataError, match=r"captions_val2017.json: (cannot be read|no list 'images').*download it"
    ):
        source(tmp_path).open()


def test_a_wrong_folder_is_refused_with_what_is_expected_and_found(tmp_path):
    fill(tmp_path, "a/1.png", "b.png")
    with pytest.raises(DataError) as caught:
        source(tmp_path).open()
    message = str(caught.value)
    assert (
        "not the folder of COCO: no val2017/ or images/val2017/; correct 'path'. Expected\n  annot" in message
    )
    assert message.endswith("found a/, b.png")
    with pytest.raises(DataError, match="not the folder of COCO: it is a file"):
        source(tmp_path / "b.png").open()
    with pytest.raises(DataError, match="no such file or folder"):
        source(tmp_path / "none").open()


def test_a_missing_annotation_file_is_refused(tmp_path):
    named_layouts.coco(tmp_path).unlink()
    with pytest.raises(DataError, match=r"no annotations/captions_val2017.json or captions_val2017.json"):
        source(tmp_path).open()


def test_the_fingerprint_follows_captions_and_pictures(tmp_path):
    for name in "abc":
        named_layouts.coco(tmp_path / name)
    change(tmp_path / "b" / "annotations" / "captions_val2017.json", lambda c: c["annotations"].pop())
    (tmp_path / "c" / "val2017" / "000000000001.jpg").write_bytes(png((1, 1, 1)))
    assert len({source(tmp_path / name).open().fingerprint for name in "abc"}) == 3
    named_layouts.coco(tmp_path / "d")
    assert source(tmp_path / "d").open().fingerprint == source(tmp_path / "a").open().fingerprint


def test_guess_knows_the_layout(tmp_path):
    named_layouts.coco(tmp_path / "a")
    named_layouts.coco_karpathy(tmp_path / "b")
    assert Coco.guess(tmp_path / "a") == (8, {"path": str(tmp_path / "a"), "split": "val2017"})
    assert Coco.guess(tmp_path / "b") == (8, {"path": str(tmp_path / "b"), "karpathy": "train"})
    assert Coco.guess(tmp_path) is None
    assert Coco.guess(tmp_path / "none") is None
