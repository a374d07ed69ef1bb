"""What detection is made of: masks as COCO writes them, the network, COCO's measures."""

import sys

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as official
from small import weights
from torch.utils.flop_counter import FlopCounterMode

from beitctl.errors import SetupError
from beitctl_plugins.tasks.detecting import measure
from beitctl_plugins.tasks.detecting.masks import decoded, encoded, lengths_in
from beitctl_plugins.tasks.detecting.network import Detector, Shape

SMALL = Shape(channels=8, hidden=12, convolutions=1, regions=16)
KITE = [[3.5, 2.0, 17.0, 5.5, 20.5, 15.0, 6.0, 18.5]]
LOSSES = ["box", "classifier", "mask", "objectness", "right", "rpn_box"]


def blob(seed, height=21, width=30):
    """A mask with some shape."""
    rng = np.random.default_rng(seed)
    grid = np.mgrid[:height, :width]
    centre, radius = rng.uniform(4, 18, 2), rng.uniform(3, 9)
    return ((grid - centre[:, None, None]) ** 2).sum(0) < radius**2


@pytest.mark.parametrize("seed", range(5))
def test_masks_are_written_as_coco_writes_them_and_read_back(seed):
    bits = np.random.default_rng(seed).random((21, 30)) < 0.4 if seed else blob(seed)
    theirs = official.encode(np.asfortranarray(bits.astype(np.uint8)))
    mine = encoded(bits)
    assert mine["size"] == [21, 30]
    assert mine["counts"].encode() == theirs["counts"]
    assert np.array_equal(decoded(mine, 21, 30), bits)


@pytest.mark.parametrize("value", [False, True])
def test_masks_of_one_value_and_long_runs_are_written_and_read(value):
    bits = np.full((300, 400), value)
    assert np.array_equal(decoded(encoded(bits), 300, 400), bits)
    assert np.array_equal(official.decode(encoded(bits)), bits)


def test_lists_of_run_lengths_are_read_down_the_columns():
    found = decoded({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    assert found.tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize("shape", [KITE, [*KITE, [22, 2, 28, 2, 28, 12, 22, 12]]], ids=["one", "two"])
def test_polygons_are_filled_as_coco_fills_them(shape):
    mine = decoded(shape, 21, 30)
    theirs = official.decode(official.frPyObjects(shape, 21, 30)).any(-1)
    assert theirs.sum() > 100
    assert np.array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        ({"size": [3, 2], "counts": [6]}, ValueError, r"of the size \[3, 2\], the picture \[2, 3\]"),
        ({"size": [2, 3], "counts": [1, 2]}, ValueError, r"add up to 3, not to 6"),
        ({"size": [2, 3], "counts": [7, -1]}, ValueError, r"run lengths"),
        ({"size": [2, 3]}, TypeError, r"no run lengths"),
        ({"size": [2, 3], "counts": "\n"}, ValueError, r"letters that it cannot have"),
        ({"size": [2, 3], "counts": "Z"}, ValueError, r"ends too early"),
        ([[1, 2, 3]], ValueError, r"three points or more, not 3 numbers"),
        (7, TypeError, r"not int"),
    ],
    ids=["size", "sum", "negative", "none", "letters", "cut", "points", "number"],
)
def test_masks_that_are_none_are_refused(mask, error, text):
    with pytest.raises(error, match=text):
        decoded(mask, 2, 3)


def test_cut_text_is_refused():
    with pytest.raises(ValueError, match="ends too early"):
        lengths_in(chr(48 + 33))


def detector(shape=SMALL, classes=3, width=16, patch=4):
    """A detector with its initial weights."""
    module = Detector(width, patch, classes, shape)
    found = weights(module, "heads.detector.")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(found[f"heads.detector.{name}"])
    return module


def features(count=2, side=8, seed=0):
    return torch.randn(count, 16, side, side, generator=torch.Generator().manual_seed(seed))


def target(boxes, classes, side=32):
    """The target of one picture, whose masks fill their boxes."""
    masks = torch.zeros(len(boxes), side, side, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        "labels": torch.tensor(classes, dtype=torch.int64),
        "masks": masks,
    }


TARGETS = [target([(2, 3, 20, 18), (10, 10, 30, 31)], [1, 3]), target([], []), target([(0, 0, 31, 12)], [2])]
CHANCE = [0.25, 0.5, 0.75]


