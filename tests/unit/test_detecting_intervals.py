"""COCO's average precision of some of the pictures, against faster-coco-eval on just those."""

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster

from beitctl_plugins.tasks.detecting.intervals import matched, resampled
from beitctl_plugins.tasks.detecting.masks import encoded

PX, PICTURES = 64, 12


def run_lengths(box):
    left, top, wide, high = (round(side) for side in box)
    bits = np.zeros((PX, PX), bool)
    bits[top : top + high, left : left + wide] = True
    return encoded(bits)


def case(seed, digits=1):
    """Objects, some of them crowds, and detections near them, of three classes, scores of some digits."""
    rng = np.random.default_rng(seed)
    things, found = [], []
    for image in range(1, PICTURES + 1):
        for _ in range(int(rng.integers(0, 5))):
            box = [*rng.uniform(2, 40, 2).tolist(), *rng.uniform(6, 20, 2).tolist()]
            thing = {"image_id": image, "category_id": int(rng.integers(1, 4)), "bbox": box}
            things.append(thing | {"id": len(things) + 1, "iscrowd": int(rng.random() < 0.2)})
            things[-1] |= {"area": box[2] * box[3], "segmentation": run_lengths(box)}
            for _ in range(int(rng.integers(0, 4))):
                near = [max(1.0, side + float(rng.normal(0, 1.5))) for side in box]
                said = {"bbox": near, "segmentation": run_lengths(near), "score": round(rng.random(), digits)}
                found.append({**thing, **said} | ({"category_id": 1} if rng.random() < 0.2 else {}))
    images = [{"id": k, "height": PX, "width": PX} for k in range(1, PICTURES + 1)]
    categories = [{"id": k, "name": str(k)} for k in (1, 2, 3)]
    return {"images": images, "annotations": things, "categories": categories}, found


def theirs(truth, results, kind, chosen):
    """AP and AP50 of the chosen pictures by faster-coco-eval; a picture may be among them twice."""
    images, things, found = [], [], []
    for number, place in enumerate(chosen, 1):
        images.append({**truth["images"][place], "id": number})
        own = [one for one in truth["annotations"] if one["image_id"] == place + 1]
        things += [{**one, "image_id": number, "id": len(things) + k} for k, one in enumerate(own, 1)]
        found += [{**one, "image_id": number} for one in results if one["image_id"] == place + 1]
    key = "segmentation" if kind == "segm" else "bbox"
    rows = [{name: one[name] for name in ("image_id", "category_id", "score", key)} for one in found]
    known = COCO({**truth, "images": images, "annotations": things})
    evaluation = COCOeval_faster(known, known.loadRes(rows), kind)
    evaluation.run()
    return evaluation.stats[:2].tolist()


def mine(truth, results, kind, chosen):
    classes = matched(truth, results, kind)
    return [resampled(classes, thresholds)(np.array(chosen)) for thresholds in (10, 1)]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(5))
def test_every_picture_once_gives_what_coco_says(kind, seed):
    truth, found = case(seed)
    expected = theirs(truth, found, kind, range(PICTURES))
    assert 0.05 < expected[0] < expected[1] < 0.95
    assert mine(truth, found, kind, range(PICTURES)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(5))
def test_some_pictures_give_what_coco_says_of_those(kind, seed):
    truth, found = case(seed)
    chosen = [0, 2, 3, 7, 8, 11]
    assert mine(truth, found, kind, chosen) == pytest.approx(theirs(truth, found, kind, chosen), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_pictures_drawn_twice_count_twice(seed):
    truth, found = case(seed, digits=6)
    chosen = [0, 0, 2, 4, 4, 4, 5, 6, 9, 10, 10, 11]
    expected = theirs(truth, found, "bbox", chosen)
    assert mine(truth, found, "bbox", chosen) == pytest.approx(expected, abs=1e-9)
    assert abs(expected[0] - theirs(truth, found, "bbox", sorted(set(chosen)))[0]) > 1e-3


def test_classes_without_detections_count_and_those_without_objects_do_not():
    truth, found = case(0)
    for thing in truth["annotations"]:
        thing["category_id"] = 1 + thing["category_id"] % 2
    found = [one for one in found if one["category_id"] == 2]
    classes = matched(truth, found, "bbox")
    assert len(classes) == 2
    assert len(classes[0].rows) == 0
    whole = mine(truth, found, "bbox", range(PICTURES))
    assert whole == pytest.approx(theirs(truth, found, "bbox", range(PICTURES)), abs=1e-9)


def test_no_objects_among_the_drawn_give_nothing():
    truth, found = case(0)
    empty = [k for k in range(PICTURES) if all(one["image_id"] != k + 1 for one in truth["annotations"])]
    assert empty
    assert np.isnan(resampled(matched(truth, found, "bbox"), 1)(np.array(empty)))
