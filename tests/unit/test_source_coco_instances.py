"""COCO instances."""

import json

import pytest
from named_layouts import dump
from source_files import fill, ids

from beitctl.api import Object
from beitctl.errors import DataError
from beitctl_plugins.sources.coco_instances import CocoInstances

FILE = "instances_val2017.json"
POLYGON = [[1.0, 1, 3, 1, 3, 3]]
RLE = {"size": [4, 4], "counts": [4, 8, 4]}


def thing(id, image=1, category=18, box=(1, 1, 2, 2), mask=POLYGON, **more):
    return {
        "id": id, "image_id": image, "category_id": category, "bbox": list(box), "area": 4.0,
        "segmentation": mask, "iscrowd": 0, **more,
    }  # fmt: skip


def write(root, *things, pictures=3, **changed):
    names = [f"{number:012d}.jpg" for number in range(1, pictures + 1)]
    fill(root, *(f"val2017/{name}" for name in names))
    images = [{"id": n, "file_name": name, "width": 4, "height": 4} for n, name in enumerate(names, 1)]
    categories = [{"id": 18, "name": "dog", "supercategory": "animal"}, {"id": 1, "name": "person"}]
    content = {"info": {}, "images": images, "annotations": list(things), "categories": categories}
    dump(root / "annotations" / FILE, content | changed)
    return root


def source(path, **table):
    return CocoInstances(path=path, **({"split": "val2017", "max_bad_share": 1.0} | table))


def test_pictures_come_with_their_things(tmp_path):
    crowd = thing(2, category=1, box=(0, 1, 4, 2), mask=RLE, iscrowd=1)
    opened = source(write(tmp_path, thing(1), crowd, thing(3, image=3))).open()
    assert ids(opened) == ["000000000001.jpg", "000000000002.jpg", "000000000003.jpg"]
    assert opened[0].objects == (
        Object("dog", (1.0, 1.0, 2.0, 2.0), POLYGON),
        Object("person", (0.0, 1.0, 4.0, 2.0), RLE, crowd=True),
    )
    assert opened[0].image == tmp_path / "val2017" / "000000000001.jpg"
    assert (opened.classes, opened.problems) == (("person", "dog"), [])
    assert [len(opened.objects(n)) for n in range(3)] == [2, 0, 1]
    assert opened.notes == ("1 pictures show no thing of the classes; they are kept",)


def test_boxes_that_reach_out_are_clipped_and_counted(tmp_path):
    opened = source(write(tmp_path, thing(1, box=(-1, 2, 3, 8)), thing(2, box=(0, 0, 4.005, 4)))).open()
    assert [found.box for found in opened[0].objects] == [(0.0, 2.0, 2.0, 2.0), (0.0, 0.0, 4.005, 4.0)]
    assert "1 boxes were clipped" in opened.notes
    assert opened.problems == []


def test_what_cannot_be_used_is_named(tmp_path):
    wrong = [
        (thing(1), "another annotation has its id, 1"),
        (thing(2, image=9), "no picture with the id 9"),
        (thing(3, category=90), "no category with the id 90"),
        (thing(4, box=(1, 1, 0, 2)), "the box [1, 1, 0, 2] is empty"),
        (thing(5, box=(5, 1, 2, 2)), "the box [5, 1, 2, 2] lies outside 000000000001.jpg (4 x 4)"),
        (thing(6, box=(1, 1, 2)), "bbox: expected left, top, width and height, found [1, 1, 2]"),
        (thing(7, mask={"size": [4, 5], "counts": [20]}), "its mask is of the size [4, 5], not [4, 4]"),
        (thing(8, mask={"size": [4, 4], "counts": [3]}), "its mask has 3 pixels, not 16"),
        (thing(9, mask=[[1, 2]]), "segmentation: expected polygons or run lengths, found [[1, 2]]"),
        (thing(10, iscrowd=2), "iscrowd: expected 0 or 1, found 2"),
        ("text", "no int 'id' in 'text'"),
    ]
    root = write(tmp_path, thing(1), *(row for row, _ in wrong))
    (root / "val2017" / "000000000003.jpg").unlink()
    fill(root, "val2017/extra.jpg")
    opened = source(root).open()
    assert opened.problems == [
        *(f"{FILE}:annotations {number}: {why}" for number, (_, why) in enumerate(wrong, 2)),
        f"{FILE}:000000000003.jpg: no picture 'val2017/000000000003.jpg'",
        "val2017/extra.jpg: nothing in the annotations names it",
    ]
    assert len(opened[0].objects) == 1
    with pytest.raises(DataError, match="13 of 15 rows are unusable"):
        source(root, max_bad_share=0.5).open()


def test_pictures_and_categories_that_come_twice_are_named(tmp_path):
    write(tmp_path, thing(1))
    path = tmp_path / "annotations" / FILE
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0])
    content["categories"].append({"id": 2, "name": "dog"})
    path.write_text(json.dumps(content))
    assert source(tmp_path).open().problems == [
        f"{FILE}:categories 3: another category has its id or name: 2, 'dog'",
        f"{FILE}:images 4: another picture has its id, 1",
    ]


def test_a_mask_may_be_missing(tmp_path):
    opened = source(write(tmp_path, thing(1, mask=[]), thing(2, mask=None))).open()
    assert [found.mask for found in opened[0].objects] == [None, None]


def test_another_file_is_refused(tmp_path):
    write(tmp_path, thing(1), annotations=None)
    with pytest.raises(DataError, match="no list 'annotations' in it"):
        source(tmp_path).open()
    with pytest.raises(DataError, match=r"not the folder of COCO instances: no train2017/"):
        source(tmp_path, split="train2017").open()


def test_guess_knows_the_layout(tmp_path):
    write(tmp_path / "a", thing(1))
    assert CocoInstances.guess(tmp_path / "a") == (7, {"path": str(tmp_path / "a"), "split": "val2017"})
    assert CocoInstances.guess(tmp_path) is None