def test_maps_are_4_2_1_a_half_and_a_quarter_of_the_patches():
    maps = detector().pyramid(features())
    assert [tuple(x.shape[1:]) for x in maps.values()] == [
        (8, 32, 32), (8, 16, 16), (8, 8, 8), (8, 4, 4), (8, 2, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(("patch", "side"), [(4, 8), (14, 7)])
def test_anchors_lie_on_exact_strides(patch, side):
    module = detector(patch=patch)
    maps = list(module.pyramid(features(1, side)).values())
    images = type("Images", (), {"image_sizes": [(side * patch,) * 2]})
    boxes = module.rpn.anchor_generator(images, maps)[0].split([3 * x.shape[2] * x.shape[3] for x in maps])
    for level, found in zip((4, 2, 1, 0.5, 0.25), boxes, strict=True):
        stride = patch / level
        centres = (found[:, :2] + found[:, 2:]) / 2
        assert centres[3].tolist() == pytest.approx([stride if len(found) > 3 else 0, 0])
        square = found[1]
        assert float(square[2] - square[0]) == pytest.approx(8 * stride, abs=1)


def test_losses_of_a_batch_are_those_of_its_pictures_whatever_torch_draws():
    module, x = detector(), features(3)
    torch.manual_seed(1)
    together = module(x, TARGETS, CHANCE)
    before = torch.get_rng_state()
    alone = [module(x[k : k + 1], TARGETS[k : k + 1], CHANCE[k : k + 1]) for k in range(3)]
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(together) == LOSSES
    for name, value in together.items():
        total = sum(float(one[name].detach()) for one in alone)
        assert float(value.detach()) == pytest.approx(total, rel=1e-4), name
        assert float(value.detach()) > 0, name


def test_other_chance_samples_others():
    module, x = detector(), features(3)
    found = {float(module(x, TARGETS, [c] * 3)["objectness"].detach()) for c in (0.1, 0.2, 0.1)}
    assert len(found) == 2


@pytest.mark.parametrize("chosen", [[0, 1, 2], [1], []], ids=["some", "no objects", "no pictures"])
@pytest.mark.parametrize("masks", [True, False])
def test_every_parameter_has_a_gradient(chosen, masks):
    module = detector(Shape(channels=8, hidden=12, convolutions=0, regions=16, masks=masks))
    x = features(3)[chosen].requires_grad_(True)
    found = module(x, [TARGETS[k] for k in chosen], [CHANCE[k] for k in chosen])
    sum(value for name, value in found.items() if name != "right").backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert x.grad is not None
    assert ("mask" in found) == masks


def test_it_computes_in_fp32_whatever_it_is_given():
    module = detector()
    found = module(features(3).bfloat16(), TARGETS, CHANCE)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_detections_stay_in_the_part_that_shows_something():
    module = detector(Shape(channels=8, hidden=12, convolutions=0, score_threshold=0.0, detections=7))
    with torch.no_grad():
        found = module(features(2), sizes=[(20, 32), (32, 9)])
    for one, (height, width) in zip(found, [(20, 32), (32, 9)], strict=True):
        assert len(one["boxes"]) == 7
        assert one["boxes"].min() >= 0
        assert one["boxes"][:, 2].max() <= width
        assert one["boxes"][:, 3].max() <= height
        assert one["masks"].shape == (7, 1, 28, 28)
        assert one["scores"].tolist() == sorted(one["scores"].tolist(), reverse=True)
    assert module(features(0)) == []


def test_regions_are_pooled_from_the_map_of_patches_if_they_have_14_of_them():
    mapper = Detector(16, 16, 3, SMALL).roi.box_roi_pool.map_levels
    sides = [20, 111, 112, 223, 224, 447, 448, 2000]
    boxes = torch.tensor([[0.0, 0, side, side] for side in sides])
    assert mapper([boxes]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_regions_are_pooled_at_the_stride_of_their_map():
    module = detector()
    ramp = torch.arange(32.0).expand(1, 8, 32, 32) + 0.5  # a pixel's column, on the map of stride 1
    maps = dict.fromkeys(("0", "1", "2", "3"), ramp)
    box = torch.tensor([[4.0, 8.0, 18.0, 22.0]])
    pooled = module.roi.box_roi_pool(maps, [box], [(20, 20)])
    assert pooled[0, 0].mean().item() == pytest.approx(11.5, abs=0.6)


def test_operations_are_those_that_torch_counts():
    module = detector()
    x, n = features(2), 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        maps = module.pyramid(x)
        module.rpn.head(list(maps.values()))
        module.roi.box_predictor(module.roi.box_head(torch.zeros(n * 16, 8, 7, 7)))
        module.roi.mask_predictor(module.roi.mask_head(torch.zeros(n * 4, 8, 14, 14)))
    assert module.operations(n, (8, 8)) == counter.get_total_flops()


def test_initial_weights_are_those_of_the_sources():
    module = Detector(64, 16, 80, Shape())
    found = weights(module, "heads.detector.")
    expected = {
        "rpn.head.conv.0.0.weight": 0.01,
        "roi.box_predictor.cls_score.weight": 0.01,
        "roi.box_predictor.bbox_pred.weight": 0.001,
        "roi.box_head.0.0.weight": (2 / (256 * 9)) ** 0.5,
        "roi.mask_head.3.0.weight": (2 / (256 * 9)) ** 0.5,
        "roi.mask_predictor.conv5_mask.weight": (2 / (256 * 4)) ** 0.5,
        "roi.box_head.5.weight": (256 * 49) ** -0.5 / 3**0.5,
        "pyramid.levels.0.0.weight": (32 * 4) ** -0.5 / 3**0.5,
        "pyramid.levels.2.2.weight": (256 * 9) ** -0.5 / 3**0.5,
    }
    for name, std in expected.items():
        assert float(found[f"heads.detector.{name}"].std()) == pytest.approx(std, rel=0.05), name
    for name, value in found.items():
        if value.ndim == 1:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name


def output(id, boxes, scores, classes, masks=(), size=(100, 100)):
    return {
        "id": id, "size": np.array(size), "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "scores": np.array(scores, np.float32), "classes": np.array(classes), "masks": list(masks),
    }  # fmt: skip


def test_files_for_coco_have_its_numbers_where_the_names_are_its():
    assert measure.category_ids(("person", "stop sign", "toothbrush")) == {
        "person": 1, "stop sign": 13, "toothbrush": 90
    }  # fmt: skip
    assert measure.category_ids(("person", "gnome")) == {"person": 1, "gnome": 2}
    assert measure.image_ids(["val2017/000000000139.jpg", "000000000285.jpg"]) == [139, 285]
    assert measure.image_ids(["a.jpg", "7.jpg"]) == [1, 2]
    assert measure.image_ids(["a/7.jpg", "b/7.jpg"]) == [1, 2]


def many(seed=0, pictures=6):
    """Objects and detections near some of them, in the form of COCO, from random numbers."""
    rng = np.random.default_rng(seed)
    things, found = [], []
    for image in range(1, pictures + 1):
        for _ in range(4):
            box = [*rng.uniform(0, 60, 2), *rng.choice([20, 70, 120]) * rng.uniform(0.8, 1.2, 2)]
            bits = np.zeros((200, 200), bool)
            left, top, wide, high = (round(side) for side in box)
            bits[top : top + high, left : left + wide] = True
            category = int(rng.integers(1, 4))
            things.append(
                {
                    "id": len(things) + 1, "image_id": image, "category_id": category, "bbox": box,
                    "iscrowd": int(rng.random() < 0.1), "area": box[2] * box[3],
                    "segmentation": encoded(bits),
                }
            )  # fmt: skip
            near = [float(side) for side in np.array(box) + rng.uniform(-2, 2, 4)]
            found.append(
                {
                    "image_id": image, "category_id": category if rng.random() < 0.8 else 1, "bbox": near,
                    "score": float(rng.random()), "segmentation": encoded(np.roll(bits, 1, 0)),
                }
            )  # fmt: skip
    images = [{"id": k, "height": 200, "width": 200} for k in range(1, pictures + 1)]
    categories = [{"id": k, "name": str(k)} for k in (1, 2, 3)]
    return {"images": images, "annotations": things, "categories": categories}, found


def test_metrics_are_those_of_coco():
    truth, found = many()
    mine = measure.metrics_of(truth, found, masks=True)
    assert list(mine)[:4] == ["box_map", "box_map50", "mask_map", "mask_map50"]
    for kind, names in (
        ("bbox", {"box_map": 0, "box_map50": 1, "box_map_small": 3, "box_map_medium": 4, "box_map_large": 5}),
        ("segm", {"mask_map": 0, "mask_map50": 1}),
    ):
        known, rows = COCO(many()[0]), many()[1]
        rows = [
            {k: v for k, v in r.items() if k != ("bbox" if kind == "segm" else "segmentation")} for r in rows
        ]
        evaluation = COCOeval_faster(known, known.loadRes(rows), kind)
        evaluation.run()
        for name, place in names.items():
            assert mine[name] == pytest.approx(evaluation.stats[place]), name
            assert 0 < mine[name] < 1, name


def test_sizes_without_objects_are_left_out():
    truth, found = many()
    for thing in truth["annotations"]:
        thing["area"] = 2000.0
    assert not {"box_map_small", "box_map_large"} & set(measure.metrics_of(truth, found, masks=False))


def test_measuring_without_its_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(SetupError, match=r"pip install 'beitctl\[eval\]'"):
        measure.precision(*many(), "bbox")


def test_measuring_changes_nothing():
    truth, found = many()
    measure.metrics_of(truth, found, masks=True)
    assert (truth, found) == many()


def test_results_hold_every_detection():
    said = [
        output("a", [(1, 2, 11, 22)], [0.5], [2], [{"size": [1, 1], "counts": "1"}]),
        output("b", [], [], []),
    ]
    assert measure.results_of(said, ("one", "two")) == [
        {
            "image_id": 1, "category_id": 2, "bbox": [1.0, 2.0, 10.0, 20.0], "score": 0.5,
            "segmentation": {"size": [1, 1], "counts": "1"},
        }
    ]  # fmt: skip
