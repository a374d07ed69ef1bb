"""``tokenize-images --verify``: whether a finished store still holds the codes of its pictures."""

import json
import sys

import pytest
from coding import Noise, Quiet, Tiny, files, stage, tokenize
from small import Given, png

from beitctl import cli
from beitctl.api import Example, Job
from beitctl.checkpoints import native
from beitctl.errors import CheckFailed, DataError


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    made = Tiny()
    monkeypatch.setattr(native, "load_tokenizer", lambda path: made)
    return made


def verify(folder, made):
    return made.verify(Job(folder, Quiet()))


def test_an_untouched_store_holds_whatever_sample_is_taken(tmp_path):
    tokenize(tmp_path)
    before = files(tmp_path)
    found = verify(tmp_path, stage(verify_pictures=100))
    assert (found["pictures"], found["of"], found["codes"], found["differing"]) == (10, 10, 10 * 3 * 4, 0)
    assert files(tmp_path) == before


def test_a_sample_is_whole_batches_and_no_more(tmp_path):
    tokenize(tmp_path, stage(Noise(count=60), shard_pictures=50))
    found = verify(tmp_path, stage(Noise(count=60), shard_pictures=50, verify_pictures=5))
    assert found["pictures"] in (21, 8, 10)  # shards of 50 and 10 in batches of 21
    assert found["of"] == 60


def test_other_codes_fail_the_check_and_name_the_picture(tmp_path, tiny):
    exact = stage(precision="fp32")  # bf16, where a machine has it, allows some
    tokenize(tmp_path, exact)
    tiny.model[0].weight[0] += 1
    with pytest.raises(
        CheckFailed, match=r"of 120 codes differ \(allowed: 0, verify_differing\), in .*n0 \("
    ):
        verify(tmp_path, exact)


def test_a_share_of_the_codes_may_differ_if_it_is_allowed(tmp_path, tiny):
    tokenize(tmp_path)
    tiny.model[0].weight[0] += 1
    assert verify(tmp_path, stage(verify_differing=1.0))["differing"] > 0


def pictures(*colours):
    examples = tuple(Example(f"p{i}", png((colour, 0, 0))) for i, colour in enumerate(colours))
    return Given(examples=examples)


def test_a_changed_picture_is_named_before_its_codes_are(tmp_path):
    tokenize(tmp_path, stage(pictures(10, 20, 30)))
    with pytest.raises(DataError, match=r"1 of 3 pictures .*: p1: changed since its codes were made; put"):
        verify(tmp_path, stage(pictures(10, 90, 30)))


def test_a_picture_that_is_gone_or_broken_is_named(tmp_path):
    tokenize(tmp_path, stage(pictures(10, 20, 30)))
    left = Given(examples=(Example("p0", b"broken"), Example("p2", png((30, 0, 0)))))
    with pytest.raises(
        DataError, match=r"2 of 3 pictures .*p0: not a readable.*p1: no longer in the sources"
    ):
        verify(tmp_path, stage(left))


def test_more_pictures_in_the_source_are_no_fault(tmp_path):
    tokenize(tmp_path, stage(pictures(10, 20, 30)))
    more = Given(examples=(Example("new", png()), *pictures(10, 20, 30).examples))
    assert verify(tmp_path, stage(more))["differing"] == 0


def test_the_store_of_another_tokenizer_is_refused_by_name(tmp_path):
    tokenize(tmp_path, tokenizer=Tiny(1))
    with pytest.raises(DataError, match="made with tokenizer = 'tiny-1', but this run needs 'tiny-0'"):
        verify(tmp_path, stage())


def test_a_store_in_bf16_is_encoded_in_bf16_again(tmp_path):
    tokenize(tmp_path, stage(precision="bf16"))
    found = verify(tmp_path, stage(precision="bf16", verify_differing=0.0))
    assert (found["precision"], found["differing"]) == ("bf16", 0)


def beitctl(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["beitctl", *arguments])
    return cli.execute(list(arguments))


RECIPE = """
[recipe]
summary = "pictures"

[tokenize-images]
tokenizer = "."
views = 2
sources = [{ kind = "image-folder", path = "pictures" }]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A recipe and its pictures in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png((40 * number, 9, 9)))
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path


CALL = ("tokenize-images", "--recipe", "r.toml")


def test_the_command_checks_the_run_that_there_is(place, monkeypatch, capsys):
    assert beitctl(monkeypatch, "--quiet", *CALL) == 0
    capsys.readouterr()
    assert beitctl(monkeypatch, *CALL, "--verify", "--json", "--set", "verify_pictures=2") == 0
    found = json.loads(capsys.readouterr().out)["tokenize-images"]
    assert (found["pictures"], found["differing"]) == (3, 0)


def test_without_a_finished_run_the_command_says_so(place, monkeypatch, capsys):
    assert beitctl(monkeypatch, *CALL, "--verify") == 2
    assert "no finished run of [tokenize-images] with these settings" in capsys.readouterr().err


def test_a_run_with_other_settings_is_not_taken(place, monkeypatch, capsys):
    assert beitctl(monkeypatch, "--quiet", *CALL) == 0
    assert beitctl(monkeypatch, *CALL, "--verify", "--set", "views=3") == 2
    assert "(1 other runs)" in capsys.readouterr().err


def test_the_command_ends_with_3_if_a_picture_has_changed(place, monkeypatch, capsys):
    assert beitctl(monkeypatch, "--quiet", *CALL, "--out", "run") == 0
    (place / "pictures" / "1.png").write_bytes(png((1, 2, 3)))
    assert beitctl(monkeypatch, *CALL, "--verify", "--out", "run") == 3
    assert "1.png: changed since its codes were made" in capsys.readouterr().err


def test_the_command_ends_with_7_if_codes_differ(place, monkeypatch, capsys, tiny):
    assert beitctl(monkeypatch, "--quiet", *CALL) == 0
    tiny.model[0].weight[0] += 1
    assert beitctl(monkeypatch, *CALL, "--verify") == 7
    assert "codes differ" in capsys.readouterr().err


def test_a_stage_that_cannot_check_says_which_can(place, monkeypatch, capsys):
    assert beitctl(monkeypatch, "export", "--recipe", "tiny", "--verify") == 2
    expected = "the stage export has nothing to check; stages that have: tokenize-images"
    assert expected in capsys.readouterr().err
