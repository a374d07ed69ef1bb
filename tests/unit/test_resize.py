"""Position tables for another resolution."""

import importlib

import numpy as np
import pytest
import scipy.interpolate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RectBivariateSpline

from beitctl.checkpoints.resize import absolute, geometric_coordinates, geometric_ratio, relative

SIDES = st.integers(1, 6)
GRIDS = st.tuples(SIDES, SIDES)


def timm_module(name):
    pytest.importorskip("timm", minversion="1.0.31")
    return importlib.import_module(name)


def offsets(grid):
    return 2 * grid[0] - 1, 2 * grid[1] - 1


def relative_table(grid, heads=3, trailing=3):
    rows, columns = offsets(grid)
    return torch.randn(rows * columns + trailing, heads, generator=torch.Generator().manual_seed(7))


def absolute_table(grid, leading, width=8):
    return torch.randn(leading + grid[0] * grid[1], width, generator=torch.Generator().manual_seed(7))


def spline_surface():
    """The surface of the printed vectors on 27 x 27 offsets, and three rows that are not on the grid."""
    i, j = np.mgrid[:27, :27]
    z = np.sin(0.3 * i) + 0.5 * np.cos(0.2 * j) + 0.01 * i * j
    return torch.tensor(np.concatenate((z.ravel(), [1, 2, 3])), dtype=torch.float32)[:, None]


