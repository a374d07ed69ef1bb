"""--gpus N: processes, their environment, their end."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from beitctl import launch
from beitctl.errors import SetupError, UserError


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4"}, 4),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 8),
        ({"SLURM_NTASKS": "8"}, 1),
        ({"WORLD_SIZE": "many"}, 1),
    ],
)
def test_the_number_of_processes_comes_from_torchrun_or_slurm(env, world):
    assert launch.world(env) == world


@pytest.mark.parametrize(
    ("gpus", "env", "needed"),
    [
        (None, {}, False),
        (None, {"WORLD_SIZE": "8"}, False),
        (1, {}, False),
        (1, {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, False),
        (2, {}, True),
        (2, {"WORLD_SIZE": "2"}, False),
        (2, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        (1, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, False),
        (8, {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
    ],
)
def test_processes_are_started_unless_somebody_did(monkeypatch, gpus, env, needed):
    monkeypatch.setattr(launch, "_gpus", lambda env: 0)
    assert launch.needed(gpus, env) == needed


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, "torchrun has started .* LOCAL_WORLD_SIZE=4"),
        ({"WORLD_SIZE": "1"}, "torchrun has started .* WORLD_SIZE=1"),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "4(x2)"},
            r"Slurm has started .* SLURM_TASKS_PER_NODE=4\(x2\)",
        ),
    ],
)
def test_another_number_of_gpus_than_somebody_has_started_is_refused(env, said):
    with pytest.raises(UserError, match=f"--gpus 2: {said}; leave --gpus out"):
        launch.needed(2, env)


def test_one_gpu_is_another_number_than_eight():
    with pytest.raises(UserError, match="--gpus 1: torchrun has started these processes, WORLD_SIZE=8"):
        launch.needed(1, {"WORLD_SIZE": "8"})


def test_less_than_one_gpu_is_refused():
    with pytest.raises(UserError, match="--gpus 0: must be at least 1"):
        launch.needed(0, {})


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "_gpus", lambda env: 2)
    with pytest.raises(SetupError, match="--gpus 3: this machine offers 2; use --gpus 2 or less"):
        launch.needed(3, {})


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0", 1), ("", 0), ("0,1,2", 2)])
def test_gpus_are_those_that_cuda_may_show(monkeypatch, tmp_path, visible, count):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(launch, "Path", lambda text: tmp_path)
    assert launch._gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_a_machine_without_the_driver_has_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "Path", lambda text: tmp_path / "none")
    assert launch._gpus({}) == 0


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts processes that execute a text in which ``rank`` is known."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def start(text, *, ranks=2, grace=20.0):
        head = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
        Path("work.py").write_text(head + text)
        return launch.run(ranks, ["a", "b"], module="work", grace=grace)

    return start


def test_every_rank_knows_its_place_and_the_arguments(start, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    text = f"open(f'out{{rank}}', 'w').write(' '.join([os.environ[n] for n in {names}] + sys.argv[1:]))"
    assert start(text) == 0
    first, second = (Path(f"out{rank}").read_text().split() for rank in range(2))
    port, threads = first[4:6]
    assert first == ["0", "2", "2", "127.0.0.1", port, threads, "a", "b"]
    assert second == ["1", "2", "2", "127.0.0.1", port, threads, "a", "b"]
    assert int(threads) == max(1, os.cpu_count() // 2)


def test_the_exit_code_of_the_rank_that_failed_is_kept(start):
    assert start("sys.exit(6 if rank == 1 else 0)") == 6


def test_the_first_failure_counts(start):
    assert start("time.sleep(0.6 * rank); sys.exit(5 + rank)") == 5


def test_a_reason_of_its_own_outweighs_the_failure_that_it_caused_elsewhere(start):
    assert start("time.sleep(0.6 * (1 - rank)); sys.exit(1 if rank else 6)") == 6


def test_a_rank_that_is_killed_fails_with_128_and_the_signal(start):
    assert start("rank or os.kill(os.getpid(), signal.SIGKILL)") == 128 + signal.SIGKILL


def test_ranks_left_behind_are_ended(start):
    began = time.monotonic()
    assert start("sys.exit(3) if rank else time.sleep(60)", grace=0.2) == 3
    assert time.monotonic() - began < 10


def test_ranks_that_ignore_sigterm_are_killed(start, monkeypatch):
    monkeypatch.setattr(launch, "KILL_SECONDS", 0.3)
    text = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsys.exit(3) if rank else time.sleep(60)"
    began = time.monotonic()
    assert start(text, grace=0.5) == 3
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank(start, number):
    def send():
        while not all(Path(f"ready{rank}").exists() for rank in range(2)):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    text = (
        f"signal.signal({int(number)}, lambda *_: (open(f'got{{rank}}', 'w'), sys.exit(75)))\n"
        "open(f'ready{rank}', 'w')\ntime.sleep(30)"
    )
    thread = threading.Thread(target=send)
    thread.start()
    code = start(text)
    thread.join()
    assert (code, Path("got0").exists(), Path("got1").exists()) == (75, True, True)


def test_handlers_of_signals_are_given_back(start):
    before = signal.getsignal(signal.SIGTERM)
    start("pass")
    assert signal.getsignal(signal.SIGTERM) is before
