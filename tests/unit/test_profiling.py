"""The window of steps that a recipe has profiled."""

import gzip
import json
import subprocess
import sys

import pytest
import torch

from beitctl.engine.measuring import profiling
from beitctl.engine.measuring.profiling import Window


def run(folder, steps, numbers, warn=pytest.fail, rank=0):
    """Steps of one matrix product each, of a size of its own, under a window."""
    with Window(folder, rank, steps, warn) as window:
        for number in numbers:
            with torch.profiler.record_function(f"work {number}"):
                torch.ones(64, 64) @ torch.ones(64, 64)
            window.step(number)


def worked(folder, rank=0):
    """Numbers of the steps whose work is in a trace."""
    with gzip.open(folder / "profile" / f"rank-{rank}.json.gz") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    return sorted(int(name.split()[1]) for name in names if name.startswith("work "))


@pytest.mark.parametrize("steps", [(1, 1), (1, 2), (3, 4)])
def test_the_trace_holds_the_steps_of_the_window_and_no_others(tmp_path, steps):
    run(tmp_path, steps, range(1, 7))
    assert worked(tmp_path) == list(range(steps[0], steps[1] + 1))


def test_the_table_names_the_operations_of_the_window(tmp_path):
    run(tmp_path, (2, 3), range(1, 5))
    text = (tmp_path / "profile" / "rank-0.txt").read_text()
    assert (text.startswith("2 steps of rank 0\n"), "aten::mm" in text) == (True, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_library_of_the_profiler_is_silent_about_a_gpu_that_is_not_there(tmp_path):
    code = (
        "import sys; from pathlib import Path; from beitctl.engine.measuring.profiling import Window\n"
        "with Window(Path(sys.argv[1]), 0, (1, 1), print) as window: window.step(1)"
    )  # in a process of its own: the library reads its settings once
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert (tmp_path / "profile" / "rank-0.txt").exists()


def test_every_rank_has_files_of_its_own(tmp_path):
    run(tmp_path, (1, 1), [1], rank=3)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank-3.json.gz", "rank-3.txt"]


def test_without_a_window_nothing_is_written(tmp_path):
    run(tmp_path, None, range(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_inside_the_window_writes_what_there_is(tmp_path):
    run(tmp_path, (2, 9), range(1, 4))
    assert worked(tmp_path) == [2, 3]


def test_a_run_that_fails_inside_the_window_writes_what_there_is(tmp_path):
    def failing():
        with Window(tmp_path, 0, (1, 9), pytest.fail) as window:
            window.step(1)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert (tmp_path / "profile" / "rank-0.txt").exists()


def test_a_run_that_resumes_inside_the_window_profiles_the_rest(tmp_path):
    run(tmp_path, (2, 7), range(5, 9))
    assert worked(tmp_path) == [6, 7]


def test_a_run_that_resumes_behind_the_window_profiles_nothing(tmp_path):
    run(tmp_path, (1, 3), range(8, 10))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    said = []
    run(tmp_path, (1, 1), range(1, 3), said.append)
    assert (len(said), "no profile of rank 0" in said[0], "goes on" in said[0]) == (1, True, True)


def test_a_profiler_that_does_not_start_is_a_warning(tmp_path, monkeypatch):
    def broken(self):
        raise RuntimeError("CUPTI is in use")

    monkeypatch.setattr(profiling.profile, "start", broken)
    said = []
    run(tmp_path, (2, 3), range(1, 6), said.append)
    assert (len(said), "CUPTI is in use" in said[0]) == (1, True)
