import io

import numpy as np
import pytest
from PIL import Image

from beitctl.errors import DataError
from beitctl.report import code_figures, code_numbers, figures


def rng(seed=0):
    return np.random.default_rng(seed)


def pictures(n=12):
    """Pictures of 4 x 4 patches of one colour each."""
    return rng().integers(0, 256, (n, 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def has(png, colour, tolerance=6):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(pixels(png) - wanted).max(-1) <= tolerance).any())


def test_gallery_shows_the_closest_patch_framed():
    views = np.zeros((2, 3, 32, 32), np.uint8)
    views[0, :, 8:16, 8:16] = np.array([250, 0, 250])[:, None, None]
    drawn, near = np.zeros((2, 16), int), np.zeros((2, 16))
    drawn[0, 5], near[0, 5] = 3, 1
    png = code_figures.gallery(views, drawn, near, 4)
    assert has(png, "#FA00FA")
    assert has(png, code_figures.FRAME)


def test_patches_come_from_different_pictures_first():
    drawn = np.full((3, 4), 1)
    near = np.array([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2], [0.1, 0.0, -0.1, np.nan]])
    near = np.where(np.isnan(near), -np.inf, near)
    assert code_figures._closest(drawn, near, 1)[:4] == [(0, 0), (1, 0), (2, 0), (0, 1)]


def test_rare_codes_are_those_with_enough_uses_to_see_something():
    counts = np.array([100] * 12 + [50] * 10 + [1] * 10)
    common, rare = code_figures._choose(counts, counts)
    assert (counts[common] == 100).all()
    assert counts[rare].tolist() == [50] * 8


def test_rare_codes_of_single_uses_are_shown_where_there_are_no_others():
    counts = np.array([100] * 12 + [1] * 10)
    assert counts[code_figures._choose(counts, counts)[1]].tolist() == [1] * 8


def test_codes_that_are_not_in_the_views_are_not_chosen():
    common, rare = code_figures._choose(np.array([9, 5, 1]), np.array([0, 2, 1]))
    assert [*common, *rare] == [1, 2]


def test_usage_over_time_shows_codes_that_are_never_used():
    full, half = np.full(8, 4), np.array([8] * 4 + [0] * 4)
    unused = [
        (
            np.abs(pixels(code_figures.usage_over_time([(10, counts), (20, counts)], 8)) - 0xD9).max(-1) < 3
        ).sum()
        for counts in (full, half)
    ]
    assert unused[1] > 20 * unused[0]


def test_the_order_of_windows_does_not_matter():
    windows = [(step, rng(step).integers(0, 9, 40)) for step in (10, 20, 30)]
    assert code_figures.usage_over_time(windows, 40) == code_figures.usage_over_time(windows[::-1], 40)


def test_many_windows_keep_the_last():
    places = code_numbers.spread(1001, code_figures.MAX_WINDOWS)
    assert len(places) == code_figures.MAX_WINDOWS
    assert places[0] == 0, "counted from the end: the last window is always drawn"


@pytest.mark.parametrize(
    "windows",
    [[(0, np.zeros(8))], [(5, np.eye(8)[0]), (6, np.ones(8))], [(s, np.ones(8) / 3) for s in range(500)]],
)
def test_usage_over_time_survives(windows):
    assert len(code_figures.usage_over_time(windows, 8)) < figures.MAX_BYTES


@pytest.mark.parametrize("windows", [[], [(1, np.ones(7))]])
def test_windows_that_do_not_fit_are_refused(windows):
    with pytest.raises(DataError, match=r"windows of codebook usage: .*expected \(8,\) counts"):
        code_figures.usage_over_time(windows, 8)


@pytest.mark.parametrize("n", [1, 5, 13])
def test_similarity_maps_take_any_number_of_pictures(n):
    png = code_figures.similarity_maps(pictures(13), rng().uniform(-0.5, 1, (n, 4, 4)))
    assert len(png) <= figures.MAX_BYTES


def test_similarity_maps_survive_equal_cosines():
    assert code_figures.similarity_maps(pictures(2), np.ones((2, 4, 4))).startswith(b"\x89PNG")


def test_cosines_that_rounding_lifts_above_one_count_as_one():
    lifted, one = (code_figures.similarity_maps(pictures(2), np.full((2, 4, 4), v)) for v in (1.000001, 1.0))
    assert lifted == one


def test_the_colour_of_a_map_follows_the_cosine():
    view, norm = np.full((3, 8, 8), 128, np.uint8), code_figures.Normalize(0, 1)
    low, high = (code_figures._covered(view, np.full((2, 2), value), norm) for value in (0.0, 1.0))
    assert high[..., 1].min() > low[..., 1].max() + 0.3, "viridis: yellow is high, purple low"


@pytest.mark.parametrize(
    ("cosine", "message"),
    [
        (np.full((1, 4, 4), np.nan), "16 of 16 values are not finite"),
        (np.zeros((1, 4, 3)), r"shape \(1, 4, 3\)"),
        (np.zeros((3, 4, 4)), r"shape \(3, 4, 4\) for 2 views"),
        (np.zeros((0, 4, 4)), r"shape \(0, 4, 4\)"),
    ],
)
def test_cosines_that_cannot_be_are_refused(cosine, message):
    with pytest.raises(DataError, match=message):
        code_figures.similarity_maps(pictures(2), cosine)


def test_neighbours_of_the_same_class_have_another_frame():
    drawn = np.repeat(np.array([0, 0, 1, 1])[:, None], 16, 1)
    png = code_figures.nearest(pictures(4), drawn, 2, np.array([0, 0, 1, 1]))
    assert has(png, figures.GREEN, 0)
    assert has(png, figures.RED, 0)
    bare = code_figures.nearest(pictures(4), drawn, 2)
    assert not has(bare, figures.GREEN, 0)


def test_codes_that_fill_no_square_are_refused():
    with pytest.raises(DataError, match="15 for each picture; expected a square number"):
        code_figures.gallery(pictures(2), np.zeros((2, 15), int), np.zeros((2, 15)), 4)


def test_closeness_of_another_shape_is_refused():
    with pytest.raises(DataError, match="do not belong together"):
        code_figures.gallery(pictures(2), np.zeros((2, 16), int), np.zeros((2, 9)), 4)
