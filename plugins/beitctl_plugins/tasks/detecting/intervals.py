"""COCO's average precision of some of the pictures, many times over: for bootstrap intervals.

faster-coco-eval would match all detections anew for every draw; here they are matched once. It must be there.

Letters: n pictures, V classes, D detections, T thresholds of IoU (0.5, 0.55, .. 0.95), G objects.
Source: ``evaluateImg`` and ``accumulate`` of ``pycocotools/cocoeval.py``, here for objects of all sizes.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100
"""Detections of a class in a picture that count."""

Rows = Sequence[Mapping[str, Any]]
Floats = NDArray[np.float64]
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class OfClass:
    """The detections of one class, the surest first."""

    rows: NDArray[np.int64]
    """(D,) which of the results they are."""
    images: NDArray[np.int64]
    """(D,) number of the picture, from 0."""
    right: Bits
    """(T, D) whether they find an object."""
    counted: Bits
    """(T, D) False where they find a crowd, which is neither right nor wrong."""
    objects: NDArray[np.int64]
    """(n,) objects of the class in every picture, crowds left out."""


def matched(truth: Mapping[str, Any], results: Rows, kind: str) -> list[OfClass]:
    """Which detections are right, for every class of which there are objects.

    Args:
        truth: pictures, classes and objects in the form of COCO's annotations.
        results: detections in the form of COCO's results.
        kind: ``bbox`` or ``segm``.
    """
    pictures = {one["id"]: number for number, one in enumerate(truth["images"])}
    objects: dict[Any, list[Any]] = defaultdict(list)
    for thing in truth["annotations"]:
        objects[thing["category_id"], pictures[thing["image_id"]]].append(thing)
    said: dict[Any, list[int]] = defaultdict(list)
    for row, one in enumerate(results):
        said[one["category_id"], pictures[one["image_id"]]].append(row)
    found = []
    for category in sorted(one["id"] for one in truth["categories"]):
        counts = np.zeros(len(pictures), np.int64)
        for number in range(len(pictures)):
            counts[number] = sum(not thing["iscrowd"] for thing in objects.get((category, number), ()))
        if counts.any():
            pairs = [
                (number, rows, objects.get((category, number), []))
                for number in range(len(pictures))
                if (rows := said.get((category, number), []))
            ]
            found.append(_of_class(pairs, results, counts, kind))
    return found


def _of_class(
    pairs: Sequence[tuple[int, list[int], list[Any]]], results: Rows, counts: NDArray[np.int64], kind: str
) -> OfClass:
    """Detections of one class from picture, results and objects of every picture."""
    rows, images = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    right, counted = ([np.zeros((len(THRESHOLDS), 0), np.bool_)] for _ in range(2))
    for number, mine, things in pairs:
        scores = np.array([results[row]["score"] for row in mine])
        best = np.array(mine)[np.argsort(-scores, kind="mergesort")][:MOST]
        things = sorted(things, key=lambda thing: bool(thing["iscrowd"]))
        crowd = np.array([bool(thing["iscrowd"]) for thing in things], np.bool_)
        finds, of_crowd = _matches(_overlaps([results[row] for row in best], things, kind), crowd)
        rows.append(best)
        images.append(np.full(len(best), number))
        right.append(finds & ~of_crowd)
        counted.append(~of_crowd)
    every = np.concatenate(rows)
    order = np.argsort([-results[row]["score"] for row in every], kind="mergesort")
    return OfClass(
        every[order],
        np.concatenate(images)[order],
        np.concatenate(right, 1)[:, order],
        np.concatenate(counted, 1)[:, order],
        counts,
    )


def _overlaps(said: Rows, things: Rows, kind: str) -> Floats:
    """(D, G) IoU; with a crowd, the share of the detection that lies in it."""
    from faster_coco_eval import mask  # noqa: PLC0415 - only where it is installed

    if not things:
        return np.zeros((len(said), 0))
    key = "segmentation" if kind == "segm" else "bbox"
    crowd = [int(thing["iscrowd"]) for thing in things]
    found: Floats = np.asarray(mask.iou([s[key] for s in said], [t[key] for t in things], crowd), np.float64)
    return found


def _matches(overlaps: Floats, crowd: Bits) -> tuple[Bits, Bits]:
    """Whether each detection finds something, and whether that is a crowd; (T, D) each.

    Args:
        overlaps: (D, G), the surest detection first, crowds last.
        crowd: (G,).
    """
    shape = (len(THRESHOLDS), len(overlaps))
    finds, of_crowd = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    free = np.ones((len(THRESHOLDS), len(crowd)), np.bool_)
    every = np.arange(len(THRESHOLDS))
    for place, row in enumerate(overlaps if len(crowd) else ()):
        good = free & (row >= np.minimum(THRESHOLDS, 1 - 1e-10)[:, None])
        alone = good & ~crowd
        good = np.where(alone.any(1, keepdims=True), alone, good)
        best = len(crowd) - 1 - np.where(good, row, -1.0)[:, ::-1].argmax(1)
        there = good[every, best]
        finds[:, place], of_crowd[:, place] = there, there & crowd[best]
        free[every[there], best[there]] = crowd[best[there]]
    return finds, of_crowd


def resampled(classes: Sequence[OfClass], thresholds: int) -> Callable[[NDArray[np.int64]], float]:
    """Mean average precision of pictures by their numbers, drawn with replacement.

    A picture that is drawn twice counts twice. The result is COCO's, but for the order of detections of equal
    score in such a picture.
    Classes without an object among the drawn are left out.

    Args:
        classes: matched detections.
        thresholds: how many of the thresholds count: 1: AP50, 10: AP.
    """

    def found(chosen: NDArray[np.int64]) -> float:
        values = [_precision(one, chosen, thresholds) for one in classes]
        there = [value for value in values if not np.isnan(value)]
        return float(np.mean(there)) if there else float("nan")

    return found


def _precision(one: OfClass, chosen: NDArray[np.int64], thresholds: int) -> float:
    """Average precision of a class, mean over thresholds; nan without objects."""
    times = np.bincount(chosen, minlength=len(one.objects))
    objects = int(times @ one.objects)
    if not objects:
        return float("nan")
    drawn = np.repeat(np.arange(len(one.images)), times[one.images])
    right, counted = one.right[:thresholds, drawn], one.counted[:thresholds, drawn]
    hits, wrong = right.cumsum(1), (counted & ~right).cumsum(1)
    share = hits / np.maximum(hits + wrong, np.spacing(1))
    share = np.maximum.accumulate(share[:, ::-1], 1)[:, ::-1]
    total = 0.0
    for recall, precision in zip(hits / objects, share, strict=True):
        places = np.searchsorted(recall, RECALLS, side="left")
        total += precision[places[places < len(precision)]].sum()
    return float(total / (thresholds * len(RECALLS)))
