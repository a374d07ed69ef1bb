import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from beitctl.replacing import replace_file
from beitctl.report import events, progress
from beitctl.report.events import EventLog
from beitctl.report.progress import Progress


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def log(tmp_path):
    with EventLog(tmp_path, stage="pretrain", recipe="tiny", run="5c1f0a2e") as log:
        yield log


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def terminal(monkeypatch):
    for name in ("CI", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def use():  # called in the test: pytest puts its own stderr in place after the fixtures
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return use


def lines(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def steps(folder, name="loss"):
    return [(r["step"], r["metrics"][name]) for r in events.read(folder) if name in r.get("metrics", {})]


def write_all(log):
    log.start({"steps": 2})
    log.step(1, 2, {"loss": 2.0})
    log.evaluation("knn", 1, {"accuracy": 0.5})
    log.checkpoint(1, log.folder / "checkpoints" / "step-1", 0.1)
    log.figure("codes", b"png", "title", "caption")
    log.table("classes", "Classes", ["class"], [["cat"]])
    log.note("hello")
    log.warning("W001", "slow.", "more workers")
    log.end("ok", 0, {"loss": 2.0})


def test_every_record_has_version_event_time_and_stage(log, tmp_path):
    write_all(log)
    assert [r["event"] for r in lines(tmp_path)] == [
        *("start", "step", "eval", "checkpoint", "image", "table", "note", "warning", "end")
    ]
    assert all(r["v"] == 1 and r["stage"] == "pretrain" and "T" in r["time"] for r in lines(tmp_path))


def test_start_and_end_name_the_run(log, tmp_path):
    write_all(log)
    start, end = lines(tmp_path)[0], lines(tmp_path)[-1]
    assert (start["run"], start["recipe"], start["dir"]) == ("5c1f0a2e", "tiny", str(tmp_path))
    assert (end["run"], end["status"], end["exit"], end["report"]) == ("5c1f0a2e", "ok", 0, "report.html")


def test_end_names_no_report_where_none_is_written(log, tmp_path):
    log.end("failed", 1, {}, report=None)
    assert "report" not in lines(tmp_path)[-1]


def test_checkpoint_path_is_relative_to_the_run_folder(log, tmp_path):
    write_all(log)
    assert lines(tmp_path)[3]["path"] == "checkpoints/step-1"


def test_numbers_that_are_not_finite_are_strings_that_float_reads(log, tmp_path):
    log.step(1, 2, {"a": float("nan"), "b": float("inf"), "c": np.float32("-inf")})
    metrics = lines(tmp_path)[0]["metrics"]
    assert metrics == {"a": "nan", "b": "inf", "c": "-inf"}
    assert float(metrics["c"]) == -np.inf


def test_arrays_and_zero_dimensional_values_become_plain_numbers(log, tmp_path):
    log.evaluation("e", 1, {"a": np.float32(0.5), "b": np.array(3), "c": np.array([1, 2])})
    assert lines(tmp_path)[0]["metrics"] == {"a": 0.5, "b": 3, "c": [1, 2]}


def test_floats_keep_every_bit(log, tmp_path):
    log.step(1, 2, {"loss": 0.1 + 0.2})
    assert lines(tmp_path)[0]["metrics"]["loss"] == 0.1 + 0.2


def test_inactive_log_writes_nothing(tmp_path, capsys):
    with EventLog(tmp_path / "run", stage="s", recipe="r", run="x", json_stdout=True, active=False) as log:
        write_all(log)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_json_mode_writes_the_same_lines_to_stdout(tmp_path, capsys):
    with EventLog(tmp_path, stage="s", recipe="r", run="x", json_stdout=True, quiet=True) as log:
        write_all(log)
    assert capsys.readouterr().out == (tmp_path / "events.jsonl").read_text()


def test_stdout_stays_empty_without_json(log, capsys):
    write_all(log)
    assert capsys.readouterr().out == ""


def test_quiet_log_writes_the_file_but_nothing_to_the_terminal(tmp_path, capsys):
    with EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log:
        write_all(log)
    assert capsys.readouterr() == ("", "")
    assert len(lines(tmp_path)) == 9


def test_a_second_log_appends(tmp_path):
    for number in (1, 2):
        with EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log:
            log.note(str(number))
    assert [r["message"] for r in lines(tmp_path)] == ["1", "2"]


def test_a_torn_last_line_is_removed_on_reopening(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event":"note","message":"a"}\n{"event":"no')
    with EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log:
        log.note("b")
    assert [r["message"] for r in lines(tmp_path)] == ["a", "b"]


def test_a_torn_line_longer_than_a_block_is_removed(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event":"note","message":"a"}\n' + "x" * 200_000)
    with EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log:
        log.note("b")
    assert [r["message"] for r in lines(tmp_path)] == ["a", "b"]


def test_a_complete_last_line_without_newline_is_kept(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event":"note","message":"a"}')
    with EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log:
        log.note("b")
    assert [r["message"] for r in lines(tmp_path)] == ["a", "b"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_reaches_the_caller_of_what_counts(tmp_path):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with (
        EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log,
        pytest.raises(OSError, match="No space left"),
    ):
        log.evaluation("held out", 1, {"loss": 1.0})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_gaps_among_steps_and_warnings_and_is_told_once(tmp_path, capsys):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with EventLog(tmp_path, stage="s", recipe="r", run="x") as log:
        log.step(1, 2, {"loss": 1.0})
        log.warning("W302", "no room for a checkpoint", "make room")
    err = capsys.readouterr().err
    assert err.count("has gaps from here on: No space left on device") == 1
    assert "no room for a checkpoint" in err


def test_a_write_that_the_disk_cuts_short_leaves_no_torn_line(tmp_path):
    class Full:
        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if self.calls > 1:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

    with open(tmp_path / "f", "ab+", buffering=0) as file:
        file.write(b"whole\n")
        with pytest.raises(OSError, match="No space left"):
            events._append(Full(file), b"part of a line\n")
    assert (tmp_path / "f").read_bytes() == b"whole\n"


def test_figure_is_written_to_media_and_recorded_with_the_step(log, tmp_path):
    log.step(7, 9, {"loss": 1.0})
    log.figure("recon", b"data", "A title", "A caption")
    record = lines(tmp_path)[-1]
    assert (tmp_path / record["path"]).read_bytes() == b"data"
    assert (record["path"], record["step"], record["title"]) == ("media/recon.png", 7, "A title")


def test_figure_name_cannot_leave_the_media_folder(log, tmp_path):
    log.figure("../../out side", b"data", "t", "c")
    assert lines(tmp_path)[-1]["path"] == "media/out-side.png"
    assert [p.parent for p in tmp_path.rglob("*.png")] == [tmp_path / "media"]


def test_replace_file_keeps_the_old_content_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "page"
    path.write_bytes(b"old")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        replace_file(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["page"]
    assert path.read_bytes() == b"old"


def test_reading_a_folder_without_log_gives_nothing(tmp_path):
    assert events.read(tmp_path / "absent") == []


def test_reading_passes_over_what_is_no_record(tmp_path):
    text = '\n[1]\n{"v":1}\nnonsense\n{"event":"note","message":"a"}\n{"event":"st'
    (tmp_path / "events.jsonl").write_bytes(text.encode() + b"\xff\xfe")
    assert [r["message"] for r in events.read(tmp_path)] == ["a"]


def test_steps_done_again_after_a_restart_count_once_with_the_later_value(log, tmp_path):
    log.start({})
    for step in (10, 20, 30):
        log.step(step, 40, {"loss": 1.0 * step})
    log.start({}, resumed_from=15)
    for step in (20, 30, 40):
        log.step(step, 40, {"loss": 2.0 * step})
    assert steps(tmp_path) == [(10, 10.0), (20, 40.0), (30, 60.0), (40, 80.0)]
    assert [r.get("resumed_from") for r in events.read(tmp_path) if r["event"] == "start"] == [None, 15]


def test_steps_done_again_after_a_return_to_a_checkpoint_count_once_with_the_later_value(log, tmp_path):
    for number, step in enumerate((10, 20, 30, 20, 30)):
        log.step(step, 40, {"loss": float(number)})
    assert steps(tmp_path) == [(10, 0.0), (20, 3.0), (30, 4.0)]


def test_a_restart_that_reached_no_step_overtakes_nothing(log, tmp_path):
    log.start({})
    log.step(10, 40, {"loss": 1.0})
    log.start({})
    assert steps(tmp_path) == [(10, 1.0)]


def test_several_restarts_are_unwound(log, tmp_path):
    for first, value in ((10, 1.0), (20, 2.0), (15, 3.0)):
        log.start({})
        for step in range(first, 40, 5):
            log.step(step, 40, {"loss": value})
    assert steps(tmp_path) == [(10, 1.0), *((s, 3.0) for s in range(15, 40, 5))]


def test_a_second_training_in_one_run_does_not_overtake_the_first(log, tmp_path):
    log.start({})
    log.step(10, 40, {"loss": 1.0})
    log.start({})
    log.step(5, 40, {"scratch/loss": 2.0})
    assert steps(tmp_path) == [(10, 1.0)]
    assert steps(tmp_path, "scratch/loss") == [(5, 2.0)]


def test_the_last_evaluation_and_picture_of_a_name_count(log, tmp_path):
    for value in (1, 2):
        log.evaluation("knn", 5, {"accuracy": value})
        log.figure("codes", b"x", f"title {value}", "")
    log.evaluation("knn", 6, {"accuracy": 3})
    records = events.read(tmp_path)
    assert [r["metrics"]["accuracy"] for r in records if r["event"] == "eval"] == [2, 3]
    assert [r["title"] for r in records if r["event"] == "image"] == ["title 2"]


def test_importing_the_log_imports_nothing_heavy():
    code = "import sys, beitctl.report.events; print(*{m.split('.')[0] for m in sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "matplotlib", "rich", "PIL", "jinja2"} & set(out.split())


def test_plain_lines_come_first_last_and_every_five_seconds(capsys, clock):
    bar = Progress("pretrain")
    for step in range(1, 13):
        bar.step(step, 12, {"loss": 8.7131, "samples_per_s": 94.0})
        clock.now += 1
    bar.close()
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in shown] == ["step=1", "step=6", "step=11", "step=12"]
    assert shown[1].endswith("pretrain step=6 of=12 loss=8.713 samples_per_s=94 eta=6s")


def test_the_last_state_is_shown_when_a_run_stops_early(capsys, clock):
    bar = Progress("pretrain")
    for step in (1, 2, 3):
        bar.step(step, 100, {"loss": 1.0})
    bar.close()
    assert [line.split()[2] for line in capsys.readouterr().err.splitlines()] == ["step=1", "step=3"]


def test_a_new_training_starts_its_own_speed(capsys, clock):
    bar = Progress("finetune")
    bar.step(1, 10, {})
    clock.now += 100
    bar.step(9, 10, {})
    bar.step(1, 10, {})
    assert "eta" not in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (42.4, "42s"), (190, "3m10s"), (7500, "2h05m"), (1_497_600, "17d08h")]
)
def test_durations_have_two_units(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(8.71349, "8.713"), (200.0, "200"), (0.00098, "0.00098"), (float("nan"), "nan")]
)
def test_numbers_have_four_significant_digits(value, text):
    assert progress.number(value) == text


def test_a_terminal_gets_a_live_block_that_ends_as_one_line(terminal, clock):
    err = terminal()
    bar = Progress("pretrain")
    bar.step(50, 200, {"image/loss": 8.5, "lr": 0.001})
    live = err.getvalue()
    bar.close()
    assert "25.0%" in live
    assert "image/loss 8.5\nlr 0.001" in live
    last = err.getvalue().rpartition("\x1b[2K")[2]
    assert last.count("\n") == 1
    assert last.rstrip().endswith("pretrain step=50 of=200 image/loss=8.5 lr=0.001")


def test_notes_on_a_terminal_are_not_read_as_markup(terminal, clock):
    err = terminal()
    bar = Progress("pretrain")
    bar.step(1, 2, {})
    bar.line("see [bold]this[/bold]")
    bar.close()
    assert "see [bold]this[/bold]" in err.getvalue()


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_no_live_block_in(name, value, terminal, monkeypatch, clock):
    monkeypatch.setenv(name, value)
    err = terminal()
    bar = Progress("pretrain")
    bar.step(1, 2, {"loss": 1.0})
    bar.close()
    assert "\x1b" not in err.getvalue()
    assert "step=1 of=2 loss=1" in err.getvalue()


def test_no_color_removes_all_styling(terminal, monkeypatch, clock):
    err = terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    bar = Progress("pretrain")
    bar.step(1, 2, {"loss": 1.0})
    bar.close()
    assert "loss 1" in err.getvalue()
    assert not re.search(r"\x1b\[[0-9;]*m", err.getvalue())


def test_json_lines_on_the_same_terminal_turn_the_live_block_off(tmp_path, terminal, monkeypatch):
    err = terminal()
    monkeypatch.setattr(sys, "stdout", Terminal())
    with EventLog(tmp_path, stage="s", recipe="r", run="x", json_stdout=True) as log:
        log.step(1, 2, {"loss": 1.0})
    assert "\x1b" not in err.getvalue()


def test_warnings_say_how_to_fix_them(log, capsys):
    log.warning("W012", "data wait above 10 %.", "raise data.workers")
    assert capsys.readouterr().err == "warning W012: data wait above 10 %. To fix: raise data.workers\n"
