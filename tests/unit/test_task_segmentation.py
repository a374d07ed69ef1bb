"""Semantic segmentation: what it prepares, how windows add up, what it scores, what the user is told."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small import MODEL, Given, Record, rng, tools
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

from beitctl.api import Example
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.shard import fill
from beitctl.errors import DataError, UserError
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.tasks.dense_views import Numbers, Training, distorted, training_view
from beitctl_plugins.tasks.segment_scores import as_png, from_png, metrics_of, most_frequent, resampled_miou
from beitctl_plugins.tasks.segmentation import Segmentation
from beitctl_plugins.tasks.sliding import Windows, probabilities

LABELS = ("wall", "sky", "tree")
CONFIG = replace(MODEL, final_norm=False, vocabulary=0, text_tokens=0)
PLAIN = {"distort": False, "resize": (1.0, 1.0), "most_of_one": 1.0}


def encoded(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def halves(height=20, width=24):
    """A picture whose red is 40 times its class's grey value: 1 left, 2 right, 0 in the last row."""
    values = np.ones((height, width), np.uint8)
    values[:, width // 2 :] = 2
    values[-1] = 0
    return values


def example(values=None, id="x", **changes):
    values = halves() if values is None else values
    pixels = np.stack([values * 40, values * 0 + 90, values * 0 + 10], -1).astype(np.uint8)
    given = {"image": encoded(pixels), "segmentation": encoded(values)} | changes
    return Example(id, **given)


def given(**changes):
    return tools(**{"model": CONFIG, "labels": LABELS, "tokenizer": None} | changes)


def learner_with(task, made):
    learner = MultiwayLearner(Multiway(made.model), [Objective("task", task)], {"task": made})
    fill(learner, lambda name, shape: initial(name, shape, made.model, 0))
    return learner


def test_names_come_from_the_file_or_the_source_with_background_before_them(tmp_path):
    (tmp_path / "names.txt").write_text("wall\nbuilding, edifice\n")
    source = Opened([], lambda row: row, "x", segments=("cup", "hat"))
    assert Segmentation(class_names=str(tmp_path / "names.txt")).vocabulary(source) == (
        "wall",
        "building, edifice",
    )
    assert Segmentation().vocabulary(source) == ("cup", "hat")
    assert Segmentation(background=True).vocabulary(source) == ("background", "cup", "hat")


def test_a_source_without_names_is_refused():
    with pytest.raises(UserError, match=r"names of its classes, .* set class_names to a text file"):
        Segmentation().vocabulary(Given(examples=()).open())


@pytest.mark.parametrize("labels", [(), ("one",)], ids=["none", "one"])
def test_fewer_than_two_classes_are_refused(labels):
    with pytest.raises(UserError, match=rf"two classes or more, found {len(labels)}: .* background = true"):
        Segmentation().heads(given(labels=labels))


@pytest.mark.parametrize("taps", [[1], [1, 1, 1, 2], [0, 1, 1, 1], [2, 1, 1, 1]])
def test_taps_that_the_model_does_not_have_are_refused(taps):
    with pytest.raises(UserError, match=r"four growing numbers from 1 to 1, the blocks"):
        Segmentation(taps=taps).heads(given())


def test_a_picture_of_one_patch_is_refused():
    with pytest.raises(UserError, match="at least 2 x 2 patches, image_px 4 has 1 x 1"):
        Segmentation().heads(given(model=replace(CONFIG, image_px=4)))


@pytest.mark.parametrize(
    "table", [{"resize": (2.0, 0.5)}, {"resize": (0, 1)}, {"scales": []}, {"scales": [0.0]}, {"dropout": 1.0}]
)
def test_impossible_settings_are_refused(table):
    with pytest.raises(ValueError, match="validation error"):
        Segmentation.model_validate(table)


def test_grey_0_counts_nowhere_and_grey_1_is_the_first_class():
    item = Segmentation().prepare(example(), rng(), given(train=False))
    assert np.array_equal(item.extra["classes"], halves().astype(np.int16) - 1)


def test_with_a_background_grey_0_is_the_first_class():
    item = Segmentation(background=True).prepare(example(), rng(), given(train=False))
    assert np.array_equal(item.extra["classes"], halves())


@pytest.mark.parametrize("kind", ["P", "I;16", "1"])
def test_a_palette_and_other_depths_are_read_by_their_numbers(kind):
    values = halves() % 2 if kind == "1" else halves()
    if kind == "P":
        image = Image.fromarray(values).convert("L")
        image.putpalette([200, 0, 0] * 256)
    else:
        image = Image.fromarray(values.astype(bool if kind == "1" else np.uint16))
    assert image.mode == kind
    stream = io.BytesIO()
    image.save(stream, "PNG")
    item = Segmentation().prepare(example(values, segmentation=stream.getvalue()), rng(), given(train=False))
    assert np.array_equal(item.extra["classes"], values.astype(np.int16) - 1)


def test_255_counts_nowhere_unless_told_otherwise():
    values = halves()
    values[3:5] = 255
    item = Segmentation().prepare(example(values), rng(), given(train=False))
    assert (item.extra["classes"][3:5] == -1).all()
    with pytest.raises(DataError, match=r"x: the segmentation has the values 255 at 48 pixels"):
        Segmentation(ignored=-1).prepare(example(values), rng(), given(train=False))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"values": halves() * 4}, r"values 4, 8 at 456 pixels; there are 3 classes"),
        ({"segmentation": encoded(halves(20, 23))}, r"x: .* has 23 x 20 pixels, the picture 24 x 20"),
        ({"segmentation": encoded(np.zeros((20, 24, 3), np.uint8))}, r"x: .* mode RGB; it must have one"),
        ({"segmentation": b"nothing"}, r"x: the segmentation is not a readable picture"),
        ({"segmentation": encoded(halves())[:60]}, r"x: the segmentation cannot be read"),
        ({"segmentation": None}, r"x: no segmentation"),
        ({"image": None}, r"x: no picture"),
        ({"values": halves() * 0}, r"x: not one pixel of the segmentation has a class"),
    ],
    ids=["values", "size", "colours", "no picture", "cut", "none", "no image", "all ignored"],
)  # fmt: skip
@pytest.mark.parametrize("train", [True, False])
def test_what_cannot_be_used_is_named(changes, text, train):
    with pytest.raises(DataError, match=text):
        Segmentation().prepare(example(**changes), rng(), given(train=train))


