"""The tables of docs/train.md against the settings as they are."""

import dataclasses
import json
from pathlib import Path

import pytest

from beitctl.config import OptimConfig, TrainConfig

PAGE = (Path(__file__).parents[2] / "docs" / "train.md").read_text()


def default(field):
    """The default of a field as the page writes it."""
    if field.default is dataclasses.MISSING:
        return "required"
    return "none" if field.default is None else f"`{json.dumps(field.default)}`"


def rows(table):
    """First two cells of every row of a table, the ``number``-th of the page."""
    return [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in table if line.startswith("| `")]


@pytest.mark.parametrize(("number", "settings"), [(0, TrainConfig), (1, OptimConfig)])
def test_the_page_has_every_setting_with_its_default_in_order(number, settings):
    table = PAGE.split("| setting | default | allowed | what it does |\n")[1 + number].splitlines()
    assert rows(table[: table.index("")]) == [
        (f"`{field.name}`", default(field)) for field in dataclasses.fields(settings)
    ]
