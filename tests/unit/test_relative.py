"""Tables of relative positions: how many rows, and which row two tokens read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from beitctl.checkpoints.native import fit
from beitctl.config import ModelConfig
from beitctl.errors import DataError
from beitctl.model.multiway import Multiway
from beitctl.model.plan import plan_of
from beitctl.model.relative import RelativeBias, pair_index, picture_index, table_rows, text_index


def config(grid=(2, 2), text_tokens=0, heads=1, **settings):
    return ModelConfig(
        layers=2, width=4, heads=heads, ffn=4, image_px=(4 * grid[0], 4 * grid[1]), patch_px=4,
        vocabulary=9 if text_tokens else 0, text_tokens=text_tokens, **settings,
    )  # fmt: skip


def test_rows_of_a_grid_of_2_x_2_are_those_of_the_specification():
    assert picture_index((2, 2))[1:, 1:].tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_the_class_token_has_a_row_as_query_one_as_key_and_one_to_itself():
    found = picture_index((2, 2))
    assert found[0].tolist() == [11, 9, 9, 9, 9]
    assert found[:, 0].tolist() == [11, 10, 10, 10, 10]


def test_height_comes_before_width():
    found = picture_index((1, 3))
    assert found[1:, 1:].tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    assert np.array_equal(found, picture_index((3, 1)))
    assert picture_index((2, 3))[1, 1:].tolist() == [7, 6, 5, 2, 1, 0]


@pytest.mark.parametrize(("side", "rows"), [(14, 732), (24, 2212), (32, 3972)])
def test_a_table_of_pictures_has_the_published_rows(side, rows):
    assert table_rows(config((side, side))) == rows


def test_vlmo_base_has_1126_rows():
    assert table_rows(config((14, 14), text_tokens=196)) == 1126


@pytest.mark.parametrize(("grid", "text_tokens"), [((2, 2), 2), ((2, 3), 6), ((3, 1), 5), ((1, 1), 3)])
def test_every_row_of_a_table_is_read_by_the_longest_pair(grid, text_tokens):
    made = config(grid, text_tokens)
    found = pair_index(text_tokens, made)
    assert sorted(set(found.ravel())) == list(range(table_rows(made)))


def test_text_offsets_count_from_key_to_query_around_the_middle():
    found = text_index(196, config((14, 14), 196))
    assert found[1, 1] == 734 + 194
    assert found[3, 5] == 734 + 194 + 2
    assert (found[1, 195], found[195, 1]) == (734 + 388, 734)


@pytest.mark.parametrize("length", [2, 5, 8])
def test_text_offsets_are_symmetric(length):
    made = config((2, 3), 8)
    found = text_index(length, made)[1:, 1:]
    assert (found + found.T == 2 * found[0, 0]).all()


def test_the_first_token_of_a_text_has_the_last_three_rows():
    found = text_index(4, config((14, 14), 196))
    assert found[0].tolist() == [1125, 1123, 1123, 1123]
    assert found[1:, 0].tolist() == [1124] * 3


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_short_text_reads_the_rows_that_it_reads_at_the_beginning_of_a_long_one(length):
    made = config((2, 3), 8)
    assert np.array_equal(text_index(length, made), text_index(8, made)[:length, :length])


def test_no_text_reads_no_row():
    assert text_index(0, config((2, 2), 4)).shape == (0, 0)


def test_a_pair_is_a_picture_a_text_and_one_row_each_way_between_them():
    made = config((2, 2), 4)
    found = pair_index(3, made)
    assert np.array_equal(found[:5, :5], picture_index((2, 2)))
    assert np.array_equal(found[5:, 5:], text_index(3, made))
    assert set(found[:5, 5:].ravel()) == {13}  # a picture asks a text
    assert set(found[5:, :5].ravel()) == {12}


def test_biases_are_the_columns_of_the_table_by_head():
    made = config((2, 2), 4, heads=2, position="relative-per-block")
    bias = RelativeBias(made)
    torch.nn.init.normal_(bias.table)
    layout = Multiway(made).layout(plan_of(5, 1, [2], [4]))
    for found, index in zip(
        bias(layout), (picture_index((2, 2)), pair_index(2, made), text_index(4, made)), strict=True
    ):
        assert torch.equal(found, bias.table[torch.from_numpy(index)].movedim(2, 0))


def test_a_model_with_absolute_positions_looks_no_row_up():
    layout = Multiway(config((2, 2), 4)).layout(plan_of(5, 1, [2], [4]))
    assert [grid.relative for grid in layout.grids] == [None] * 3


@pytest.mark.parametrize(
    ("position", "tables"),
    [
        ("absolute", []),
        ("relative-shared", ["relative.table"]),
        ("relative-per-block", ["blocks.0.relative.table", "blocks.1.relative.table"]),
    ],
)
def test_a_model_has_a_table_or_one_per_block_and_then_no_learned_positions(position, tables):
    names = [name for name, _ in Multiway(config((2, 2), 4, position=position)).named_parameters()]
    assert [name for name in names if name.endswith("table")] == tables
    assert any("position" in name for name in names) is (position == "absolute")


def test_a_table_of_another_size_is_named():
    small, large = (config(grid, position="relative-shared") for grid in ((2, 2), (2, 3)))
    with pytest.raises(DataError, match=r"relative.table is \(12, 1\), expected \(18, 1\)"):
        fit(Multiway(small).state_dict(), Multiway(large), "", Path("file"))


def test_a_second_class_token_has_no_relative_position():
    with pytest.raises(
        ValueError, match='distill_token needs position = "absolute", found "relative-shared"'
    ):
        replace(config(position="relative-shared"), distill_token=True)
