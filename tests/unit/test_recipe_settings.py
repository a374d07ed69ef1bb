"""Recipes changed by --set, found by name, copied, described by a schema."""

from pathlib import Path

import pytest
from recipe_stubs import TEXT, changed, load, problems, stubs  # noqa: F401

from beitctl import recipe
from beitctl.errors import RecipeError, UserError

# --set


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("pretrain.train.steps=7", "train.steps", 7),
        ("pretrain.train.steps = 7", "train.steps", 7),
        ('pretrain.tokens="a=b"', "tokens", "a=b"),
        ("pretrain.tokens=some words, no TOML", "tokens", "some words, no TOML"),
        ("pretrain.tokens=1\npretrain = 2", "tokens", "1\npretrain = 2"),
        ("pretrain.tokens=", "tokens", ""),
        ("pretrain.train.optim={ lr = 2.0 }", "train.optim", {"lr": 2.0}),
        ("pretrain.train.optim.betas=[0.5, 0.6]", "train.optim.betas", [0.5, 0.6]),
        ('pretrain."tokens"=x', "tokens", "x"),
        ("pretrain.tasks.1.radius=5", "tasks", [{"kind": "blur"}, {"kind": "sharpen", "radius": 5}]),
        ('pretrain.tasks+={ kind = "blur", share = 0.1 }', "tasks.2", {"kind": "blur", "share": 0.1}),
        ("pretrain.tasks.0=!", "tasks", [{"kind": "sharpen", "radius": 2}]),
        ('pretrain.tokens="!"', "tokens", "!"),
    ],
)
def test_set_changes_a_value(override, path, expected):
    found = load(TEXT, override).tables["pretrain"].table
    for part in path.split("."):
        found = found[int(part) if part.isdecimal() else part]
    assert found == expected


def test_set_appends_to_a_list_that_is_not_there_yet():
    assert load(TEXT, "finetune.first.seeds+=4").tables["finetune.first"].table["seeds"] == [4]


def test_set_removes_a_key():
    assert "tokens" not in load(TEXT, "pretrain.tokens=!").tables["pretrain"].table


def test_set_makes_tables_on_the_way():
    added = load(TEXT, "pretrain.parts.text.samples=2", 'pretrain.parts.text.task.kind="blur"').tables[
        "pretrain"
    ]
    assert added.plugin.parts["text"].samples == 2


def test_of_several_sets_of_a_key_the_last_counts():
    assert load(TEXT, "pretrain.tokens=a", "pretrain.tokens=b").tables["pretrain"].table["tokens"] == "b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain.train.stepz=1", "pretrain.train.stepz: unknown key, did you mean 'steps'?"),
        ("pretrain.train.steps=!", "pretrain.train.steps: missing key, expected a whole number"),
        ("pretrain.train.width=5", "pretrain.train.width must be a multiple of heads (2), found 5"),
        ("pretrain.train={}", "pretrain.train.steps: missing key, expected a whole number"),
        (
            "pretrain.tasks+={}",
            "pretrain.tasks.2: expected a table with kind = one of blur, sharpen, which names the task",
        ),
        ("pretrian.train.steps=1", "no table 'pretrian', did you mean 'pretrain'?"),
        ("xyz.a=1", "no table 'xyz'; there are recipe, pretrain, finetune, summary"),
        ("pretrain.tokens.a=1", "'pretrain.tokens' is the text \"none\", no table"),
        ("pretrain.tasks.2.radius=1", "'pretrain.tasks' is a list of 2: '2' is no entry, count from 0"),
        ("pretrain.tasks.first=1", "'pretrain.tasks' is a list of 2: 'first' is no entry, count from 0"),
        ("pretrain.tokens+=1", "'pretrain.tokens' is the text \"none\", no list to append to"),
        ("pretrain.tokenz=!", "nothing to remove: no key 'tokenz', did you mean 'tokens'?"),
        ("pretrain.tokens", "expected KEY=VALUE such as pretrain.train.steps=100, KEY+=VALUE or KEY=!"),
        ("=3", "expected KEY=VALUE such as pretrain.train.steps=100, KEY+=VALUE or KEY=!"),
    ],
)
def test_a_problem_of_set_is_told_with_the_argument(override, expected):
    assert f"--set {override}  {expected}" in problems(TEXT, override)


