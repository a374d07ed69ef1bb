"""What a recipe holds; every problem of it told at once with its place."""

import tomllib
from pathlib import Path

import pytest
from recipe_stubs import TEXT, Blur, Finetune, changed, load, problems, stubs  # noqa: F401

from beitctl import recipe
from beitctl.errors import RecipeError


def test_tables_come_by_key_in_the_order_of_the_file():
    text = changed("[summary]", "[finetune.last]\n[summary]")
    late = text.replace("[pretrain]\n", "[finetune.zero]\n\n[pretrain]\n")
    assert list(load(late).tables) == [
        "finetune.zero",
        "pretrain",
        "finetune.first",
        "finetune.second",
        "finetune.last",
    ]


def test_a_table_holds_the_checked_stage():
    assert load(TEXT).tables["pretrain"].plugin.parts["image"].task == Blur(share=0.4)


def test_a_table_holds_its_settings_after_set():
    assert load(TEXT, "pretrain.train.steps=9").tables["pretrain"].table["train"]["steps"] == 9


def test_a_named_table_knows_its_stage():
    assert load(TEXT).tables["finetune.second"].stage == "finetune"


def test_references_are_keys_of_earlier_tables():
    assert [table.references for table in load(TEXT).tables.values()] == [
        (),
        ("pretrain",),
        ("finetune.first",),
    ]


def test_a_table_with_settings_of_its_own_is_no_group():
    text = "[recipe]\nsummary = 's'\n[finetune.task]\nkind = 'blur'\n"
    assert list(load(text).tables) == ["finetune"]


def test_an_empty_table_is_a_stage_with_defaults():
    assert load("[recipe]\nsummary = 's'\n[finetune]\n").tables["finetune"].plugin == Finetune()


def test_the_recipe_table_is_offered_with_its_defaults():
    assert load(TEXT).meta == {"summary": "Small", "needs": "", "tags": [], "published": {}}


def test_the_summary_table_is_offered_as_it_is():
    assert load(TEXT).summary == tomllib.loads(TEXT)["summary"]


def test_name_path_and_text_are_those_of_the_file():
    found = load(TEXT, "pretrain.train.steps=9")
    assert (found.name, found.path, found.text) == ("r", Path("r.toml"), TEXT)


