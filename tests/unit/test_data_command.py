"""The commands data check, data peek and data pack: options, output, exit codes."""

import json
import subprocess
import sys
import tomllib

import pytest
from inspected import BROKEN, MADE, Opened, beitctl, examples, install, picture
from PIL import Image

from beitctl.api import Example

NEXT = 'put into a recipe: source = { kind = "made", path = "x.made" }'


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    install(monkeypatch, made="Made")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BEITCTL_DEBUG", "")
    monkeypatch.setitem(MADE, "x.made", Opened(examples(8)))
    (tmp_path / "x.made").touch()
    return tmp_path


def test_check_says_what_is_there_and_what_to_do_next(capsys):
    code, out, err = beitctl(capsys, "data", "check", "x.made")
    first, *rest = out.splitlines()
    assert code == 0
    assert tomllib.loads(first) == {"source": {"kind": "made", "path": "x.made"}}
    assert "  examples     8" in rest
    assert err == f"next: beitctl data peek x.made, or {NEXT}\n"


def test_check_as_json_is_one_object_with_the_documented_keys(capsys):
    code, out, _ = beitctl(capsys, "data", "check", "x.made", "--json", "--limit", 4, "--workers", 1)
    report = json.loads(out)
    assert (code, report["path"], report["examples"], report["checked"]) == (0, "x.made", 8, 4)
    assert list(report) == [
        "path", "kind", "source", "recipe", "also", "fingerprint", "examples", "checked", "with", "bytes",
        "pictures", "classes", "answers", "objects", "captions", "text", "broken", "duplicates", "left_out",
        "ignored", "notes",
    ]  # fmt: skip


def test_check_reports_first_and_then_ends_with_3_if_too_much_is_broken(capsys, monkeypatch):
    monkeypatch.setitem(MADE, "x.made", Opened([*examples(3), BROKEN]))
    code, out, err = beitctl(capsys, "data", "check", "x.made", "--json")
    assert (code, json.loads(out)["broken"]["count"]) == (3, 1)
    assert err.startswith("error: x.made: 1 of 4 examples (25.00%) are broken")
    code, out, _ = beitctl(capsys, "data", "check", "x.made", "--max-bad-share", 0.25)
    assert (code, "#3: #1: not a readable picture (cut off)" in out) == (0, True)


def test_quiet_leaves_the_report_only(capsys):
    _, out, err = beitctl(capsys, "-q", "data", "check", "x.made")
    assert (bool(out), err) == (True, "")


def test_what_fits_as_well_and_what_could_not_be_asked_is_said(capsys, monkeypatch):
    install(monkeypatch, made="Made", more="Also", faulty="Faulty")
    _, _, err = beitctl(capsys, "data", "check", "x.made")
    assert "warning: source 'faulty' (unknown) cannot say whether it reads x.made" in err
    assert "x.made fits made and more alike: read as made; --kind changes that\n" in err


def test_kind_and_settings_are_repeated_in_what_to_do_next(capsys, monkeypatch):
    install(monkeypatch, made="Made", sure="Sure")
    code, out, err = beitctl(capsys, "data", "check", "x.made", "--kind", "made", "--set", "size=2")
    assert (code, tomllib.loads(out.splitlines()[0])["source"]["size"]) == (0, 2)
    assert "next: beitctl data peek x.made --kind made --set size=2, or" in err


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("check", "none"), 2, "none: no such file or folder"),
        (("check", "."), 2, ".: no source knows this layout. Found: 1 .made in 1 folder."),
        (("check", "x.made", "--kind", "mad"), 2, "did you mean 'made'?"),
        (("peek", "x.made", "--out", "."), 2, "--out .: a folder"),
        (("pack", "x.made", "--out", "x.made"), 2, "x.made: a file, but --out must be a folder"),
        (("pack", "x.made", "--out", "."), 2, "not empty (x.made) and no pack"),
    ],
)  # fmt: skip
def test_what_the_user_can_correct_ends_with_its_code_and_no_traceback(capsys, words, code, says):
    found, out, err = beitctl(capsys, "data", *words)
    assert (found, out, says in err, "Traceback" in err) == (code, "", True, False)


@pytest.mark.parametrize(
    "words", [("--px", "0"), ("--quality", "101"), ("--format", "zip"), ("--workers", "0")]
)
def test_options_out_of_range_are_refused(capsys, words):
    assert beitctl(capsys, "data", "pack", "x.made", "--out", "p", *words)[0] == 2


@pytest.mark.parametrize("words", [("check", "x.made"), ("peek", "x.made"), ("pack", "x.made", "--out", "p")])
def test_ctrl_c_ends_with_130_and_leaves_nothing_half_written(capsys, monkeypatch, place, words):
    monkeypatch.setitem(MADE, "x.made", Opened([*examples(3), KeyboardInterrupt()]))
    code, out, err = beitctl(capsys, "data", *words)
    assert (code, out, err.startswith("interrupted; ")) == (130, "", True)
    assert sorted(path.name for path in place.rglob("*")) == (
        ["p", "packing.jsonl", "x.made"] if "p" in words else ["x.made"]
    )


def test_peek_writes_a_png_and_prints_its_path(capsys, place):
    code, out, err = beitctl(
        capsys, "data", "peek", "x.made", "--out", "new/s.png", "--count", 3, "--seed", 1
    )
    assert (code, out, err) == (0, "new/s.png\n", "next: beitctl data check x.made\n")
    with Image.open(place / "new" / "s.png") as drawn:
        assert drawn.format == "PNG"


def test_pack_prints_the_folder_and_how_to_read_it(capsys, place):
    code, out, err = beitctl(capsys, "data", "pack", "x.made", "--out", "p", "--px", 16, "--format", "tar")
    assert (code, out) == (0, "p\n")
    assert err.startswith("8 examples in 1 shard, ")
    assert err.endswith('put into a recipe: source = { kind = "webdataset", path = "p", label = "cls" }\n')
    assert json.loads((place / "p" / "packed.json").read_text())["settings"]["px"] == 16


def test_pack_says_where_what_is_left_out_is_listed(capsys, monkeypatch):
    monkeypatch.setitem(MADE, "x.made", Opened([Example("a", picture()), BROKEN]))
    _, _, err = beitctl(capsys, "data", "pack", "x.made", "--out", "p", "--max-bad-share", "0.5")
    assert "; 1 left out, see p/left-out.jsonl\n" in err


def test_the_word_embedded_stands_for_the_data_that_come_with_beitctl(capsys, monkeypatch):
    install(monkeypatch, embedded="beitctl_plugins.sources.embedded:Embedded")
    code, out, _ = beitctl(capsys, "data", "check", "embedded", "--limit", 20, "--set", 'content="pairs"')
    assert (code, out.splitlines()[0]) == (0, 'source = { kind = "embedded", content = "pairs" }')


def test_an_error_with_json_writes_no_event_of_stages(capsys):
    assert beitctl(capsys, "data", "check", "none", "--json")[:2] == (2, "")


def test_help_imports_nothing_heavy():
    words = "import sys; from beitctl import cli; cli.execute(['data', 'pack', '--help'])"
    check = "; sys.exit(bool({'torch', 'numpy', 'PIL', 'pyarrow', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", words + check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--shard-mib" in done.stdout
