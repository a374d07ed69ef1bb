"""What errors look like at the terminal: one line on stderr, and an exit code."""

from datetime import timedelta
from pathlib import Path

import pytest
from run_stubs import FAULTS, Make, beitctl, place  # noqa: F401 - the fixture works by being here
from torch import distributed

from beitctl import failures
from beitctl.engine import dist
from beitctl.errors import DivergedError, UserError


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("user", 2, "error: value: cannot be so, make it otherwise\n"),
        ("bug", 1, "RuntimeError: unexpected (a fault of beitctl or of a plugin: run again with --debug)\n"),
        ("full", 5, "error: /disk/x: No space left on device; free some space, then give the same command"),
        ("read-only", 2, "error: /disk/x: Read-only file system; change its permissions, or choose another"),
        ("stopped", 75, "\nstopped at step 3; the same command goes on\n"),
        ("ctrl-c", 130, "interrupted; the same command goes on from the last checkpoint\n"),
        ("memory", 5, "error: out of memory: MemoryError; use a smaller train.micro_samples"),
        ("diverged", 6, "error: the loss is nan\n"),
    ],
)
def test_every_error_has_its_exit_code_and_a_line_on_stderr(capsys, fault, code, message):
    Path("fault").write_text(fault)
    found, out, err = beitctl(capsys, "make", "--recipe", "r.toml")
    assert (found, out, message in err, "Traceback" in err) == (code, "", True, False), err


def test_faults_of_the_tests_are_all_used():
    assert len(FAULTS) == 8


def test_out_of_memory_of_torch_is_known_by_name():
    gone = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried 2 GiB\nmore")
    assert failures.exit_code(gone) == 5
    assert failures.message(gone).startswith("out of memory: CUDA out of memory. Tried 2 GiB; use a smaller")
    assert failures.exit_code(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == 5


@pytest.mark.parametrize(
    "text",
    [
        "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1. GLHF!",
        "[/x/gloo/transport/tcp/pair.cc:1] Read error [127.0.0.1]:1: Connection reset by peer",
        "NCCL error in: x.cpp:1, remote process exited\nncclRemoteError: A call failed",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ],
)
def test_the_end_of_another_process_is_told_as_that(text):
    error = RuntimeError(text)
    assert failures.message(error) == "another process of this run ended; its message is above"
    assert failures.exit_code(error) == 1


def test_an_interrupt_says_how_to_go_on():
    assert (
        failures.message(KeyboardInterrupt())
        == "interrupted; the same command goes on from the last checkpoint"
    )


def test_a_file_where_a_folder_must_be_is_named(capsys, monkeypatch):
    Path("busy").touch()
    monkeypatch.setenv("BEITCTL_RUNS", "busy")
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml")
    assert (code, err.startswith("error: busy/r/make.first"), "Not a directory" in err) == (2, True, True)


@pytest.mark.parametrize("path", ["/proc/x", "nowhere/x"])
@pytest.mark.parametrize("given", ["BEITCTL_RUNS", "--out"])
def test_a_folder_that_cannot_be_made_is_wrong_usage(capsys, monkeypatch, path, given):
    Path("nowhere").symlink_to("not there")
    arguments = ["make", "--recipe", "r.toml", "--only", "second"]
    if given == "--out":
        arguments += ["--out", path]
    else:
        monkeypatch.setenv("BEITCTL_RUNS", path)
    code, _, err = beitctl(capsys, *arguments)
    assert (code, err.startswith(f"error: {path}"), "cannot be made (" in err) == (2, True, True), err


def test_debug_shows_the_traceback(capsys):
    Path("fault").write_text("user")
    _, _, err = beitctl(capsys, "--debug", "make", "--recipe", "r.toml")
    assert "Traceback" in err
    assert err.endswith("error: value: cannot be so, make it otherwise\n")


def test_other_ranks_sign_their_errors_and_are_silent_when_stopped(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    failures.show(FAULTS["stopped"])
    failures.show(FAULTS["diverged"])
    assert capsys.readouterr().err == "error (rank 3): the loss is nan\n"


@pytest.mark.parametrize(
    ("said", "error", "told"),
    [
        ("no", UserError("no"), True),
        ("no", UserError("other"), False),
        ("no", DivergedError("no"), False),
        (None, UserError("no"), False),
    ],
)
def test_a_rank_is_silent_about_what_rank_0_refuses_in_the_same_words(monkeypatch, said, error, told):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(failures, "PATIENCE", timedelta(milliseconds=50))
    store = distributed.HashStore()
    if said:
        store.set(failures.SAID, said)
    assert failures.told_by_main(store, 2, error) == told


def test_all_problems_of_a_recipe_are_told_one_a_line(capsys):
    Path("r.toml").write_text('[recipe]\nsummary = "x"\n[make]\nvalue = "one"\n[uze]\n')
    code, _, err = beitctl(capsys, "run", "r.toml")
    assert code == 2
    assert [line.partition("  ")[0] for line in err.splitlines()] == [
        "error: r.toml:4:1",
        "error: r.toml:5:2",
    ]


@pytest.mark.parametrize("fault", [None, "diverged"])
def test_a_process_alone_leaves_the_group_that_a_stage_joined(capsys, monkeypatch, fault):
    run = Make.run
    monkeypatch.setattr(Make, "run", lambda self, job: dist.start() and run(self, job))
    if fault:
        Path("fault").write_text(fault)
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml", "--only", "first")
    assert (code, distributed.is_initialized()) == (6 if fault else 0, False), err
