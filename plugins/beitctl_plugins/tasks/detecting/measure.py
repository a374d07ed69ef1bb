"""How well objects were found: COCO's measures by faster-coco-eval, a baseline, tables and pictures.

An output is what the task says of a picture: ``id``, ``size`` (height and width), ``boxes`` (k, 4) left, top,
right, bottom in pixels of the original, ``scores`` (k,) best first, ``classes`` (k,) from 1, and ``masks``, a
list of k compressed run-length encodings, empty where there is no mask head.
"""

import colorsys
import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from beitctl.api import Example, Examples, Log, Tools
from beitctl.errors import DataError, SetupError
from beitctl.report import figures
from beitctl_plugins.tasks.detecting.masks import decoded
from beitctl_plugins.tasks.detecting.views import corners, mask_of
from beitctl_plugins.tasks.segment_scores import GOLDEN

SAMPLED = 200
"""Training pictures that the baseline is read from, evenly spread: reading all takes minutes."""
TOLD = 20
"""Detections of a picture in ``predictions.jsonl``, at most."""
SHOWN = 8
"""Pictures in the gallery."""
SURE = 0.3
"""Detections with a lower score are not drawn."""
TILE_PX = 160
SIZES = ("small", "medium", "large")
"""Below 32 x 32 pixels, up to 96 x 96, and above."""

Output = Mapping[str, Any]
Precision = NDArray[np.float64]
"""(thresholds of IoU, recalls, classes, sizes) precision, -1 where there is no object."""


def category_ids(labels: Sequence[str]) -> dict[str, int]:
    """Numbers of the classes in files for COCO: COCO's own if all are classes of COCO, else 1, 2, .."""
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    official = {name: number for number, name in enumerate(names) if number and name != "N/A"}
    if set(labels) <= set(official):
        return {label: official[label] for label in labels}
    return {label: number for number, label in enumerate(labels, 1)}


def image_ids(ids: Sequence[str]) -> list[int]:
    """Numbers of the pictures: their file names if all of them are numbers, as COCO's, else 1, 2, .."""
    stems = [PurePosixPath(id).stem for id in ids]
    if all(stem.isascii() and stem.isdigit() for stem in stems) and len(set(map(int, stems))) == len(ids):
        return [int(stem) for stem in stems]
    return list(range(1, len(ids) + 1))