def official(z, target_offsets):
    """One head as the official loader does it; ``interp2d`` replaced as SciPy tells."""
    s, low, high = len(z), 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        reach = sum(q**k for k in range(s // 2))
        low, high = (low, q) if reach > target_offsets // 2 else (q, high)
    side = [sum(q**k for k in range(n + 1)) for n in range(s // 2)]
    place = [-x for x in reversed(side)] + [0] + side
    new = np.arange(-(target_offsets // 2), target_offsets // 2 + 1)
    return RectBivariateSpline(place, place, z.T, kx=3, ky=3)(new, new).T  # z.T: x is the column


@pytest.mark.parametrize(
    ("source", "target", "ratio"),
    [
        (27, 31, 1.02349283),
        (27, 47, 1.09030745),
        (27, 59, 1.12505590),
        (27, 63, 1.13491781),
        (27, 79, 1.16850363),
        (47, 63, 1.02614336),
        (63, 79, 1.01483656),
    ],
)
def test_ratios_are_those_of_the_official_code(source, target, ratio):
    assert geometric_ratio(source, target) == pytest.approx(ratio, abs=1e-8)


def test_the_ratio_keeps_to_the_official_bounds():
    assert geometric_ratio(47, 49) == pytest.approx(1.01, abs=1e-6)
    assert geometric_ratio(5, 99) == pytest.approx(1.5, abs=1e-6)


def test_coordinates_are_those_of_the_official_code():
    places = geometric_coordinates(27, 47)
    assert places[13:19] == pytest.approx([0, 1, 2.0903, 3.2791, 4.5752, 5.9884], abs=5e-5)
    assert places[-1] == pytest.approx(22.999934, abs=5e-7)
    assert np.array_equal(places, -places[::-1])


@pytest.mark.parametrize(
    ("side", "total", "values"),
    [
        (24, 4352.0422, {(0, 0): 0.5, (0, -1): 0.234258, (23, 23): 0.573789, (5, 17): 0.656142}),
        (24, 4352.0422, {(-1, -1): 7.992802}),
        (32, 8183.3383, {(5, 17): 0.677048, (-1, -1): 7.992778}),
        (40, 13253.0055, {(5, 17): 0.657804, (-1, -1): 7.992794}),
    ],
)  # fmt: skip
def test_splines_are_those_of_the_official_code(side, total, values):
    resized = relative(spline_surface(), (14, 14), (side, side))[:-3].reshape(2 * side - 1, -1)
    assert resized.double().sum().item() == pytest.approx(total, abs=1e-3)
    for place, value in values.items():
        assert resized[place].item() == pytest.approx(value, abs=2e-6)


def test_every_head_is_resampled_as_in_the_official_code():
    table = relative_table((7, 7), heads=4)
    resized = relative(table, (7, 7), (12, 12))
    for head in range(4):
        expected = official(table[:-3, head].reshape(13, 13).double().numpy(), 23)
        np.testing.assert_allclose(resized[:-3, head].reshape(23, 23), expected, atol=1e-6)


@pytest.mark.parametrize(("source", "target"), [((7, 7), (12, 12)), ((4, 6), (7, 8)), ((14, 14), (16, 24))])
def test_growing_tables_equal_timm_in_its_scipy_mode(source, target, monkeypatch):
    # timm 1.0.31; it computes in fp64 and rounds to fp32 as we do. SciPy no longer has the function it calls.
    module = timm_module("timm.layers.pos_embed_rel")

    def interp2d(x, y, z, kind):
        assert kind == "cubic"
        spline = RectBivariateSpline(x, y, z.T)
        return lambda to_x, to_y: spline(to_x.numpy(), to_y.numpy()).T

    monkeypatch.setattr(scipy.interpolate, "interp2d", interp2d, raising=False)
    monkeypatch.setattr(module, "_USE_SCIPY", True)
    table = relative_table(source)
    resized = relative(table, source, target)
    torch.testing.assert_close(
        resized,
        module.resize_rel_pos_bias_table(table, target, resized.shape, old_window_size=source),
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.filterwarnings(
    "ignore:torch.searchsorted", "ignore:Using a non-tuple sequence"
)  # timm's own code
def test_tables_that_are_linear_between_their_places_equal_timm():
    # timm 1.0.31 interpolates linearly in fp32 between the same places, which is exact for such a table;
    # beyond the outermost place (22.999934, the offset is 23) both hold its value.
    module = timm_module("timm.layers.pos_embed_rel")
    place = geometric_coordinates(27, 47)
    z = 0.3 + 0.05 * place[:, None] - 0.02 * place + 0.004 * place[:, None] * place
    table = torch.cat((torch.tensor(z.ravel()[:, None]).float(), torch.ones(3, 1)))
    resized = relative(table, (14, 14), (24, 24))
    theirs = module.resize_rel_pos_bias_table(table, (24, 24), resized.shape)
    torch.testing.assert_close(resized, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("source", "target", "leading"),
    [((14, 14), (24, 24), 3), ((4, 6), (7, 5), 1), ((6, 6), (4, 3), 1), ((3, 5), (3, 8), 0)],
)
def test_absolute_positions_equal_timm_without_antialiasing(source, target, leading):
    # timm 1.0.31 calls the same torch function.
    module = timm_module("timm.layers.pos_embed")
    table = absolute_table(source, leading)
    theirs = module.resample_abs_pos_embed(table[None], target, source, leading, antialias=False)[0]
    torch.testing.assert_close(absolute(table, source, target, leading), theirs, atol=1e-6, rtol=0)


def test_absolute_positions_grow_along_the_axis_that_was_asked_for():
    table = torch.arange(3.0).repeat_interleave(2)[:, None]  # 3 x 2 patches, each holding its row number
    resized = absolute(table, (3, 2), (3, 5), leading=0)
    torch.testing.assert_close(resized.reshape(3, 5), torch.arange(3.0)[:, None].expand(3, 5))


def test_leading_rows_are_kept_bit_for_bit():
    table = absolute_table((4, 4), leading=3)
    assert torch.equal(absolute(table, (4, 4), (6, 9), leading=3)[:3], table[:3])


def test_the_same_grid_gives_the_same_tensor():
    one, two = absolute_table((3, 4), leading=1), relative_table((3, 4))
    assert absolute(one, (3, 4), (3, 4), leading=1) is one
    assert relative(two, (3, 4), (3, 4)) is two


def test_a_grid_with_as_many_patches_is_not_the_same_grid():
    table = absolute_table((2, 6), leading=1)
    assert not torch.equal(absolute(table, (2, 6), (3, 4), leading=1), table)


@settings(deadline=None)
@given(GRIDS, GRIDS, st.integers(0, 4))
def test_any_grid_becomes_any_other_and_trailing_rows_are_kept(source, target, trailing):
    table = relative_table(source, heads=2, trailing=trailing)
    resized = relative(table, source, target, trailing)
    rows, columns = offsets(target)
    assert resized.shape == (rows * columns + trailing, 2)
    assert resized.dtype == torch.float32
    assert torch.equal(resized[rows * columns :], table[len(table) - trailing :])


@settings(deadline=None)
@given(GRIDS, GRIDS)
def test_equal_biases_stay_equal(source, target):
    table = torch.full_like(relative_table(source), 0.7)
    resized = relative(table, source, target)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.7), atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [1, 12])
def test_there_and_back_has_the_shape_that_it_had(heads):
    table = relative_table((3, 5), heads)
    assert relative(relative(table, (3, 5), (5, 9)), (5, 9), (3, 5)).shape == table.shape
    positions = absolute_table((3, 5), leading=1)
    assert absolute(absolute(positions, (3, 5), (5, 9), 1), (5, 9), (3, 5), 1).shape == positions.shape


def test_an_axis_that_stays_keeps_its_meaning_while_the_other_grows():
    table = relative_table((5, 4), heads=2)
    resized = relative(table, (5, 4), (5, 9))[:-3].reshape(9, 17, 2)
    # Each row of offsets is the one-dimensional spline of its own row; not-a-knot, as FITPACK's.
    for row, old in enumerate(table[:-3].reshape(9, 7, 2).double().numpy()):
        place = geometric_coordinates(7, 17)
        spline = scipy.interpolate.make_interp_spline(place, old, k=3)
        expected = spline(np.clip(np.arange(-8, 9), place[0], place[-1]))
        np.testing.assert_allclose(resized[row], expected, atol=1e-6)


def test_rows_and_columns_are_not_exchanged():
    table = relative_table((4, 5), heads=1)
    turned = table[:-3].reshape(7, 9).T.reshape(-1, 1)
    one = relative(table, (4, 5), (6, 11))[:-3].reshape(11, 21)
    other = relative(torch.cat((turned, table[-3:])), (5, 4), (11, 6))[:-3].reshape(21, 11)
    torch.testing.assert_close(one, other.T, atol=1e-6, rtol=0)


def test_the_offset_zero_keeps_its_bias_when_an_axis_grows():
    table = relative_table((4, 6))
    resized = relative(table, (4, 6), (9, 8))[:-3].reshape(17, 15, 3)
    torch.testing.assert_close(resized[8, 7], table[:-3].reshape(7, 11, 3)[3, 5], atol=1e-6, rtol=0)


@pytest.mark.parametrize("target", [(3, 2), (4, 2), (3, 5), (1, 1)])
def test_a_shrinking_axis_keeps_the_biases_of_the_offsets_that_remain(target):
    table = relative_table((4, 5))
    resized = relative(table, (4, 5), target)
    rows, columns = target
    for down in range(1 - rows, rows):
        for right in range(1 - columns, columns):
            new = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
            old = (down + 3) * 9 + right + 4
            assert torch.equal(resized[new], table[old])


def test_one_axis_shrinks_while_the_other_grows():
    table = relative_table((6, 4))
    narrow = torch.cat((table[:-3].reshape(11, 7, 3)[2:-2].flatten(0, 1), table[-3:]))  # the offsets -3 .. 3
    torch.testing.assert_close(relative(table, (6, 4), (4, 7)), relative(narrow, (4, 4), (4, 7)))


def test_offsets_beyond_the_reach_take_the_outermost_bias():
    # 2 x 2 patches have the offsets -1, 0, 1 and no stretched ones.
    table = relative_table((2, 2))
    resized = relative(table, (2, 2), (4, 4))[:-3].reshape(7, 7, 3)
    torch.testing.assert_close(resized[0, 0], table[0])
    torch.testing.assert_close(resized[2:5, 2:5].flatten(0, 1), table[:-3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_resized_biases_are_fp32_whatever_the_table_was(dtype):
    resized = relative(relative_table((3, 3)).to(dtype), (3, 3), (4, 4))
    assert resized.dtype == torch.float32


def test_parameters_are_resized_without_their_gradient():
    table = torch.nn.Parameter(relative_table((3, 3)))
    assert not relative(table, (3, 3), (4, 4)).requires_grad


@pytest.mark.parametrize(
    ("resize", "text"),
    [
        (
            lambda: relative(torch.zeros(732, 12), (16, 16), (24, 24)),
            "position table has 732 rows, a source grid of 16 x 16 patches needs 964 "
            "(961 + 3 that are not on the grid): give the grid that the table was made for",
        ),
        (
            lambda: absolute(torch.zeros(197, 8), (14, 14), (14, 14), 3),
            "position table has 197 rows, a source grid of 14 x 14 patches needs 199 "
            "(196 + 3 that are not on the grid): give the grid that the table was made for",
        ),
        (
            lambda: absolute(torch.zeros(1, 197, 8), (14, 14), (7, 7), 1),
            "position table has shape (1, 197, 8), expected two axes: (rows, values)",
        ),
        (
            lambda: relative(torch.zeros(12, 1), (2, 2), (0, 2)),
            "target grid is 0 x 2, each side must be at least 1 patch",
        ),
        (
            lambda: absolute(torch.zeros(1, 1), (2, -1), (2, 2), 1),
            "source grid is 2 x -1, each side must be at least 1 patch",
        ),
    ],
)
def test_tables_and_grids_that_do_not_fit_are_refused(resize, text):
    with pytest.raises(ValueError, match=r"grid|table") as caught:
        resize()
    assert str(caught.value) == text
