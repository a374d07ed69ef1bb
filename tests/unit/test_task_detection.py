"""Detection: what it prepares, learns from, finds and scores, and what the user is told."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as official
from PIL import Image
from small import MODEL, Given, Record, rng, tools
from torch import nn

from beitctl.api import Example, Object
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.shard import fill
from beitctl.errors import DataError, UserError
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.sources.making.scenes import run_lengths
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.tasks.detecting.masks import decoded
from beitctl_plugins.tasks.detection import Detection, _unpacked

LABELS = ("cup", "hat")
CONFIG = replace(
    MODEL,
    final_norm=False,
    mask_token=False,
    vocabulary=0,
    text_tokens=0,
    image_px=32,
    patch_px=8,
    drop_path=0.0,
)
SMALL = {"channels": 8, "hidden": 12, "convolutions": 0, "regions": 16}
PIXELS = (40, 60)
"""Height and width of the pictures."""


def placed(left, top, wide, high, label="cup", size=PIXELS, **changes):
    """An object that fills its box."""
    bits = np.zeros(size, bool)
    bits[top : top + high, left : left + wide] = True
    return Object(label, (left, top, wide, high), run_lengths(bits), **changes)


def pictured(*things, id="x", size=PIXELS, **changes):
    """A black picture whose cups are red and whose hats are green."""
    pixels = np.zeros((*size, 3), np.uint8)
    for thing in things:
        pixels[decoded(thing.mask, *size), LABELS.index(thing.label)] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return Example(id, **{"image": stream.getvalue(), "objects": tuple(things)} | changes)


CUP, HAT = placed(5, 6, 20, 12), placed(34, 15, 22, 20, "hat")


def given(**changes):
    return tools(**{"model": CONFIG, "labels": LABELS, "tokenizer": None} | changes)


def small(**changes):
    return Detection(**SMALL | changes)


def learner_with(task, made):
    learner = MultiwayLearner(Multiway(made.model), [Objective("task", task)], {"task": made})
    fill(learner, lambda name, shape: initial(name, shape, made.model, 0))
    return learner


def batch_of(task, made, examples):
    items = [task.prepare(one, rng(k), made) for k, one in enumerate(examples)]
    return collate([Portion("task", "image", items)], made.model)


def test_classes_are_those_of_the_file_the_source_or_the_objects_sorted(tmp_path):
    (tmp_path / "names.txt").write_text("hat\ncup\nmug\n")
    source = Given(examples=(pictured(HAT), pictured(CUP))).open()
    assert Detection(class_names=str(tmp_path / "names.txt")).vocabulary(source) == ("hat", "cup", "mug")
    assert Detection().vocabulary(source) == ("cup", "hat")

    class Named(Opened):
        classes = ("mug", "hat", "cup")

    assert Detection().vocabulary(Named([], lambda row: row, "x")) == ("mug", "hat", "cup")


def test_classes_are_read_without_pictures():
    def read(row):
        raise AssertionError("a picture was read")

    source = Opened([CUP, HAT], read, "x", things=lambda row: (row,))
    assert Detection().vocabulary(source) == ("cup", "hat")


def test_classes_that_the_file_does_not_name_are_refused(tmp_path):
    (tmp_path / "names.txt").write_text("hat\n")
    source = Given(examples=(pictured(HAT), pictured(CUP))).open()
    with pytest.raises(
        DataError, match=r"class_names does not name 1 of the classes of objects: cup; it names hat"
    ):
        Detection(class_names=str(tmp_path / "names.txt")).vocabulary(source)


def test_a_source_without_objects_and_a_picture_of_one_patch_are_refused():
    with pytest.raises(UserError, match="this source has none"):
        Detection().heads(given(labels=()))
    with pytest.raises(UserError, match="at least 2 x 2 patches, image_px 8 has 1 x 1"):
        Detection().heads(given(model=replace(CONFIG, image_px=8)))


@pytest.mark.parametrize(
    "table",
    [{"scale_jitter": (2.0, 0.5)}, {"scale_jitter": (0, 1)}, {"nms_threshold": 0}, {"score_threshold": 1.0}],
)
def test_impossible_settings_are_refused(table):
    with pytest.raises(ValueError, match="validation error"):
        Detection.model_validate(table)


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (Object("dog", (1, 1, 5, 5), CUP.mask), r"x: 'dog' is none of the classes: cup, hat"),
        (Object("dog", (1, 1, 5, 5), crowd=True), r"x: 'dog' is none of the classes: cup, hat"),
        (Object("cup", (1, 2, 0, 5), CUP.mask), r"x: the box \[1, 2, 0, 5\] of 'cup' is empty"),
        (Object("cup", (1, 2, float("nan"), 5), CUP.mask), r"x: the box .* is empty"),
        (Object("cup", (60, 2, 5, 5), CUP.mask), r"x: the box \[60, 2, 5, 5\] .* outside the picture of 60"),
        (Object("cup", (1, -9, 5, 5), CUP.mask), r"x: the box \[1, -9, 5, 5\] .* outside"),
        (Object("cup", (1, 2, 5, 5)), r"x: .* has no mask; add it, or set masks = false"),
        (Object("cup", (1, 2, 5, 5), [[1, 2]]), r"x: the mask of 'cup', box \[1, 2, 5, 5\]: a polygon has"),
        (Object("cup", (1, 2, 5, 5), placed(1, 2, 5, 5, size=(9, 9)).mask), r"x: .*of the size \[9, 9\]"),
    ],
    ids=["label", "crowd's label", "empty", "nan", "right of it", "above it", "no mask", "points", "size"],
)  # fmt: skip
@pytest.mark.parametrize("train", [True, False])
def test_objects_that_cannot_be_used_are_named(thing, text, train):
    example = replace(pictured(CUP), objects=(CUP, thing))
    with pytest.raises(DataError, match=text):
        small(scale_jitter=(1, 1)).prepare(example, rng(), given(train=train))


@pytest.mark.parametrize("train", [True, False])
def test_an_example_without_a_picture_is_named(train):
    with pytest.raises(DataError, match="x: no picture"):
        small().prepare(pictured(CUP, image=None), rng(), given(train=train))


def masks_of(item, side=32):
    return _unpacked(torch.from_numpy(item.extra["masks"]), side).numpy().astype(bool)


@pytest.mark.parametrize("seed", range(12))
def test_picture_boxes_and_masks_are_resized_cut_and_flipped_together(seed):
    item = small(scale_jitter=(0.5, 2.5)).prepare(pictured(CUP, HAT), rng(seed), given())
    assert item.image.shape == (3, 32, 32)
    for box, number, mask in zip(*(item.extra[k] for k in ("boxes", "classes")), masks_of(item), strict=True):
        there = item.image[number - 1] > 128  # the colour of the class, and not the grey around the picture
        there &= item.image[2] < 100
        assert (there & mask).sum() / (there | mask).sum() > 0.75  # edges are mixed
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert item.extra["boxes"].dtype == np.float32


@pytest.mark.parametrize("seed", range(8))
def test_boxes_without_masks_go_the_same_way(seed):
    things, made = pictured(CUP, HAT), given()
    both = [small(masks=m, scale_jitter=(0.5, 2.5)).prepare(things, rng(seed), made) for m in (True, False)]
    with_masks, without = (one.extra for one in both)
    assert np.array_equal(both[0].image, both[1].image)
    assert without["masks"].shape == (0, 32, 4)
    if len(with_masks["boxes"]) == len(without["boxes"]):
        assert without["boxes"] == pytest.approx(with_masks["boxes"], abs=1.0)


def test_objects_that_are_cut_off_are_dropped_and_pictures_without_any_kept():
    task, made, corner = small(scale_jitter=(1.5, 1.5)), given(), pictured(placed(0, 0, 6, 6))
    counts = {len(task.prepare(corner, rng(seed), made).extra["boxes"]) for seed in range(30)}
    assert counts == {0, 1}
    none = task.prepare(pictured(), rng(), made).extra
    assert (none["boxes"].shape, none["classes"].shape, none["masks"].shape) == ((0, 4), (0,), (0, 32, 4))


def test_crowds_are_not_trained_on():
    crowd = replace(HAT, crowd=True)
    item = small(scale_jitter=(1, 1)).prepare(pictured(CUP, crowd), rng(), given())
    assert item.extra["classes"].tolist() == [1]


def test_training_views_follow_from_the_draw():
    task, made = small(), given()
    views = [task.prepare(pictured(CUP, HAT), rng(seed), made) for seed in (0, 0, 1, 2)]
    assert np.array_equal(views[0].image, views[1].image)
    assert views[0].chance == views[1].chance
    assert len({view.chance for view in views}) == 3
    assert len({view.image.tobytes() for view in views}) == 3


def test_in_evaluation_all_of_a_picture_is_seen_and_the_mean_colour_beside_it():
    item = small().prepare(pictured(HAT), rng(), given(train=False))
    assert item.extra["size"].tolist() == [40, 60]
    assert item.extra["seen"].tolist() == [21, 32]
    assert (item.image[:, 21:] == 128).all()
    assert item.image[1, 8 + 4, 18 + 6] == 255  # in the hat, at 32 / 60 of its size


def test_losses_are_sums_over_pictures_by_their_terms():
    task, made = small(), given()
    learner = learner_with(task, made)
    assert learner.weights == {
        "task": 1.0, "task.box": 1.0, "task.mask": 1.0, "task.objectness": 1.0, "task.rpn_box": 1.0
    }  # fmt: skip
    examples = [pictured(CUP, HAT), pictured(), pictured(HAT)]
    batch = batch_of(task, made, examples)
    sums = learner(batch)
    assert learner.counts(batch) == dict.fromkeys(sums, 3.0)
    assert sums["task"][0].item() == pytest.approx(3 * np.log(3), rel=0.3)
    assert sums["task.objectness"][0].item() == pytest.approx(3 * np.log(2), rel=0.1)
    assert 0 <= sums["task"][1].item() <= 3
    items = [task.prepare(one, rng(k), made) for k, one in enumerate(examples)]
    alone = [learner(collate([Portion("task", "image", [item])], made.model)) for item in items]
    for name, (total, _) in sums.items():
        assert total.item() == pytest.approx(sum(one[name][0].item() for one in alone), rel=1e-4), name


def test_without_masks_there_is_no_mask_head():
    task, made = small(masks=False), given()
    learner = learner_with(task, made)
    assert "task.mask" not in learner(batch_of(task, made, [pictured(CUP)]))
    assert [name for name, _ in learner.named_parameters() if "mask" in name] == []


@pytest.mark.parametrize("examples", [[], [pictured(), pictured()]], ids=["no pictures", "no objects"])
def test_every_parameter_has_a_gradient(examples):
    task, made = small(), given()
    learner = learner_with(task, made).train()
    sums = learner(batch_of(task, made, examples))
    torch.stack([total for total, _ in sums.values()]).sum().backward()
    parts = (learner.heads, learner.model.blocks) if examples else (learner.heads,)
    assert [name for part in parts for name, p in part.named_parameters() if p.grad is None] == []


def test_a_step_has_the_operations_of_the_head():
    task, made = small(), given()
    learner = learner_with(task, made)
    batch = batch_of(task, made, [pictured(CUP)] * 2)
    head = learner.heads["detector"].operations(2, (4, 4))
    assert task.operations(made.model, batch.plan, batch.groups["task"], learner.heads).heads == head
    assert learner.flops(batch) > 3 * head


class Sure(nn.Module):
    """A head that finds the same in every view: a box of 16 x 8, all of it mask."""

    def forward(self, features, sizes):
        return [
            {
                "boxes": torch.tensor([[8.0, 4, 24, 12]]),
                "scores": torch.tensor([0.75]),
                "labels": torch.tensor([2]),
                "masks": torch.ones(1, 1, 28, 28),
            }
            for _ in sizes
        ]


def test_what_is_found_is_told_in_pixels_of_the_picture():
    task, made = small(), given(train=False)
    learner = learner_with(task, made).eval()
    learner.heads["detector"] = Sure()
    examples = [pictured(CUP, id=f"{k}", size=size) for k, size in enumerate([PIXELS, PIXELS])]
    examples.append(pictured(id="tall", size=(96, 30)))
    chunk = [(one, task.prepare(one, rng(), made)) for one in [*examples, *examples]]
    with torch.no_grad():
        found = task.infer(learner, chunk, made)
    assert [one["id"] for one in found] == ["0", "1", "tall", "0", "1", "tall"]
    assert found[0]["boxes"] == pytest.approx(np.array([[15, 4 * 40 / 21, 45, 12 * 40 / 21]]))
    assert found[2]["boxes"] == pytest.approx(np.array([[24, 12, 72, 36]]))
    assert found[0]["scores"].tolist() == [0.75]
    assert found[0]["classes"].tolist() == [2]
    bits = decoded(found[0]["masks"][0], *PIXELS)
    rows, columns = (np.flatnonzero(bits.any(axis)) for axis in (1, 0))
    assert [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] == pytest.approx([15, 7.6, 45, 22.9], abs=1.5)
    assert bits[10:20, 18:42].all()


@pytest.mark.parametrize("masks", [True, False])
def test_an_untrained_model_can_be_asked_and_scored(masks):
    task, made = small(masks=masks, score_threshold=0.0, detections=30), given(train=False)
    learner = learner_with(task, made).eval()
    examples = [pictured(CUP, HAT, id="a"), pictured(id="b"), pictured(HAT, id="c")]
    chunk = [(one, task.prepare(one, rng(), made)) for one in examples]
    with torch.no_grad():
        found = task.infer(learner, chunk, made)
    assert [len(one["masks"]) for one in found] == [30 * masks] * 3
    source = Given(examples=tuple(examples)).open()
    measured = task.score([found], examples, made, source)
    assert ("mask_map" in measured.metrics) == masks
    assert measured.metrics["examples"] == 3
    assert measured.metrics["objects"] == 3
    assert [len(row["detections"]) for row in measured.rows] == [20, 20, 20]
    assert measured.rows[1]["objects"] == []
    assert len(json.loads(json.dumps(measured.files["detections.json"]))) == 90
    log = Record()
    task.draw([found], examples, made, log)
    assert [row[0] for row in log.said["table"][0][3]] == ["cup", "hat"]
    assert log.said["figure"][0][1].startswith(b"\x89PNG")
    batch = batch_of(task, made, examples)
    assert [len(one["boxes"]) for one in learner.outputs(batch)["task"]] == [30, 30, 30]


def said(id, *boxes, size=PIXELS):
    """What was found: label, box and score each."""
    corners = [(a, b, a + c, b + d) for _, (a, b, c, d), _ in boxes]
    masks = [placed(*(round(side) for side in box), size=size).mask for _, box, _ in boxes]
    return {
        "id": id, "size": np.array(size), "boxes": np.array(corners, np.float32).reshape(-1, 4),
        "scores": np.array([score for _, _, score in boxes], np.float32),
        "classes": np.array([LABELS.index(label) + 1 for label, _, _ in boxes]),
        "masks": [
            {**one, "counts": one["counts"].decode()}
            for one in (official.encode(np.asfortranarray(decoded(mask, *size), np.uint8)) for mask in masks)
        ],
    }  # fmt: skip


def scored(outputs, examples, train=None):
    train = Given(examples=tuple(train or examples)).open()
    return Detection().score([outputs], examples, given(train=False), train).metrics


def test_mean_average_precision_by_hand():
    """Two cups: the first is found, with an overlap of 0.8; then comes something that is none.

    At the thresholds .5 to .8, 7 of 10, precision is 1 up to a recall of one half: 51 of 101 points.
    """
    first, second = placed(2, 2, 20, 10), placed(30, 20, 20, 10)
    found = said("a", ("cup", (2, 2, 16.2, 10), 0.9), ("cup", (50, 0, 8, 8), 0.8))
    metrics = scored([found], [pictured(first, second, id="a")])
    assert metrics["box_map50"] == pytest.approx(51 / 101)
    assert metrics["box_map"] == pytest.approx(0.7 * 51 / 101)
    assert metrics["mask_map50"] == pytest.approx(51 / 101)
    assert next(iter(metrics)) == "box_map"
    assert metrics["box_map_small"] == metrics["box_map"]
    assert not {"box_map_medium", "box_map_large"} & set(metrics)


def test_precision_has_an_interval():
    examples = [pictured(placed(2, 2, 20, 10), id=str(k)) for k in range(4)]
    found = [said(str(k), *([("cup", (2, 2, 20, 10), 0.9)] * (k < 2))) for k in range(4)]
    made, train = given(train=False), Given(examples=tuple(examples)).open()
    measured = Detection().score([found], examples, made, train)
    for name in ("box_map", "box_map50"):
        count, statistic = measured.each[name]
        assert count == 4
        assert statistic(np.arange(4)) == pytest.approx(measured.metrics[name])
        assert statistic(np.array([0, 0, 1, 1])) == pytest.approx(1)
        assert statistic(np.array([2, 2, 3, 3])) == 0


def test_what_is_found_first_counts_against_what_is_found_later():
    """The wrong one comes first: precision is one half wherever there is any."""
    found = said("a", ("cup", (50, 0, 8, 8), 0.9), ("cup", (2, 2, 20, 10), 0.8))
    metrics = scored([found], [pictured(placed(2, 2, 20, 10), id="a")])
    assert metrics["box_map"] == pytest.approx(0.5)


def test_finding_a_crowd_is_no_mistake():
    crowd = placed(30, 20, 20, 10, crowd=True)
    found = said("a", ("cup", (30, 20, 20, 10), 0.9), ("cup", (2, 2, 20, 10), 0.8))
    metrics = scored([found], [pictured(placed(2, 2, 20, 10), crowd, id="a")])
    assert metrics["box_map"] == pytest.approx(1)
    assert metrics["objects"] == 1


def test_the_baseline_is_the_mean_box_and_the_most_frequent_class():
    """Hats are most frequent; their mean box, 10, 8, 20, 16, is the hat of the first picture of two."""
    train = [pictured(placed(5, 4, 20, 16, "hat"), id="p"), pictured(placed(15, 12, 20, 16, "hat"), id="q")]
    train.append(pictured(replace(placed(0, 0, 5, 5), crowd=True), id="r"))
    test = [pictured(placed(10, 8, 20, 16, "hat"), id="a"), pictured(placed(40, 20, 10, 10, "hat"), id="b")]
    metrics = scored([said("a"), said("b")], test, train)
    assert metrics["trivial_box_map50"] == pytest.approx(51 / 101)
    assert metrics["box_map50"] == 0


def test_nothing_to_find_and_nothing_to_learn_from_are_refused():
    with pytest.raises(DataError, match="the 1 pictures to measure on have no object"):
        scored([said("a")], [pictured(id="a")], [pictured(CUP)])
    with pytest.raises(DataError, match="no object of training pictures"):
        scored([said("a")], [pictured(CUP, id="a")], [pictured()])


def test_masks_as_polygons_are_scored():
    square = replace(placed(2, 2, 20, 10), mask=[[2, 2, 22, 2, 22, 12, 2, 12]])
    example = replace(pictured(placed(2, 2, 20, 10), id="a"), objects=(square,))
    metrics = scored([said("a", ("cup", (2, 2, 20, 10), 0.9))], [example])
    assert metrics["mask_map"] == pytest.approx(1)


def test_a_toy_size_keeps_no_names_and_jitters_little():
    found = Detection.smoke({"class_names": "x.txt", "scale_jitter": [0.1, 2.0], "nms_threshold": 0.6})
    assert found["scale_jitter"] == [0.8, 1.25]
    assert "class_names" not in found
    assert Detection.model_validate(found).nms_threshold == 0.6
    assert Detection.smoke_data("test") == {"kind": "embedded", "content": "objects", "split": "test"}


def test_patches_are_read_before_a_final_norm():
    assert not small().fitted(replace(CONFIG, final_norm=True)).final_norm
