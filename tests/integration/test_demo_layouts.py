"""The recipe demo reads the same data from Parquet, a folder and tar shards."""

from pathlib import Path

import pytest
from demo_layouts import LAYOUTS, examples

from beitctl import recipe


def plain(example):
    """What an example holds, without its name: files have endings."""
    data = example.image.read_bytes() if isinstance(example.image, Path) else example.image
    return example.id.partition(".")[0], data, example.captions, example.label


def opened(source):
    found = source.open()
    return sorted((found[index] for index in range(len(found))), key=lambda example: example.id)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_demo_reads_the_same_examples_from_every_layout(layout, tmp_path):
    tables = recipe.load("demo", LAYOUTS[layout](tmp_path / layout)).tables
    objectives = tables["pretrain"].plugin.objectives
    for source, split in ((objectives["pair"].source, "train"), (objectives["pair"].held_out, "test")):
        wanted = sorted(examples(split), key=lambda example: example.id)
        assert [plain(example) for example in opened(source)] == [plain(example) for example in wanted]
    assert sum(len(source.open()) for source in tables["tokenize-images"].plugin.sources) == 1489
    prose = {example.text for example in opened(objectives["text"].source)}
    assert prose == {example.text for example in examples("train", "text")}