def test_a_byte_order_mark_is_no_problem():
    Path("r.toml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert recipe.load("r.toml").meta["summary"] == "Small"


def test_all_problems_are_told_at_once_in_the_order_of_the_file():
    text = changed("steps = 3", "stepz = 3")
    text = changed("lr = 1e-3", 'lr = "fast"', text=text)
    text = changed("samples = 8", "samples = 0", text=text)
    assert problems(text, "finetune.first.samples=x") == [
        '--set finetune.first.samples=x  finetune.first.samples must be a whole number, found the text "x"',
        "r.toml:12:11  pretrain.train.steps: missing key, expected a whole number",
        "r.toml:13:1  pretrain.train.stepz: unknown key, did you mean 'steps'?",
        'r.toml:14:11  pretrain.train.optim.lr must be a number, found the text "fast"',
        "r.toml:18:1  pretrain.parts.image.samples must be greater than or equal to 1, found the number 0",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "steps = 3",
            "steps = 3.5",
            "13:1  pretrain.train.steps must be a whole number, found the number 3.5",
        ),
        ("steps = 3", "steps = []", "13:1  pretrain.train.steps must be a whole number, found an empty list"),
        (
            "lr = 1e-3",
            "lr = true, x1 = 1",
            "14:22  pretrain.train.optim.x1: unknown key; there are lr, betas",
        ),
        ('tokens = "none"', "tokens = 3", "6:1  pretrain.tokens must be a text, found the number 3"),
        (
            "steps = 3",
            "steps = 3\nfused = 7",
            "14:1  pretrain.train.fused must be true or false, found the number 7",
        ),
        ("seeds = [0, 1]", 'seeds = "a"', '25:1  finetune.second.seeds must be a list, found the text "a"'),
        (
            "seeds = [0, 1]",
            "seeds = [0, {}]",
            "25:13  finetune.second.seeds.1 must be a whole number, found a table",
        ),
        ("{ lr = 1e-3 }", "3", "14:1  pretrain.train.optim must be a table, found the number 3"),
        (
            "steps = 3",
            'steps = 3\nprecision = "b16"',
            "14:1  pretrain.train.precision must be one of 'auto', 'bf16', found the text \"b16\"",
        ),
        (
            "share = 0.4",
            "share = 2",
            "17:25  pretrain.parts.image.task.share must be less than or equal to 1, found the number 2",
        ),
        (
            "share = 0.4",
            "shar = 1",
            "17:25  pretrain.parts.image.task.shar: unknown key, did you mean 'share'?",
        ),
        (
            'kind = "blur", ',
            'kind = "blurr", ',
            "17:10  pretrain.parts.image.task.kind: no 'blurr' in beitctl.tasks; "
            "did you mean 'blur'? Installed: blur, sharpen.",
        ),
        (
            '{ kind = "blur", share = 0.4 }',
            '"blur"',
            "17:1  pretrain.parts.image.task: expected a table with kind = "
            "one of blur, sharpen, which names the task",
        ),
        (
            ", radius = 2",
            ", radiuz = 2",
            "9:3  pretrain.tasks.1.radius: missing key, expected a whole number",
        ),
        (
            ", radius = 2",
            ', radius = 2, inner = { kind = "blur", sharee = 1 }',
            "9:60  pretrain.tasks.1.inner.sharee: unknown key, did you mean 'share'?",
        ),
        (
            "steps = 3",
            "steps = 3\nwidth = 5",
            "14:1  pretrain.train.width must be a multiple of heads (2), found 5",
        ),
        (
            "lr = 1e-3 }",
            "lr = 1e-3, betas = [0.9] }",
            "14:22  pretrain.train.optim.betas must be a list of 2 entries, found one of 1",
        ),
        (
            "lr = 1e-3 }",
            "lr = 1e-3, betas = [0.9, 0.9, 0.9] }",
            "14:22  pretrain.train.optim.betas must be a list of 2 entries, found one of 3",
        ),
        (
            "lr = 1e-3",
            "lr = nan",
            "14:11  pretrain.train.optim.lr must be a finite number, found the number nan",
        ),
        ("seeds = [0, 1]", "samples = 13", "23:11  finetune.second: samples must not be 13"),
        ('tokens = "none"', "both = []", "6:1  pretrain.both must be a whole number, found an empty list"),
        (
            'tokens = "none"',
            'tokens = "@finetune.first"',
            "6:1  pretrain.tokens: '@finetune.first' is not earlier in "
            "the recipe; move [finetune.first] before [pretrain]",
        ),
        (
            '"@pretrain"\n\n',
            '"@pretrian"\n\n',
            "21:1  finetune.first.init: no table 'pretrian' to refer to, did you mean '@pretrain'?",
        ),
        (
            '"@pretrain"\n\n',
            '"@finetune.first"\n\n',
            "21:1  finetune.first.init: '@finetune.first' is not earlier in "
            "the recipe; move [finetune.first] before [finetune.first]",
        ),
        ("[finetune.first]", "[finetun.first]", "20:2  finetun: unknown stage, did you mean 'finetune'?"),
        (
            "[finetune.first]",
            "[zzz]",
            "20:2  zzz: unknown stage; there are broken, finetune, pretrain, recipe, summary, data",
        ),
        (
            "# what it is",
            "broken = {}",
            "1:1  broken: plugin 'broken' (unknown) cannot be imported: AttributeError: module "
            "'recipe_stubs' has no attribute 'Nowhere'",
        ),
        ("# what it is", "finetuned = 3", "1:1  finetuned must be a table, found the number 3"),
        (
            "[finetune.second]",
            '[finetune."../x"]',
            "23:11  finetune.../x must be named by letters, digits, - and _: the name becomes a folder",
        ),
        ('summary = "Small"', "summary = 3", "3:1  recipe.summary must be a text, found the number 3"),
        ('summary = "Small"', "sumary = 's'", "3:1  recipe.sumary: unknown key, did you mean 'summary'?"),
        (
            '"@pretrain:parts.image"',
            '"@pretrian:parts.image"',
            "28:1  summary.loss: no table 'pretrian', did you mean 'pretrain'?",
        ),
        (
            '"@pretrain:parts.image"',
            "3",
            "28:1  summary.loss must be '@TABLE:path.to.metric' or '@TABLE', found the number 3",
        ),
        (
            '"@pretrain:parts.image"',
            '"@pretrain:"',
            "28:1  summary.loss must be '@TABLE:path.to.metric' or '@TABLE', found the text \"@pretrain:\"",
        ),
    ],
)
def test_a_problem_has_its_place_and_says_what_is_allowed(old, new, expected):
    assert f"r.toml:{expected}" in problems(changed(old, new))


def test_a_recipe_needs_a_recipe_table():
    assert problems("[finetune]\n") == ["r.toml  recipe.summary: missing key, expected a text"]


def test_a_recipe_needs_a_stage():
    assert problems("[recipe]\nsummary = 's'\n") == [
        "r.toml  no stage; add a table such as [pretrain], one of broken, finetune, pretrain"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[recipe]\nsummary = \n", "r.toml:2:11  no valid TOML: Invalid value"),
        ("[recipe]\nsummary = 's", 'r.toml:2:13  no valid TOML: Expected "\'" (at end of document)'),
        ("a = 1\na = 2\n", "r.toml:2:6  no valid TOML: Cannot overwrite a value"),
    ],
)
def test_a_file_that_is_no_toml_is_refused_with_the_place(text, expected):
    assert problems(text) == [expected]


def test_a_file_that_is_no_utf8_is_refused():
    Path("r.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(RecipeError, match=r"^r\.toml  is no UTF-8 text \(byte 5\); save it as UTF-8$"):
        recipe.load("r.toml")