def test_a_missing_file_of_classes_is_named(tmp_path):
    with pytest.raises(DataError, match=r"x: the segmentation cannot be read"):
        Segmentation().prepare(example(segmentation=tmp_path / "no.png"), rng(), given())


def test_a_picture_that_takes_too_many_windows_is_refused():
    long = example(np.ones((2, 40), np.uint8))
    with pytest.raises(DataError, match=r"x: 40 x 2 pixels; a side may be 16 times"):
        Segmentation().prepare(long, rng(), given(train=False))


@pytest.mark.parametrize("seed", range(6))
def test_picture_and_classes_are_cut_resized_and_flipped_together(seed):
    task = Segmentation(distort=False)
    item = task.prepare(example(halves(60, 80)), rng(seed), given())
    red, classes = item.image[0], item.extra["classes"]
    assert item.image.shape == (3, 16, 16)
    assert classes.shape == (16, 16)
    known = classes >= 0
    assert known.sum() > 40
    assert np.mean(np.abs(red[known] - (classes[known] + 1.0) * 40) < 4) > 0.8  # others mix along edges


def test_training_views_differ_and_follow_from_the_draw():
    task, made = Segmentation(), given()
    views = [task.prepare(example(halves(60, 80)), rng(seed), made) for seed in (0, 0, 1, 2)]
    assert np.array_equal(views[0].image, views[1].image)
    assert np.array_equal(views[0].extra["kept"], views[1].extra["kept"])
    assert len({view.image.tobytes() for view in views}) == 3


def test_a_small_picture_is_filled_with_the_mean_colour_of_which_nothing_counts():
    settings = Training((0.5, 0.5), 1.0, False, "imagenet")
    pixels, classes = training_view(
        np.zeros((10, 10, 3), np.uint8), np.ones((10, 10), np.int16), 16, rng(), settings
    )
    assert (classes == 1).sum() == 64
    assert (pixels[classes == -1] == [124, 116, 104]).all()
    assert (pixels[classes == 1] == 0).all()


def test_the_shorter_side_follows_the_drawn_size_and_the_longer_is_bounded():
    settings = Training((1.0, 1.0), 1.0, False, "half")
    classes = np.zeros((10, 100), np.int16)
    _, seen = training_view(np.zeros((10, 100, 3), np.uint8), classes, 20, rng(), settings)
    assert (seen == 0).sum() == 8 * 20  # 80 wide, four times the target, so 8 high


