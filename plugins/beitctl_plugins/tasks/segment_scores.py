"""How well pictures were segmented: counts of pixels, what follows from them, and what it looks like.

Letters: n pictures, V classes. Counts (.., 3, V): pixels of every class that are right, predicted and true,
among those that have a class.
"""

import base64
import colorsys
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beitctl.api import Example, Examples, Log, Tools
from beitctl.errors import DataError
from beitctl.report import figures
from beitctl_plugins.tasks.dense_views import Classes, Numbers, classes_in, nearest

SAMPLED = 200
"""Training pictures whose classes the baseline is read from, evenly spread: reading all takes minutes."""
SHOWN = 4
"""Pictures of each kind in the gallery."""
TILE_PX = 144
GOLDEN = 0.618034
"""Step from one hue to the next: neighbours differ."""

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def counted(said: Classes, true: Classes, classes: int) -> Counts:
    """(3, V) counts of one picture from the predicted and the true class of every pixel, (H, W) each."""
    known = true >= 0
    said, true = said[known], true[known]
    parts = (true[said == true], said, true)
    return np.stack([np.bincount(part, minlength=classes) for part in parts]).astype(np.int64)


def ious(counts: NDArray[Any]) -> Floats:
    """(V,) intersection over union; nan of classes that neither occur nor are predicted."""
    right, said, true = counts.astype(np.float64)
    return _ratio(right, said + true - right)


def accuracies(counts: NDArray[Any]) -> Floats:
    """(V,) share of every class's pixels that are right; nan of classes that do not occur."""
    return _ratio(counts[0].astype(np.float64), counts[2].astype(np.float64))


def miou(counts: NDArray[Any]) -> float:
    """Mean IoU over the classes that occur or are predicted, as of mmsegmentation."""
    return float(np.nanmean(ious(counts)))


def _ratio(part: Floats, whole: Floats) -> Floats:
    found: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return found


def metrics_of(counts: Counts, frequent: int) -> dict[str, float]:
    """Metrics of (3, V) counts, and those of naming the class ``frequent`` everywhere."""
    everywhere = np.zeros_like(counts)
    everywhere[2] = counts[2]
    everywhere[0, frequent] = counts[2, frequent]
    everywhere[1, frequent] = counts[2].sum()
    pixels = float(counts[2].sum())
    return {
        "miou": miou(counts),
        "macc": float(np.nanmean(accuracies(counts))),
        "aacc": float(counts[0].sum() / pixels),
        "majority_miou": miou(everywhere),
        "majority_aacc": float(counts[2, frequent] / pixels),
        "pixels": pixels,
    }


def resampled_miou(each: Counts) -> Any:
    """The mIoU of some pictures by their numbers, drawn with replacement, from (n, 3, V) counts."""
    flat = each.reshape(len(each), -1).astype(np.float64)

    def found(chosen: NDArray[np.int64]) -> float:
        times = np.bincount(chosen, minlength=len(flat)).astype(np.float64)
        return miou((times @ flat).reshape(each.shape[1:]))

    return found


def most_frequent(train: Examples, numbers: Numbers, tools: Tools) -> int:
    """The class with the most pixels in at most ``SAMPLED`` training pictures.

    Raises:
        DataError: not one of them can be read.
    """
    total = np.zeros(numbers.classes, np.int64)
    problem = "it is empty"
    for index in np.unique(np.linspace(0, len(train) - 1, SAMPLED).round().astype(int)) if len(train) else ():
        try:
            true = classes_of(train[int(index)], numbers, tools)
        except DataError as error:
            problem = str(error)
            continue
        total += np.bincount(true[true >= 0], minlength=numbers.classes)
    if not total.any():
        raise DataError(f"no training picture whose classes can be counted for the baseline: {problem}")
    return int(total.argmax())


def classes_of(example: Example, numbers: Numbers, tools: Tools) -> Classes:
    """(H, W) classes of an example's pixels; of its picture only the header is read.

    Raises:
        DataError: it has no picture or no segmentation, or they cannot be used.
    """
    if example.image is None:
        raise DataError(f"{example.id}: no picture")
    if example.segmentation is None:
        raise DataError(f"{example.id}: no segmentation, the picture that holds the class of every pixel")
    size = tools.pictures.size(example.image, example.id)
    return classes_in(example.segmentation, example.id, size, numbers)


