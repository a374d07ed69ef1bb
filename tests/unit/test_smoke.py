"""``--smoke``: which tables run, how they become small, and what stands in for the others."""

import copy
import json
import tomllib
from pathlib import Path

import pytest
from run_stubs import STAGES, beitctl, install, place  # noqa: F401 - the fixture works by being here

from beitctl import cli, recipe
from beitctl.api import Plugin
from beitctl.errors import RecipeError, UserError
from beitctl.smoke import shrunk


class Learn(Plugin):
    """Learn something."""

    size: int
    of: str = ""
    init: str = ""
    file: str = ""

    @classmethod
    def smoke(cls, table):
        table["size"] = min(table["size"], 2)  # a class may well change what it is given
        return {**{key: value for key, value in table.items() if key != "file"}, **cls.stand_in(table)}

    @staticmethod
    def stand_in(table):
        return {"of": "@make.second"} if "file" in table else {}

    def plan(self):
        return {"size": self.size}

    def run(self, job):
        seen = {ref: str(path) for ref, path in job.inputs.items()}
        return {"size": self.size, "seen": seen}


TEXT = """\
[recipe]
summary = "Large"
published = { score = 0.9 }

[make.first]
value = 100

[learn.base]
size = 1000
of = "@make.first"

[use]
of = "@learn.base"

[learn.top]
size = 2000
init = "@learn.base"

[learn.other]
size = 1

[learn.filed]
size = 3000
file = "weights"

[summary]
value = "@make.first:value"
"""
TINY = """\
[recipe]
summary = "Tiny"

[make.first]
value = 1

[make.second]
value = 2

[make.spare]
value = 3

[use]
of = "@make.second"

[learn]
size = 1

[export]
of = "@learn"
"""


@pytest.fixture(autouse=True)
def recipes(place, monkeypatch):  # noqa: F811 - the fixture of run_stubs
    """Recipe ``large.toml`` here and ``tiny`` as a bundled one; only the stage learn has a toy size."""
    install(monkeypatch, {**STAGES, "export": "run_stubs:Use", "learn": "test_smoke:Learn"})
    bundled = place / "bundled"
    bundled.mkdir()
    (bundled / "tiny.toml").write_text(TINY)
    monkeypatch.setattr(recipe, "_bundled", lambda: bundled)
    Path("large.toml").write_text(TEXT)


def small(*keys, sets=(), text=TEXT):
    Path("large.toml").write_text(text)
    return shrunk(recipe.load("large.toml"), "learn", keys, sets)


def tables(found):
    return {key: table.table for key, table in found.tables.items()}


def test_a_table_that_is_asked_for_is_made_small():
    assert small("learn.base").tables["learn.base"].plugin == Learn(size=2, of="@make.first")


def test_references_to_other_stages_lead_to_tables_of_tiny():
    assert tables(small("learn.base"))["make.first"] == {"value": 1}


def test_a_table_of_tiny_brings_along_what_it_refers_to():
    found = small("learn.other", text=TEXT.replace("size = 1\n", 'size = 1\nof = "@use"\n'))
    assert list(found.tables) == ["make.second", "use", "learn.other"]


def test_what_nothing_refers_to_stays_out():
    assert list(small("learn.other").tables) == ["learn.other"]


def test_tables_of_the_same_stage_that_it_refers_to_are_the_recipes_own_at_toy_size():
    found = small("learn.top")
    assert list(found.tables) == ["make.first", "learn.base", "learn.top"]
    assert found.tables["learn.base"].plugin.size == 2


def test_several_tables_come_in_the_order_of_the_recipe():
    assert [*small("learn.filed", "learn.top", "learn.other").tables][-4:] == [
        "learn.base",
        "learn.top",
        "learn.other",
        "learn.filed",
    ]


def test_where_the_recipe_names_a_file_the_stage_may_name_a_table_of_tiny():
    found = small("learn.filed")
    assert list(found.tables) == ["make.second", "learn.filed"]
    assert found.tables["learn.filed"].references == ("make.second",)