def test_crops_nearly_of_one_class_are_drawn_again():
    classes = np.zeros((64, 64), np.int16)
    classes[:16, :16] = 1
    found = {}
    for most in (1.0, 0.75):
        settings = Training((4.0, 4.0), most, False, "half")
        views = [
            training_view(np.zeros((64, 64, 3), np.uint8), classes, 16, rng(s), settings)[1]
            for s in range(40)
        ]
        found[most] = sum((view == 1).mean() > 0.2 for view in views)
    assert found[0.75] > found[1.0]


def test_colours_are_distorted_without_moving_anything():
    pixels = np.full((6, 6, 3), (200, 120, 60), np.uint8)
    views = [distorted(pixels, rng(seed)) for seed in range(20)]
    assert all((view == view[0, 0]).all() for view in views)
    assert len({view.tobytes() for view in views}) > 10
    assert any(np.array_equal(view, pixels) for view in [distorted(pixels, rng(seed)) for seed in range(200)])


def test_dropout_keeps_its_share_of_channels_and_the_mean():
    item = Segmentation(dropout=0.25).prepare(example(), rng(), given())
    kept = item.extra["kept"]
    assert kept.shape == (8 + 256,)
    assert np.unique(kept) == pytest.approx([0, 4 / 3])
    assert kept.mean() == pytest.approx(1, abs=0.1)


def batch_of(task, made, count=3):
    items = [task.prepare(example(halves(20 + k, 24)), rng(k), made) for k in range(count)]
    return collate([Portion("task", "image", items)], made.model)


def test_the_loss_is_the_mean_over_all_pixels_of_a_picture_summed_over_pictures():
    task, made = Segmentation(dropout=0.0), given()
    learner = learner_with(task, made).eval()
    batch = batch_of(task, made)
    sums, logits = learner(batch), learner.outputs(batch)["task"]
    assert logits.shape == (3, 3, 16, 16)
    classes = torch.stack([one["classes"] for one in batch.groups["task"].extra]).long()
    assert (classes == -1).any()
    large = F.interpolate(logits, (16, 16), mode="bilinear")
    each = F.cross_entropy(large, classes, reduction="none", ignore_index=-1)
    assert sums["task"][0].item() == pytest.approx(each.mean((1, 2)).sum().item(), rel=1e-5)
    right = [(a.argmax(0) == b)[b >= 0].float().mean() for a, b in zip(large, classes, strict=True)]
    assert sums["task"][1].item() == pytest.approx(sum(right).item(), rel=1e-5)
    assert learner.weights == {"task": 1.0, "task.auxiliary": 0.4}
    assert sums["task.auxiliary"][0].item() == pytest.approx(3 * np.log(3), rel=0.2)


def test_dropout_is_for_training_alone():
    task, made = Segmentation(dropout=0.5), given()
    learner, batch = learner_with(task, made), batch_of(task, given())
    trained = [float(learner.train()(batch)["task"][0].detach()) for _ in range(2)]
    assert trained[0] == trained[1]
    plain = Segmentation(dropout=0.0)
    learner.objectives = (Objective("task", plain),)
    assert float(learner(batch)["task"][0].detach()) != trained[0]


def test_no_samples_give_a_loss_of_0_with_gradients_for_all():
    task, made = Segmentation(), given()
    learner = learner_with(task, made).train()
    sums = learner(collate([Portion("task", "image", [])], made.model))
    torch.stack([total for total, _ in sums.values()]).sum().backward()
    assert float(sums["task"][0].detach()) == 0
    assert [name for name, p in learner.heads.named_parameters() if p.grad is None] == []


def test_blocks_behind_the_last_tap_have_gradients_too():
    made = given(model=replace(CONFIG, layers=3, mask_token=False))
    task = Segmentation(taps=[1, 1, 2, 2])
    learner = learner_with(task, made).train()
    sums = learner(batch_of(task, made))
    sums["task"][0].backward()
    missing = [name for name, p in learner.named_parameters() if p.grad is None]
    assert [name for name in missing if "auxiliary" not in name] == []


def test_operations_of_a_step_hold_the_head():
    task, made = Segmentation(), given()
    learner = learner_with(task, made)
    batch = batch_of(task, made)
    head = learner.heads["segmenter"].operations(3, (4, 4))
    assert task.operations(made.model, batch.plan, batch.groups["task"], learner.heads).heads == head
    assert learner.flops(batch) > 3 * head