def as_png(said: Classes, numbers: Numbers) -> bytes:
    """(H, W) classes as a grey PNG in the values that the source has: the first class is 1, or 0."""
    values = said + (0 if numbers.background else 1)
    stream = io.BytesIO()
    kind = np.uint8 if numbers.classes < 256 else np.uint16
    Image.fromarray(values.astype(kind)).save(stream, "PNG")
    return stream.getvalue()


def from_png(data: bytes, numbers: Numbers) -> Classes:
    """The way back of ``as_png``."""
    with Image.open(io.BytesIO(data)) as image:
        values = np.asarray(image).astype(np.int16)
    return values - np.int16(0 if numbers.background else 1)


def row_of(output: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """What ``predictions.jsonl`` says of a picture; the segmentation is a PNG in base64."""
    by_class = ious(output["counts"])
    return {
        "id": output["id"],
        "miou": miou(output["counts"]),
        "iou": {labels[int(k)]: float(by_class[k]) for k in np.flatnonzero(output["counts"][2])},
        "segmentation": base64.b64encode(output["png"]).decode("ascii"),
    }


def draw_classes(counts: Counts, labels: Sequence[str], log: Log) -> None:
    """A table of the classes that occur or are predicted, the hardest first."""
    by_class, right = ious(counts), accuracies(counts)
    shares = counts[1:] / counts[2].sum()
    there = [int(k) for k in np.argsort(by_class, kind="stable") if not np.isnan(by_class[k])]
    rows = [
        [
            labels[k],
            float(by_class[k]),
            "" if np.isnan(right[k]) else float(right[k]),
            float(shares[1, k]),
            float(shares[0, k]),
        ]
        for k in there
    ]
    columns = ["class", "IoU", "accuracy", "share of pixels, true", "share of pixels, predicted"]
    log.table("classes", "Intersection over union of every class, the hardest first", columns, rows)


def draw_pictures(
    outputs: Sequence[Mapping[str, Any]],
    examples: Sequence[Example],
    numbers: Numbers,
    tools: Tools,
    log: Log,
) -> None:
    """Pictures beside their true and predicted classes: some evenly spread, and the worst."""
    scores = [miou(output["counts"]) for output in outputs]
    spread = sorted({round(place) for place in np.linspace(0, len(outputs) - 1, SHOWN)})
    worst = [int(k) for k in np.argsort(scores, kind="stable") if int(k) not in spread][:SHOWN]
    rows = []
    for index in [*spread, *worst]:
        kind = "among the worst" if index in worst else "evenly spread"
        title = f"{outputs[index]['id']}: mIoU {scores[index]:.2f} ({kind})"
        rows.append(figures.Row(_tiles(outputs[index], examples[index], numbers, tools), title))
    log.figure(
        "segmentations",
        figures.gallery(rows, ("picture", "true classes", "predicted classes"), tile_px=TILE_PX),
        "Segmentations",
        "Every class has one colour; where there is none, the pixels have no class"
        + (f" or are {tools.labels[0]}." if numbers.background else "."),
    )


def _tiles(output: Mapping[str, Any], example: Example, numbers: Numbers, tools: Tools) -> list[figures.Tile]:
    assert example.image is not None
    picture = tools.pictures.open(example.image, example.id).pil()
    picture.thumbnail((TILE_PX, TILE_PX))
    pixels = np.asarray(picture)
    tiles = [figures.Tile(pixels)]
    for classes in (classes_of(example, numbers, tools), from_png(output["png"], numbers)):
        small = nearest(classes, pixels.shape[1], pixels.shape[0])
        named = [tools.labels[k] for k in np.bincount(small[small >= 0]).argsort()[::-1][:4] if k in small]
        tiles.append(figures.Tile(painted(pixels, small, numbers.background), ", ".join(named)))
    return tiles


def painted(pixels: NDArray[np.uint8], classes: Classes, background: bool) -> NDArray[np.uint8]:
    """(H, W, 3) with the colours of classes (H, W) over it; a background stays as it is."""
    found = pixels.astype(np.float32)
    for k in np.unique(classes):
        if k >= (1 if background else 0):
            hue, deep = (int(k) * GOLDEN) % 1, 0.95 - 0.3 * (int(k) % 3) / 2
            colour = np.array(colorsys.hsv_to_rgb(hue, 0.9, deep), np.float32) * 255
            found[classes == k] = 0.35 * found[classes == k] + 0.65 * colour
    return found.round().astype(np.uint8)