def test_tiny_is_the_one_that_comes_with_beitctl(monkeypatch):
    Path("mine").mkdir()
    Path("mine/tiny.toml").write_text(TINY.replace("value = 1", "value = 7"))
    monkeypatch.setenv(recipe.FOLDERS, "mine")
    assert recipe.load("tiny").tables["make.first"].plugin.value == 7
    assert small("learn.base").tables["make.first"].plugin.value == 1


def test_the_full_recipe_is_left_as_it_is():
    full = recipe.load("large.toml")
    before = copy.deepcopy(tables(full))
    shrunk(full, "learn", ["learn.top"], ["learn.top.size=5"])
    assert tables(full) == before


def test_set_changes_the_small_table():
    assert small("learn.top", sets=["learn.top.size=5"]).tables["learn.top"].plugin.size == 5


def test_set_may_leave_out_the_stage_where_it_has_one_table():
    assert small("learn.other", sets=["other.size=5"]).tables["learn.other"].plugin.size == 5


def test_a_setting_that_is_wrong_is_named_as_it_was_given():
    with pytest.raises(RecipeError) as caught:
        small("learn.top", sets=["learn.top.sise=5", "finetune.x=1"])
    assert caught.value.problems == [
        "--set finetune.x=1  no table 'finetune'; there are recipe, make, learn, size, of, init, file",
        "--set learn.top.sise=5  learn.top.sise: unknown key, did you mean 'size'?",
    ]


def test_a_small_table_that_does_not_validate_is_told_apart_from_the_file(monkeypatch):
    monkeypatch.setattr(Learn, "stand_in", staticmethod(lambda table: {"size": "big"}))
    with pytest.raises(RecipeError) as caught:
        small("learn.other")
    assert caught.value.problems == [
        'large-smoke  learn.other.size must be a whole number, found the text "big"'
    ]


@pytest.mark.parametrize(("name", "expected"), [("large", "large-smoke"), ("v1.5", "v1.5-smoke")])
def test_the_name_says_that_it_is_a_smoke_run(name, expected):
    path = Path(f"{name}.toml")
    path.write_text(TEXT)
    found = shrunk(recipe.load(str(path)), "learn", ["learn.other"])
    assert (found.name, found.path) == (expected, path)


def test_the_summary_says_so_and_promises_no_published_numbers():
    found = small("learn.other")
    assert (found.meta["summary"], found.meta["published"]) == ("Large, at toy size", {})
    assert found.summary == {}


def test_the_text_is_a_recipe_that_says_the_same():
    found = small("learn.top")
    Path("again.toml").write_text(found.text)
    assert tables(recipe.load("again.toml")) == tables(found)


def test_the_text_is_that_before_set():
    text = small("learn.other", sets=["learn.other.size=5"]).text
    assert tomllib.loads(text)["learn"] == {"other": {"size": 1}}


def test_a_table_without_a_name_keeps_its_key():
    text = '[recipe]\nsummary = "One"\n[learn]\nsize = 9\nof = "@make.first"\n'
    found = small("learn", text=text.replace("[learn]", "[make.first]\nvalue = 1\n[learn]"))
    assert found.tables["learn"].plugin.size == 2


def test_a_stage_without_a_toy_size_names_those_that_have_one():
    with pytest.raises(UserError) as caught:
        shrunk(recipe.load("large.toml"), "make", ["make.first"])
    assert str(caught.value) == "--smoke: the stage make has no toy size; stages that have one: learn"


def test_where_no_stage_has_a_toy_size_that_is_said(monkeypatch):
    monkeypatch.setattr(Learn, "smoke", None)
    with pytest.raises(UserError, match=r"no toy size; stages that have one: none$"):
        small("learn.other")


NOTHING = "--smoke: nothing stands in for '@{}'; refer to a table that the recipe tiny has, one of {}"


def test_a_reference_that_tiny_cannot_satisfy_is_named():
    text = TEXT.replace("[make.first]", "[make.third]").replace('@make.first"', '@make.third"')
    text = text.partition("[summary]")[0]
    with pytest.raises(UserError) as caught:
        small("learn.base", text=text)
    listed = "make.first, make.second, make.spare, use, export"
    assert str(caught.value) == NOTHING.format("make.third", listed)