def by_hand(answer, pixels, side, stride):
    """Mean logits of all windows, one after the other."""
    height, width = pixels.shape[1:]
    total, seen = 0, torch.zeros(height, width)
    tops = sorted({min(t, height - side) for t in range(0, height - side + stride, stride)})
    lefts = sorted({min(t, width - side) for t in range(0, width - side + stride, stride)})
    for top in tops:
        for left in lefts:
            place = (slice(None), slice(top, top + side), slice(left, left + side))
            full = torch.zeros(2, height, width)
            full[place] = answer(pixels[place][None])[0]
            total = total + full
            seen[place[1:]] += 1
    return total / seen


def local(windows):
    """Logits that depend on the place in the window too, so that every window is different."""
    ramp = torch.linspace(0, 3, windows.shape[-1]).expand(windows.shape[0], windows.shape[-1], -1)
    red = windows[:, 0].float() / 40
    return torch.stack([red * ramp, ramp.transpose(1, 2) + 1], 1)


def noise(height, width):
    return rng(4).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", [(8, 8), (8, 21), (19, 13)])
def test_windows_are_averaged_and_the_last_ends_with_the_picture(size):
    pixels = noise(*size)
    windows = Windows(side=8, stride=5, short_px=min(size))
    found = probabilities(local, pixels, windows, torch.device("cpu"))
    expected = by_hand(local, torch.from_numpy(pixels.transpose(2, 0, 1)), 8, 5).softmax(0)
    assert torch.allclose(found, expected, atol=1e-5)


def test_windows_go_through_the_model_a_few_at_a_time():
    seen = []

    def answer(windows):
        seen.append(len(windows))
        return local(windows)

    probabilities(answer, noise(40, 40), Windows(8, 5, 40), torch.device("cpu"))
    assert sum(seen) == 64
    assert max(seen) == 8


def test_sizes_below_a_window_count_as_the_window_and_are_asked_once():
    assert Windows(16, 8, 16, (0.5, 0.75, 1.0, 1.5)).sizes(20, 30) == {(16, 24): 3, (24, 36): 1}
    assert Windows(16, 8, 32).sizes(30, 20) == {(48, 32): 1}


def test_flipped_pictures_and_sizes_are_averaged_after_the_softmax():
    pixels = noise(8, 8)
    device = torch.device("cpu")
    plain = probabilities(local, pixels, Windows(8, 8, 8), device)
    turned = probabilities(local, np.ascontiguousarray(pixels[:, ::-1]), Windows(8, 8, 8), device).flip(2)
    both = probabilities(local, pixels, Windows(8, 8, 8, flip=True), device)
    assert torch.allclose(both, (plain + turned) / 2, atol=1e-6)
    large = probabilities(local, pixels, Windows(8, 8, 8, (2.0,)), device)
    three = probabilities(local, pixels, Windows(8, 8, 8, (1.0, 0.5, 2.0)), device)
    assert torch.allclose(three, (2 * plain + large) / 3, atol=1e-6)


def test_answers_come_back_to_the_size_of_the_picture_as_torch_resizes(monkeypatch):
    monkeypatch.setattr("beitctl_plugins.tasks.sliding.STRIP", 100)
    kept = []

    def answer(windows):
        kept.append(local(windows))
        return kept[-1]

    found = probabilities(answer, noise(11, 11), Windows(16, 8, 16), torch.device("cpu"))
    expected = F.interpolate(kept[0], (11, 11), mode="bilinear", align_corners=False)[0].softmax(0)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def measured():
    """What a random model says of three pictures, and their score."""
    task, made = Segmentation(), given(train=False)
    learner = learner_with(task, made).eval()
    with torch.no_grad():
        for name, value in learner.heads.named_parameters():
            value += 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
    examples = [example(rng(k).integers(0, 4, (20, 18 + k)).astype(np.uint8), f"e{k}") for k in range(3)]
    with torch.no_grad():
        pairs = [(one, task.prepare(one, rng(), made)) for one in examples]
        outputs = [task.infer(learner, pairs[:2], made), task.infer(learner, pairs[2:], made)]
    train = Given(examples=tuple(example(id=str(k)) for k in range(3))).open()
    return task, made, examples, outputs, task.score(outputs, examples, made, train)


def maps_of(measured):
    """Predicted and true classes of all pixels with a class, read back from the written predictions."""
    task, made, examples, _, found = measured
    said, true = [], []
    for row, one in zip(found.rows, examples, strict=True):
        png = base64.b64decode(json.loads(json.dumps(row))["segmentation"])
        with Image.open(io.BytesIO(png)) as image:
            values = np.asarray(image).astype(int) - 1
        classes = task.prepare(one, rng(), made).extra["classes"]
        said.append(values[classes >= 0])
        true.append(classes[classes >= 0])
    return np.concatenate(said), np.concatenate(true)


