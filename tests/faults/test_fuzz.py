"""A few damaged files of every kind, and that the harness finds what it looks for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_bytes import damaged, damaged_between
from fuzz_judges import damaged_file, draw_of
from fuzz_pictures import corpus, jpeg_segments, png_chunks, png_of, webp_chunks, webp_of
from fuzzing import KINDS

HARNESS = Path(__file__).with_name("fuzzing.py")


def fuzz(folder, *options):
    command = [sys.executable, HARNESS, "--quiet", "--save", folder / "found", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=100)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def planted(folder, kind, *options):
    return fuzz(folder, "--files", "3", "--kinds", f"planted-{kind}", "--limit-seconds", "0.4", *options)


def test_damaged_files_of_every_kind_end_in_examples_or_an_error_with_an_exit_code(tmp_path):
    code, report = fuzz(tmp_path, "--files", 8 * len(KINDS), "--seed", 1)
    assert (code, report["findings"]) == (0, [])
    assert report["peak_mib"] < 2048
    for counts in report["kinds"].values():
        assert counts["accepted"] + counts["refused"] == counts["files"] == 8


def test_files_that_do_no_harm_are_no_findings(tmp_path):
    code, report = planted(tmp_path, "good")
    assert (code, report["kinds"]) == (0, {"planted-good": {"files": 3, "accepted": 3, "refused": 0}})


@pytest.mark.parametrize("kind", ["error", "crash", "hang"])
def test_a_planted_fault_is_found_and_the_file_kept(kind, tmp_path):
    code, report = planted(tmp_path, kind)
    (found,) = report["findings"]
    assert (code, found["result"], found["seed"], found["number"]) == (1, kind, 0, 1)
    assert Path(found["saved"]).read_text() == f"planted-{kind} 0 1"
    assert report["kinds"][f"planted-{kind}"]["accepted"] == 2, "the files behind it are judged"


def test_a_planted_exception_comes_with_its_traceback(tmp_path):
    _, report = planted(tmp_path, "error")
    assert "KeyError: 'planted'" in report["findings"][0]["detail"]


def test_a_planted_crash_comes_with_the_place_where_it_happened(tmp_path):
    _, report = planted(tmp_path, "crash")
    assert "Segmentation fault" in report["findings"][0]["detail"]


@pytest.mark.parametrize("kind", ["hog", "lazy-hog"])
def test_planted_use_of_memory_is_found_while_it_lasts_and_afterwards(kind, tmp_path):
    code, report = planted(tmp_path, kind, "--limit-mib", "300", "--limit-seconds", "10")
    (found,) = report["findings"]
    assert (code, found["result"], found["number"]) == (1, "memory", 1)
    assert report["peak_mib"] > 300


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_follows_from_kind_seed_and_number(kind):
    first, second, other = (damaged_file(kind, draw_of(kind, *of)) for of in ((3, 4), (3, 4), (3, 5)))
    assert first == second != other


@pytest.mark.parametrize("data", corpus("jpeg"))
def test_a_jpeg_is_taken_apart_without_loss(data):
    assert b"".join(jpeg_segments(data)) == data


@pytest.mark.parametrize(
    ("kind", "apart", "together"), [("png", png_chunks, png_of), ("webp", webp_chunks, webp_of)]
)
def test_png_and_webp_are_put_together_as_they_were(kind, apart, together):
    for data in corpus(kind):
        assert together(apart(data)) == data


def test_damage_in_a_part_leaves_the_rest():
    data = bytes(range(256)) * 4
    for number in range(200):
        changed = damaged_between(draw_of("x", 0, number), data, 100, 200)
        assert changed[:100] + changed[200:] == data[:100] + data[200:]
        assert len(changed) == len(data)


def test_damage_changes_most_files():
    data = bytes(range(256)) * 4
    assert sum(damaged(draw_of("x", 0, number), data) != data for number in range(100)) > 90
