import io

import numpy as np
import pytest
from PIL import Image

from beitctl.report import figures
from beitctl.report.figures import MAX_BYTES, Row, Tile


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def has(png, colour, tolerance=6):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(pixels(png) - wanted).max(-1) <= tolerance).any())


def noise(px, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (px, px, 3), dtype=np.uint8)


def ramp(count):
    return [(step, float(step)) for step in range(count)]


def test_each_curve_has_its_own_colour():
    png = figures.curves({"image": ramp(10), "text": [(s, 1.0) for s in range(10)]}, "Loss", "loss")
    assert has(png, figures.BLUE)
    assert has(png, figures.RED)


def test_one_curve_uses_only_the_first_colour():
    png = figures.curves({"image": ramp(10)}, "Loss", "loss")
    assert has(png, figures.BLUE)
    assert not has(png, figures.RED)


def count(png, colour):
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(png) - wanted).max(-1) <= 6).sum())


def test_a_reference_has_the_colour_of_its_line():
    lines = {"image": [(0, 1.0)], "text": [(0, 2.0)]}
    plain, marked = (figures.curves(lines, "A", "a", r) for r in ({}, {"text: baseline": 1.5}))
    assert count(marked, figures.RED) > count(plain, figures.RED) + 100
    assert count(marked, figures.BLUE) <= count(plain, figures.BLUE)


def test_restarts_are_drawn():
    png, marked = (figures.curves({"a": ramp(10)}, "A", "a", restarts=r) for r in ((), (5,)))
    assert not has(png, figures.FAINT, 0)
    assert has(marked, figures.FAINT, 0)


@pytest.mark.parametrize(
    "points", [[], [(1, 2.0)], [(1, float("nan")), (2, float("inf"))], [(1, 1e308), (2, -1e308)]]
)
def test_curves_survive(points):
    assert pixels(figures.curves({"a": points}, "A", "a")).shape[2] == 3


def test_curves_survive_gaps_in_long_lines():
    points = [(s, float("nan") if s % 3 else 1.0) for s in range(1000)]
    assert has(figures.curves({"a": points}, "A", "a"), figures.BLUE)


def test_no_curves_make_a_picture():
    assert figures.curves({}, "A", "a").startswith(b"\x89PNG")


def test_small_charts_show_zero():
    shown = pixels(figures.curves({"a": [(0, 99.0), (1, 100.0)]}, "", "a", small=True))
    rows = np.nonzero((np.abs(shown - [0, 0x72, 0xB2]).max(-1) <= 6).any(1))[0]
    assert rows.max() < shown.shape[0] / 3, "values far from zero are drawn at the top"


def test_names_are_no_formulas_and_need_no_font():
    png = figures.curves({"$x_{": ramp(3), "漢字": ramp(3)}, "$\\frac{", "$y", {"$z": 1.0})
    assert png.startswith(b"\x89PNG")


def test_charts_are_compact():
    rng = np.random.default_rng(0)
    lines = {str(n): [(s, float(v)) for s, v in enumerate(rng.random(5000))] for n in range(6)}
    assert len(figures.curves(lines, "A", "a")) < MAX_BYTES
    assert len(figures.histogram(rng.integers(0, 99, 8192), "A", "code")) < MAX_BYTES


def test_histogram_sorts_so_that_the_order_of_codes_does_not_matter():
    counts = np.arange(20)
    assert figures.histogram(counts, "A", "code") == figures.histogram(counts[::-1], "A", "code")


def test_histogram_of_many_things_shows_the_share_that_is_used():
    """Of more bars than pixels a part is drawn; where they end stays right."""
    counts = np.where(np.arange(60_000) < 30_000, 7, 0)
    blue = np.abs(pixels(figures.histogram(counts, "", "code")) - [64, 149, 197]).max(-1) <= 12
    ends = np.nonzero(blue.mean(0) > 0.3)[0]
    axis = 2 * (ends.max() - ends.min())  # were all in use
    assert abs(axis - 820) < 30, "half of the codes fill half of the axis"


