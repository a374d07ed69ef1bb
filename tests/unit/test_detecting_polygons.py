"""Polygons to pixels, against COCO's own code."""

import numpy as np
import pytest
from faster_coco_eval import mask as official

from beitctl_plugins.tasks.detecting.polygons import filled


def theirs(points, height, width):
    return official.decode(official.frPyObjects([points.ravel().tolist()], height, width))[..., 0].astype(
        bool
    )


def polygons(kind, rng):
    """Corners (k, 2): with fractions, whole, or reaching out of the picture; some come twice."""
    count = int(rng.integers(3, 12))
    scale, start = {"inside": (40, 0), "whole": (40, 0), "outside": (90, -25)}[kind]
    points = start + scale * rng.random((count, 2))
    points = points.round(0 if kind == "whole" else 2)
    return np.concatenate([points, points[:1], points[:1]]) if rng.random() < 0.3 else points


@pytest.mark.parametrize("kind", ["inside", "whole", "outside"])
def test_pixels_are_those_of_coco(kind):
    rng = np.random.default_rng(0)
    filled_ones = 0
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        points = polygons(kind, rng)
        mine = filled(points, height, width)
        assert mine.shape == (height, width)
        assert np.array_equal(mine, theirs(points, height, width)), points.tolist()
        filled_ones += mine.any()
    assert filled_ones > 100


def test_a_square_along_pixels_has_its_area():
    found = filled(np.array([[2.0, 1.0], [7.0, 1.0], [7.0, 4.0], [2.0, 4.0]]), 6, 9)
    assert found.sum() == 15
    assert found[1:4, 2:7].all()


@pytest.mark.parametrize(
    "points", [[[3, 3], [3, 3], [3, 3]], [[1, 1], [5, 1], [1, 1]], [[-9, -9], [-5, -9], [-5, -4]]],
    ids=["point", "line", "outside"],
)  # fmt: skip
def test_polygons_without_area_in_the_picture_are_empty(points):
    assert not filled(np.array(points, np.float64), 8, 8).any()