def results_of(outputs: Sequence[Output], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Detections in the form of COCO's results."""
    numbers = category_ids(labels)
    found: list[dict[str, Any]] = []
    for image, output in zip(image_ids([one["id"] for one in outputs]), outputs, strict=True):
        for place, box in enumerate(_wide(output["boxes"])):
            row = {
                "image_id": image,
                "category_id": numbers[labels[int(output["classes"][place]) - 1]],
                "bbox": box,
                "score": float(output["scores"][place]),
            }
            found.append(row | ({"segmentation": output["masks"][place]} if output["masks"] else {}))
    return found


def _wide(boxes: NDArray[Any]) -> list[list[float]]:
    """Corners to left, top, width and height, as COCO has them."""
    return [[float(a), float(b), float(c - a), float(d - b)] for a, b, c, d in boxes.astype(np.float64)]


def truth_of(
    outputs: Sequence[Output], examples: Sequence[Example], labels: Sequence[str], masks: bool
) -> dict[str, Any]:
    """The objects of the pictures in the form of COCO's annotations."""
    numbers = category_ids(labels)
    ids = image_ids([one["id"] for one in outputs])
    things: list[dict[str, Any]] = []
    for image, output, example in zip(ids, outputs, examples, strict=True):
        height, width = (int(side) for side in output["size"])
        for thing in example.objects:
            box = _wide(np.array([corners(thing, example.id, width, height)]))[0]
            row = {
                "id": len(things) + 1, "image_id": image, "category_id": numbers[thing.label], "bbox": box,
                "iscrowd": int(thing.crowd), "area": box[2] * box[3],
            }  # fmt: skip
            if masks:
                bits = mask_of(thing, example.id, width, height)
                row |= {"segmentation": thing.mask, "area": float(bits.sum())}
            things.append(row)
    return {
        "images": [
            {"id": image, "height": int(one["size"][0]), "width": int(one["size"][1]), "file_name": one["id"]}
            for image, one in zip(ids, outputs, strict=True)
        ],
        "categories": [{"id": numbers[label], "name": label} for label in labels],
        "annotations": things,
    }


def precision(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: str) -> Precision:
    """COCO's precision of boxes (``bbox``) or masks (``segm``) at 100 detections a picture.

    Classes are in the order of their numbers.

    Raises:
        SetupError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster  # noqa: PLC0415 - only where it is installed
    except ImportError as error:
        raise SetupError("measuring detection needs faster-coco-eval: pip install 'beitctl[eval]'") from error
    known = COCO(copy.deepcopy(dict(truth)))
    own = "segmentation" if kind == "segm" else "bbox"
    rows = [{key: row[key] for key in ("image_id", "category_id", "score", own)} for row in results]
    evaluation = COCOeval_faster(known, known.loadRes(copy.deepcopy(rows)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    found: Precision = np.asarray(evaluation.eval["precision"], np.float64)[..., -1]
    return found


def mean_of(values: Precision) -> float:
    """Mean where there are objects; nan if there are none."""
    there = values[values > -1]
    return float(there.mean()) if there.size else math.nan


def metrics_of(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], masks: bool
) -> dict[str, float]:
    """Mean average precisions; those of a size of which there are no objects are left out."""
    boxes = precision(truth, results, "bbox")
    found = {"box_map": mean_of(boxes[..., 0]), "box_map50": mean_of(boxes[0, ..., 0])}
    if masks:
        pixels = precision(truth, results, "segm")
        found |= {"mask_map": mean_of(pixels[..., 0]), "mask_map50": mean_of(pixels[0, ..., 0])}
    found |= {f"box_map_{size}": mean_of(boxes[..., place]) for place, size in enumerate(SIZES, 1)}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def trivial(train: Examples, tools: Tools) -> tuple[str, tuple[float, float, float, float]]:
    """The most frequent class of training objects, and their mean box as shares of a picture.

    Read from at most ``SAMPLED`` pictures, evenly spread; crowds are left out.

    Raises:
        DataError: there is not one object in them.
    """
    boxes: list[NDArray[np.float64]] = []
    names: Counter[str] = Counter()
    problem = "they have none"
    for index in np.unique(np.linspace(0, len(train) - 1, SAMPLED).round().astype(int)) if len(train) else ():
        try:
            example = train[int(index)]
            things = [thing for thing in example.objects if not thing.crowd]
            if not things or example.image is None:
                continue
            width, height = tools.pictures.size(example.image, example.id)
            found = [corners(thing, example.id, width, height) for thing in things]
        except DataError as error:
            problem = str(error)
            continue
        boxes += [np.array(box) / [width, height, width, height] for box in found]
        names.update(thing.label for thing in things)
    if not boxes:
        raise DataError(f"no object of training pictures that the baseline could be read from: {problem}")
    left, top, right, bottom = (float(side) for side in np.mean(boxes, axis=0))
    name = min(names, key=lambda one: (-names[one], one))
    return name, (left, top, right, bottom)


def trivial_results(
    truth: Mapping[str, Any], name: str, box: tuple[float, float, float, float]
) -> list[dict[str, Any]]:
    """The same class and box in every picture."""
    (number,) = (one["id"] for one in truth["categories"] if one["name"] == name)
    left, top, right, bottom = box
    return [
        {
            "image_id": image["id"], "category_id": number, "score": 1.0,
            "bbox": [
                left * image["width"], top * image["height"],
                (right - left) * image["width"], (bottom - top) * image["height"],
            ],
        }
        for image in truth["images"]
    ]  # fmt: skip


def row_of(output: Output, example: Example, labels: Sequence[str]) -> dict[str, Any]:
    """What ``predictions.jsonl`` says of a picture; boxes are left, top, width, height."""
    boxes = _wide(output["boxes"][:TOLD])
    return {
        "id": output["id"],
        "detections": [
            {
                "label": labels[int(output["classes"][place]) - 1],
                "score": float(output["scores"][place]),
                "box": box,
            }
            for place, box in enumerate(boxes)
        ],
        "objects": [
            {"label": thing.label, "box": list(thing.box), "crowd": thing.crowd} for thing in example.objects
        ],
    }


def draw_classes(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], masks: bool, log: Log
) -> None:
    """A table of the classes that occur, the hardest first."""
    kinds = ["bbox", "segm"] if masks else ["bbox"]
    tables = [precision(truth, results, kind) for kind in kinds]
    names = {one["id"]: one["name"] for one in truth["categories"]}
    counts = Counter(one["category_id"] for one in truth["annotations"] if not one["iscrowd"])
    rows = []
    for place, number in enumerate(sorted(names)):
        if counts[number]:
            values = [mean_of(part) for t in tables for part in (t[:, :, place, 0], t[0, :, place, 0])]
            rows.append([names[number], counts[number], *values])
    columns = ["class", "objects", "box AP", "box AP50", "mask AP", "mask AP50"][: 2 + 2 * len(kinds)]
    title = "Average precision of every class, the hardest first"
    log.table("classes", title, columns, sorted(rows, key=lambda row: (row[2], row[0])))


def draw_pictures(outputs: Sequence[Output], examples: Sequence[Example], tools: Tools, log: Log) -> None:
    """Some pictures, evenly spread, with their true objects and with what was found."""
    rows = []
    for index in sorted({round(place) for place in np.linspace(0, len(outputs) - 1, SHOWN)}):
        rows.append(figures.Row(_tiles(outputs[index], examples[index], tools), outputs[index]["id"]))
    log.figure(
        "detections",
        figures.gallery(rows, ("true objects", "found objects"), tile_px=TILE_PX),
        "Detections",
        f"Every class has one colour; detections with a score below {SURE:g} are not drawn.",
    )


def _tiles(output: Output, example: Example, tools: Tools) -> list[figures.Tile]:
    assert example.image is not None
    picture = tools.pictures.open(example.image, example.id).pil()
    width, height = picture.size
    number = {label: place for place, label in enumerate(tools.labels)}
    true = [
        (number[t.label], corners(t, example.id, width, height), t.mask)
        for t in example.objects
        if not t.crowd
    ]
    sure = int((output["scores"] >= SURE).sum())
    masks = output["masks"] or [None] * sure
    said = [
        (int(output["classes"][k]) - 1, tuple(map(float, output["boxes"][k])), masks[k]) for k in range(sure)
    ]
    captions = [
        ", ".join(tools.labels[k] for k, _, _ in true[:4]),
        ", ".join(f"{tools.labels[one[0]]} {output['scores'][k]:.0%}" for k, one in enumerate(said[:4])),
    ]
    both: Any = zip((true, said), captions, strict=True)
    return [figures.Tile(_painted(picture, things), text) for things, text in both]


def _painted(picture: Image.Image, things: Sequence[tuple[int, Any, Any]]) -> NDArray[np.uint8]:
    """A picture, made small, with masks and boxes over it."""
    width, height = picture.size
    pixels = np.asarray(picture).astype(np.float32)
    for number, _, mask in things:
        if mask is not None:
            bits = decoded(mask, height, width)
            pixels[bits] = 0.5 * pixels[bits] + 0.5 * np.array(_colour(number), np.float32)
    small = Image.fromarray(pixels.round().astype(np.uint8))
    small.thumbnail((TILE_PX, TILE_PX))
    pen, factor = ImageDraw.Draw(small), small.width / width
    for number, box, _ in things:
        pen.rectangle([side * factor for side in box], outline=_colour(number), width=1)
    return np.array(small)


def _colour(number: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb((number * GOLDEN) % 1, 0.9, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)
