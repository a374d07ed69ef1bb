"""Sources under names in the table [data] of a recipe."""

import pytest

from beitctl import recipe
from beitctl.errors import RecipeError

TEXT = """[recipe]
summary = "knn twice"

[data.train]
kind = "embedded"
limit = 50

[data.test]
kind = "embedded"
split = "test"

[eval.knn]
model = "model.pt"
protocol = "knn"
source = "@data.test"
reference = "@data.train"

[tokenize-images]
tokenizer = "tokenizer"
sources = ["@data.train", { kind = "embedded" }, "@data.test"]
"""


def load(tmp_path, text, *overrides):
    path = tmp_path / "r.toml"
    path.write_text(text)
    return recipe.load(str(path), overrides)


def problems(tmp_path, text, *overrides):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    return [line.replace(f"{tmp_path / 'r.toml'}:", "") for line in caught.value.problems]


def test_a_reference_means_the_table(tmp_path):
    found = load(tmp_path, TEXT)
    plugin = found.tables["eval.knn"].plugin
    assert (plugin.source.split, plugin.reference.limit) == ("test", 50)
    assert found.tables["eval.knn"].table["reference"] == {"kind": "embedded", "limit": 50}


def test_a_list_may_hold_references(tmp_path):
    sources = load(tmp_path, TEXT).tables["tokenize-images"].plugin.sources
    assert [(source.split, source.limit) for source in sources] == [("train", 50), ("train", 0), ("test", 0)]


def test_named_sources_are_no_stages_and_no_references_to_stages(tmp_path):
    found = load(tmp_path, TEXT)
    assert list(found.tables) == ["eval.knn", "tokenize-images"]
    assert found.tables["eval.knn"].references == ()


def test_one_set_changes_a_source_everywhere(tmp_path):
    found = load(tmp_path, TEXT, "data.train.limit=7")
    assert found.tables["eval.knn"].plugin.reference.limit == 7
    assert found.tables["tokenize-images"].plugin.sources[0].limit == 7


def test_a_set_may_replace_a_named_source(tmp_path):
    found = load(tmp_path, TEXT, 'data.train={ kind = "image-folder", path = "x" }')
    assert str(found.tables["eval.knn"].plugin.reference.path) == "x"


def test_a_problem_of_a_named_source_is_told_once_where_it_stands(tmp_path):
    assert problems(tmp_path, TEXT.replace("limit = 50", "limti = 50")) == [
        "6:1  data.train.limti: unknown key, did you mean 'limit'?"
    ]


def test_an_unknown_name_is_told_with_the_closest(tmp_path):
    assert problems(tmp_path, TEXT.replace('reference = "@data.train"', 'reference = "@data.trian"')) == [
        "16:1  eval.knn.reference: no source 'trian' in [data], did you mean '@data.train'?"
    ]


@pytest.mark.parametrize("value", ["3", '"@train"', "{ limit = 3 }"])
def test_what_is_no_source_is_refused(tmp_path, value):
    text = TEXT.replace("[data.test]\nkind", f"[data]\nbad = {value}\n\n[data.test]\nkind")
    (found,) = problems(tmp_path, text)
    assert found.startswith('9:1  data.bad must be a source: a table with kind = "...", found ')


def test_data_that_is_no_table_is_refused(tmp_path):
    text = 'data = 3\n[recipe]\nsummary = "x"\n[pretrain]\n'
    assert any(
        "data must be a table of named sources, found the number 3" in p for p in problems(tmp_path, text)
    )


MIX = """[data.mix]
kind = "mixture"
sources = ["@data.train", "@data.test"]

[eval.knn]"""


def test_a_named_source_may_refer_to_earlier_ones(tmp_path):
    text = TEXT.replace("[eval.knn]", MIX).replace('reference = "@data.train"', 'reference = "@data.mix"')
    mixed = load(tmp_path, text).tables["eval.knn"].plugin.reference
    assert [(source.split, source.limit) for source in mixed.sources] == [("train", 50), ("test", 0)]


def test_a_named_source_cannot_refer_to_a_later_one(tmp_path):
    text = TEXT.replace("[data.train]", MIX.replace("[eval.knn]", "[data.train]"))
    assert problems(tmp_path, text) == [
        "6:12  data.mix.sources.0: no source 'train' in [data]",
        "6:27  data.mix.sources.1: no source 'test' in [data]",
    ]


def test_the_schema_lets_editors_refer_to_named_sources():
    found = recipe.schema()
    assert {"type": "string", "pattern": r"^@data\."} in found["$defs"]["beitctl.sources"]["anyOf"]
    assert found["properties"]["data"]["additionalProperties"] == {"$ref": "#/$defs/beitctl.sources"}