def test_a_key_may_leave_out_the_table_of_the_stage():
    assert load(TEXT, "train.steps=7", stage="pretrain").tables["pretrain"].plugin.train.steps == 7


def test_a_full_key_is_understood_for_a_stage_too():
    assert load(TEXT, "pretrain.train.steps=7", stage="pretrain").tables["pretrain"].plugin.train.steps == 7


def test_a_key_may_begin_with_the_name_in_a_group():
    assert load(TEXT, "second.samples=7", stage="finetune").tables["finetune.second"].plugin.samples == 7


def test_a_short_key_that_several_tables_have_is_refused():
    assert problems(TEXT, "samples=7", stage="finetune") == [
        "--set samples=7  'samples' is in several tables; "
        "write one of finetune.first.samples, finetune.second.samples"
    ]


def test_a_short_key_that_is_no_setting_gets_the_closest_match():
    assert problems(TEXT, "trian.steps=7", stage="pretrain") == [
        "--set trian.steps=7  no table 'trian', did you mean 'train'?"
    ]


# finding


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """A user's folder with a recipe ``mine`` and a bundled one with ``mine`` and ``tiny``."""
    own, bundled = tmp_path / "own", tmp_path / "bundled"
    own.mkdir()
    bundled.mkdir()
    for path in (own / "mine.toml", bundled / "mine.toml", bundled / "tiny.toml"):
        path.write_text(TEXT)
    monkeypatch.setenv(recipe.FOLDERS, f"{own}:")
    monkeypatch.setattr(recipe, "_bundled", lambda: bundled)
    return own, bundled


def test_names_are_those_of_all_folders(folders):
    assert recipe.names() == ["mine", "tiny"]


def test_a_recipe_of_the_user_comes_before_a_bundled_one(folders):
    assert recipe.find("mine") == folders[0] / "mine.toml"


def test_a_bundled_recipe_is_found_by_name(folders):
    assert recipe.find("tiny") == folders[1] / "tiny.toml"


def test_a_file_needs_no_ending(folders):
    Path("tiny").write_text(TEXT)
    assert recipe.find("tiny") == Path("tiny")


def test_an_unknown_name_gets_the_closest_match_and_all_names(folders):
    with pytest.raises(UserError) as caught:
        recipe.find("tinny")
    assert str(caught.value) == (
        "no recipe 'tinny', did you mean 'tiny'? There are mine, tiny; a file ends in .toml"
    )


def test_a_missing_file_is_named(folders):
    with pytest.raises(UserError, match=r"^no/tiny\.toml: no such recipe file$"):
        recipe.find("no/tiny.toml")


def test_a_folder_of_recipes_that_is_not_there_is_told(folders, monkeypatch):
    monkeypatch.setenv(recipe.FOLDERS, "/nowhere")
    with pytest.raises(
        UserError, match=r"^BEITCTL_RECIPES: /nowhere is no folder; correct the variable or unset it$"
    ):
        recipe.names()


def test_without_a_name_the_file_of_this_folder_is_taken():
    Path("beitctl.toml").write_text(TEXT)
    assert recipe.load(None).path == Path("beitctl.toml")


def test_without_a_name_and_a_file_the_ways_out_are_told(folders):
    with pytest.raises(UserError) as caught:
        recipe.load(None)
    assert str(caught.value) == (
        "no recipe named and no beitctl.toml here; give --recipe NAME of mine, tiny; or --recipe FILE; or "
        "make your own with: beitctl recipes copy NAME beitctl.toml"
    )


# copying