def test_the_metrics_are_those_of_a_pixel_by_pixel_count_and_of_torchmetrics(measured):
    said, true = maps_of(measured)
    metrics = measured[-1].metrics
    ious = [((said == k) & (true == k)).sum() / ((said == k) | (true == k)).sum() for k in range(3)]
    recalls = [(said[true == k] == k).mean() for k in range(3)]
    assert metrics["miou"] == pytest.approx(np.mean(ious), rel=1e-9)
    assert metrics["macc"] == pytest.approx(np.mean(recalls), rel=1e-9)
    assert metrics["aacc"] == pytest.approx((said == true).mean(), rel=1e-9)
    reference = MulticlassJaccardIndex(3)(torch.from_numpy(said), torch.from_numpy(true).long())
    assert metrics["miou"] == pytest.approx(reference.item(), rel=1e-5)
    assert next(iter(metrics)) == "miou"
    assert len(set(said)) > 1


def test_the_baseline_names_the_most_frequent_training_class_everywhere(measured):
    _, true = maps_of(measured)
    metrics = measured[-1].metrics
    share = (true == 0).mean()  # the training pictures have as much of both classes: the first is taken
    assert metrics["majority_miou"] == pytest.approx(share / 3)
    assert metrics["majority_aacc"] == pytest.approx(share)
    assert (metrics["examples"], metrics["pixels"]) == (3.0, float(len(true)))


def test_the_interval_resamples_pictures(measured):
    count, statistic = measured[-1].each["miou"]
    assert count == 3
    assert statistic(np.arange(3)) == pytest.approx(measured[-1].metrics["miou"])
    counts = np.stack([one["counts"] for batch in measured[3] for one in batch])
    twice = metrics_of(counts[[0, 0, 2]].sum(0), 0)["miou"]
    assert resampled_miou(counts)(np.array([0, 2, 0])) == pytest.approx(twice)


def test_classes_that_neither_occur_nor_are_predicted_are_left_out_of_the_mean():
    counts = np.array([[4, 0, 0], [4, 2, 0], [6, 0, 0]])
    found = metrics_of(counts, 0)
    assert found["miou"] == pytest.approx((4 / 6 + 0) / 2)
    assert found["macc"] == pytest.approx(4 / 6)


def test_predictions_say_the_iou_of_the_classes_that_occur(measured):
    rows = measured[-1].rows
    assert [row["id"] for row in rows] == ["e0", "e1", "e2"]
    assert set(rows[0]["iou"]) == set(LABELS)


def test_a_class_map_of_many_classes_goes_through_a_deeper_picture():
    numbers = Numbers(300, False, -1)
    classes = np.arange(300, dtype=np.int16).reshape(20, 15)
    assert np.array_equal(from_png(as_png(classes, numbers), numbers), classes)


def test_the_baseline_passes_over_training_pictures_it_cannot_read():
    many = [example(id=str(k)) for k in range(300)]
    many[0] = example(id="bad", segmentation=b"")
    values = np.full((20, 24), 2, np.uint8)
    many[-1] = example(values, id="last")
    assert most_frequent(Given(examples=tuple(many)).open(), Numbers(3, False, -1), given()) == 1
    bad = Given(examples=(example(id="bad", segmentation=b""),)).open()
    with pytest.raises(DataError, match=r"no training picture whose classes can be counted .* bad: the seg"):
        most_frequent(bad, Numbers(3, False, -1), given())


def test_the_report_shows_a_table_of_classes_and_pictures_with_the_worst(measured):
    task, made, examples, outputs, _ = measured
    log = Record()
    task.draw(outputs, examples, made, log)
    ((name, _, columns, rows),) = log.said["table"]
    assert (name, columns[:2]) == ("classes", ["class", "IoU"])
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    ((figure, png, *_),) = log.said["figure"]
    assert figure == "segmentations"
    assert png.startswith(b"\x89PNG")


def test_the_toy_size_reads_pasted_objects_with_their_background():
    table = {"class_names": "ade.txt", "taps": [4, 6, 8, 12], "scales": [0.5, 1], "dropout": 0.2}
    assert Segmentation.smoke(table) == {"dropout": 0.2, "background": True}
    assert Segmentation.smoke_data("test") == {"kind": "embedded", "content": "objects", "split": "test"}


def test_the_model_ends_without_a_norm_and_is_normalised_as_asked():
    assert Segmentation().fitted(MODEL) == replace(MODEL, final_norm=False)
    assert Segmentation(pixels="imagenet").fitted(MODEL).pixels == "imagenet"