def test_a_table_of_tiny_that_needs_the_stage_itself_cannot_stand_in():
    export = '[export]\nof = "@learn.base"\n\n[learn.last]\nsize = 1\nof = "@export"\n\n[summary]'
    with pytest.raises(UserError, match="nothing stands in for '@learn'"):
        small("learn.last", text=TEXT.replace("[summary]", export))


def folders():
    return sorted(path.name for path in Path("runs/large-smoke").glob("*"))


def manifest(key):
    (file,) = Path("runs/large-smoke", key).glob("*/manifest.json")
    return json.loads(file.read_text())


def test_the_runs_are_in_a_folder_of_their_own(capsys):
    code, _, _ = beitctl(capsys, "learn", "--recipe", "large.toml", "--only", "top", "--smoke")
    assert (code, [path.name for path in Path("runs").iterdir()]) == (0, ["large-smoke"])
    assert folders() == ["learn.base", "learn.top", "make.first"]


def test_the_manifest_names_the_smoke_recipe_and_its_inputs(capsys):
    beitctl(capsys, "learn", "--recipe", "large.toml", "--only", "base", "--smoke")
    found = manifest("learn.base")
    assert (found["recipe"], found["metrics"]["size"]) == ("large-smoke", 2)
    assert found["parents"]["@make.first"]["fingerprint"] == manifest("make.first")["fingerprint"]


def test_without_only_all_tables_of_the_stage_run(capsys):
    assert beitctl(capsys, "learn", "--recipe", "large.toml", "--smoke")[0] == 0
    assert folders() == [
        "learn.base", "learn.filed", "learn.other", "learn.top", "make.first", "make.second",
    ]  # fmt: skip


def test_the_same_command_again_finds_it_done(capsys):
    command = ("learn", "--recipe", "large.toml", "--only", "base", "--smoke")
    beitctl(capsys, *command)
    assert "already done: runs/large-smoke/learn.base/" in beitctl(capsys, *command)[2]


def test_a_dry_run_shows_the_small_plan_and_writes_nothing(capsys):
    before = sorted(Path().rglob("*"))
    command = ("learn", "--recipe", "large.toml", "--only", "top", "--smoke", "--dry-run", "--json")
    assert json.loads(beitctl(capsys, *command)[1]) == {"learn.top": {"size": 2}}
    assert sorted(Path().rglob("*")) == before


def test_json_ends_with_the_metrics_of_the_small_run(capsys):
    _, out, _ = beitctl(capsys, "learn", "--recipe", "large.toml", "--only", "top", "--smoke", "--json")
    end = json.loads(out.splitlines()[-1])
    assert (end["event"], end["status"], end["metrics"]["size"]) == ("end", "ok", 2)


def test_out_is_the_folder_of_the_small_run(capsys):
    beitctl(capsys, "learn", "--recipe", "large.toml", "--only", "base", "--smoke", "--out", "here")
    assert json.loads(Path("here/manifest.json").read_text())["metrics"]["size"] == 2


def test_gpus_starts_processes_that_make_it_small_themselves(capsys, monkeypatch):
    started = []
    monkeypatch.setattr(cli.launch, "run", lambda gpus, arguments: started.append((gpus, arguments)) or 0)
    command = ("learn", "--recipe", "large.toml", "--smoke", "--gpus", "2")
    assert (beitctl(capsys, *command)[0], started) == (0, [(2, command)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("make", "--recipe", "large.toml"), "the stage make has no toy size"),
        (("learn", "--recipe", "larg.toml"), "larg.toml: no such recipe file"),
        (("learn", "--recipe", "nowhere"), "no recipe 'nowhere'"),
        (("learn", "--recipe", "large.toml", "--only", "third"), "--only third: large has no such table"),
        (("learn", "--recipe", "large.toml", "--set", "other.sise=1"), "--set other.sise=1"),
    ],
    ids=["stage", "file", "name", "only", "set"],
)
def test_wrong_usage_ends_with_2_and_starts_nothing(capsys, arguments, message):
    code, _, err = beitctl(capsys, *arguments, "--smoke")
    assert (code, message in err, "Traceback" in err) == (2, True, False)
    assert not Path("runs").exists()


def test_help_shows_the_flag(capsys):
    assert "--smoke" in beitctl(capsys, "learn", "--help")[1]