def test_a_copy_keeps_the_comments():
    Path("r.toml").write_text(TEXT)
    recipe.copy("r.toml", Path("new/copy.toml"), ["pretrain.train.steps=9"])
    assert Path("new/copy.toml").read_text() == changed("steps = 3", "steps = 9")


@pytest.mark.parametrize(
    "override",
    [
        "pretrain.train.optim={ lr = 2.0 }",
        'pretrain.tasks+={ kind = "blur" }',
        "pretrain.tokens=!",
        "finetune.second.samples=4",
        "finetune.first.task={ kind = 'blur' }",
        "pretrain.parts.image.task.share=0.1",
        "pretrain.train.optim.betas=[0.1, 0.2]",
    ],
)
def test_a_copy_says_the_same_as_the_recipe_with_set(override):
    Path("r.toml").write_text(TEXT)
    recipe.copy("r.toml", Path("copy.toml"), [override])
    with_set = recipe.load("r.toml", [override])
    assert {key: t.table for key, t in recipe.load("copy.toml").tables.items()} == {
        key: t.table for key, t in with_set.tables.items()
    }


def test_a_copy_keeps_how_a_value_was_written():
    Path("r.toml").write_text(TEXT)
    recipe.copy("r.toml", Path("copy.toml"), ["finetune.first.task={ kind = 'blur' }"])
    assert "task = { kind = 'blur' }\n" in Path("copy.toml").read_text()


def test_a_copy_may_change_groups_that_are_spread_over_the_file():
    Path("r.toml").write_text(TEXT + "[finetune.third]\nsamples = 3\n")
    recipe.copy("r.toml", Path("copy.toml"), ["finetune.third.samples=4", "finetune.first.samples=5"])
    samples = {
        key: table.plugin.samples for key, table in recipe.load("copy.toml").tables.items() if "fine" in key
    }
    assert samples == {"finetune.first": 5, "finetune.second": 1, "finetune.third": 4}


def test_a_copy_overwrites_nothing():
    Path("r.toml").write_text(TEXT)
    Path("copy.toml").write_text("mine")
    with pytest.raises(
        UserError, match=r"^copy\.toml exists already; choose another name, or overwrite it with --force$"
    ):
        recipe.copy("r.toml", Path("copy.toml"), [])
    assert Path("copy.toml").read_text() == "mine"


def test_a_copy_overwrites_when_forced():
    Path("r.toml").write_text(TEXT)
    Path("copy.toml").write_text("mine")
    recipe.copy("r.toml", Path("copy.toml"), [], force=True)
    assert Path("copy.toml").read_text() == TEXT


def test_a_copy_with_a_wrong_set_is_not_written():
    Path("r.toml").write_text(TEXT)
    with pytest.raises(RecipeError):
        recipe.copy("r.toml", Path("copy.toml"), ["pretrain.train.steps=x"])
    assert not Path("copy.toml").exists()


# schema


def test_the_schema_offers_every_stage_that_works():
    assert list(recipe.schema()["properties"]) == ["recipe", "summary", "data", "finetune", "pretrain"]


def test_every_reference_of_the_schema_leads_somewhere():
    found = recipe.schema()

    def references(node):
        if isinstance(node, dict):
            return {node["$ref"]} if "$ref" in node else set().union(*map(references, node.values()))
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    assert references(found) == {f"#/$defs/{name}" for name in found["$defs"]}


def test_the_schema_tells_the_settings_of_a_plugin_by_its_kind():
    tasks = recipe.schema()["$defs"]["beitctl.tasks"]["anyOf"]
    assert [(t["properties"]["kind"], t["required"]) for t in tasks] == [
        ({"const": "blur"}, ["kind"]),
        ({"const": "sharpen"}, ["kind", "radius"]),
    ]


def test_the_schema_forbids_unknown_keys():
    definitions = recipe.schema()["$defs"]
    assert definitions["stage-pretrain"]["additionalProperties"] is False