@pytest.mark.parametrize("counts", [[], [0, 0], [5], [1, 10_000, 0]])
@pytest.mark.parametrize("log_y", [False, True])
def test_histogram_survives(counts, log_y):
    assert figures.histogram(np.array(counts), "A", "code", log_y=log_y).startswith(b"\x89PNG")


def test_matrix_is_darkest_where_a_class_is_always_right():
    right, wrong = (figures.matrix(values, ["cat", "dog"], "A") for values in (np.eye(2), np.ones((2, 2))))
    assert has(right, "#08306b")
    assert (pixels(right) != pixels(wrong)).any()


def test_matrix_survives_empty_classes_and_many_classes():
    values = np.zeros((60, 60), dtype=int)
    assert figures.matrix(values, [f"class {n}" for n in range(60)], "A").startswith(b"\x89PNG")


def test_matrix_with_a_label_missing_is_refused():
    with pytest.raises(ValueError, match=r"values have shape \(2, 2\), expected \(1, 1\)"):
        figures.matrix(np.eye(2), ["cat"], "A")


def test_gallery_shows_the_pictures():
    red = np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8)
    shown = pixels(figures.gallery([Row([Tile(red)])], tile_px=64))
    assert ((shown == (255, 0, 0)).all(-1)).sum() == 64 * 64


def test_small_pictures_are_enlarged_without_smoothing():
    checks = np.indices((4, 4)).sum(0)[..., None].repeat(3, 2).astype(np.uint8) % 2 * 255
    shown = pixels(figures.gallery([Row([Tile(checks)])], tile_px=64))
    assert set(np.unique(shown)) == {0, 255}


def test_pictures_keep_their_shape():
    wide = np.zeros((10, 20, 3), dtype=np.uint8)
    shown = pixels(figures.gallery([Row([Tile(wide)])], tile_px=60))
    assert (shown == 0).all(-1).sum() == 60 * 30


@pytest.mark.parametrize(("frame", "colour"), [("right", figures.GREEN), ("wrong", figures.RED)])
def test_frames_mark_right_and_wrong(frame, colour):
    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    assert has(figures.gallery([Row([Tile(grey, frame=frame)])]), colour, 0)
    assert not has(figures.gallery([Row([Tile(grey)])]), colour, 0)


def test_right_and_wrong_differ_in_more_than_colour():
    grey = np.full((8, 8, 3), 128, dtype=np.uint8)
    shapes = []
    for frame, colour in (("right", figures.GREEN), ("wrong", figures.RED)):
        shown = pixels(figures.gallery([Row([Tile(grey, frame=frame)])]))
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        shapes.append((shown == wanted).all(-1))
    assert (shapes[0] != shapes[1]).any()


def test_long_captions_are_wrapped_below_the_tile():
    short, long = (figures.gallery([Row([Tile(noise(8), "word " * n)])]) for n in (1, 30))
    assert pixels(long).shape[1] == pixels(short).shape[1]
    assert pixels(long).shape[0] > pixels(short).shape[0]


def test_wrapped_lines_fit_and_lose_no_word():
    font = figures._font()
    text = "a caption of some length with an " + "extraordinarily" * 3 + " long word"
    lines = figures._wrap(text, 100, font, 20)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_captions_that_are_too_long_are_cut_with_an_ellipsis():
    lines = figures._wrap("word " * 500, 100, figures._font())
    assert len(lines) == figures.CAPTION_LINES
    assert lines[-1].endswith("…")


def test_texts_can_stand_in_place_of_pictures():
    rows = [Row([Tile(noise(8)), Tile(None, "a sentence that was found", "right")], title="a query")]
    assert has(figures.gallery(rows, ["picture", "text"]), figures.GREEN, 0)


def test_an_empty_gallery_is_a_picture():
    assert figures.gallery([]).startswith(b"\x89PNG")
    assert figures.gallery([Row()]).startswith(b"\x89PNG")


def test_large_galleries_stay_compact():
    rows = [Row([Tile(noise(128, 10 * r + c)) for c in range(8)]) for r in range(8)]
    assert len(figures.gallery(rows)) <= MAX_BYTES
