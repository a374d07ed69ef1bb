"""Where keys are in a TOML text."""

import tomllib
from pathlib import Path

import pytest

from beitctl.toml_places import dotted_key, places


def test_keys_of_tables_have_their_line_and_column():
    assert places("[a]\nb = 1\n  c = 2\n")["a", "c"] == (3, 3)


def test_parts_of_a_dotted_key_have_places_of_their_own():
    found = places("a.'b c'.d = 1")
    assert (found["a",], found["a", "b c"], found["a", "b c", "d"]) == ((1, 1), (1, 3), (1, 9))


def test_keys_inside_inline_tables_are_found():
    assert places("a = { b = 1, c = { d = 2 } }")["a", "c", "d"] == (1, 20)


def test_entries_of_a_list_over_several_lines_are_found():
    assert places("a = [ # one\n  1,\n  # two\n  { b = 3 },\n]")["a", 1, "b"] == (4, 5)


def test_entries_of_an_array_of_tables_are_counted():
    found = places("[[a]]\nb = 1\n[[a]]\nb = 2\n[a.c]\nd = 3\n")
    assert (found["a", 0, "b"], found["a", 1, "b"], found["a", 1, "c", "d"]) == ((2, 1), (4, 1), (6, 1))


@pytest.mark.parametrize(
    "value",
    [
        '"""\nx = 1\n[y]\n"quoted" \\""""" ',
        "'''\nx = 1\n'it''s' '''",
        '"# no \\" comment"',
        "'C:\\'",
        "[ 'a]', \"b,#\" ]",
        "1979-05-27 07:32:00Z # born",
        "{ x = [ { y = ']' } ] }",
    ],
)
def test_what_looks_like_a_key_inside_a_value_is_none(value):
    text = f"first = {value}\nlast = 1\n"
    lines = text.count("\n")
    assert set(tomllib.loads(text)) == {"first", "last"}
    assert {keys[0] for keys in places(text)} == {"first", "last"}
    assert places(text)["last",] == (lines, 1)


def test_implied_tables_have_a_place():
    assert places("\n[a.b.c]\n")["a", "b"] == (2, 4)


def test_escapes_in_a_quoted_key_are_undone():
    assert dotted_key('"a\\u0062".c=1') == ([("ab", 0), ("c", 10)], 11)


def test_no_key_is_an_error():
    with pytest.raises(ValueError, match=r"no key at character 3 of 'a\.=1'"):
        dotted_key("a.=1")


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "file", ["pyproject.toml", *(f"recipes/{p.name}" for p in ROOT.glob("recipes/*.toml"))]
)
def test_every_key_of_a_real_file_has_a_place_and_nothing_else_has(file):
    text = (ROOT / file).read_text(encoding="utf-8")

    def below(value, keys):
        inner = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        return {keys}.union(*(below(item, (*keys, key)) for key, item in inner))

    assert set(places(text)) == below(tomllib.loads(text), ()) - {()}
