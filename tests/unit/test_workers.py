"""Worker processes: steps in order, deaths survived or explained."""

import os
import signal
import time

import pytest
from torch.utils.data import Dataset, dataloader

from beitctl.data import workers
from beitctl.data.workers import steps, working_on
from beitctl.errors import ChangedError, DataError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    waiting = dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waiting, "__defaults__", (0.2,))  # torch looks for dead workers every 5 seconds


class Killing(Dataset):
    """Numbers; the process that loads one of ``deadly`` is killed as often as a folder has room for notes."""

    def __init__(self, folder, deadly=(), times=1, how=signal.SIGKILL):
        self.folder, self.deadly, self.times, self.how = folder, deadly, times, how

    def __getitem__(self, step):
        working_on(f"image/sample_{step}")
        if step in self.deadly and len(list(self.folder.glob(f"{step}.*"))) < self.times:
            (self.folder / f"{step}.{time.monotonic_ns()}").touch()
            os.kill(os.getpid(), self.how)
        return step


class Failing(Dataset):
    def __init__(self, error):
        self.error = error

    def __getitem__(self, step):
        if step == 3:
            raise self.error
        return step


def run(data, start=0, stop=12, count=2, warn=lambda text: None):
    return list(steps(data, start, stop, count, lambda worker: None, warn))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_steps_come_in_order(tmp_path, count):
    assert run(Killing(tmp_path), 5, 12, count) == list(range(5, 12))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_worker_is_replaced_at_the_same_position(tmp_path, how):
    warned = []
    assert run(Killing(tmp_path, (4,), 1, how), warn=warned.append) == list(range(12))
    assert len(warned) == 1
    assert "died at step" in warned[0]
    assert "image/sample_4" in warned[0]


def test_deaths_at_different_samples_do_not_end_loading(tmp_path):
    assert run(Killing(tmp_path, (1, 5, 7, 10), 2)) == list(range(12))


def test_three_deaths_at_one_sample_end_with_its_id(tmp_path):
    with pytest.raises(DataError, match=r"died 3 times while they loaded .*image/sample_6"):
        run(Killing(tmp_path, (6,), 99))
    assert len(list(tmp_path.iterdir())) == 3


def test_deaths_without_progress_end_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_at_work", lambda message, notes: [])
    with pytest.raises(DataError, match=r"died 10 times before step 0 .*lower train\.workers"):
        run(Killing(tmp_path, (0,), 99))


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("kind", [DataError, ChangedError])
def test_an_error_of_the_data_comes_as_it_is(count, kind):
    with pytest.raises(kind, match=r"^x\.tar: gone$"):
        run(Failing(kind("x.tar: gone")), count=count)


def test_other_errors_of_a_worker_are_not_taken_for_deaths():
    with pytest.raises(RuntimeError, match="a bug"):
        run(Failing(RuntimeError("a bug")))


def test_a_dead_worker_raises_nothing_outside_of_loading(tmp_path):
    before = signal.getsignal(signal.SIGCHLD)
    found = steps(Killing(tmp_path, (6,)), 0, 12, 2, lambda worker: None)
    assert next(found) == 0
    assert signal.getsignal(signal.SIGCHLD) is before
    found.close()
