"""Processes and polite stops."""

import os
import signal
import time

import pytest

from beitctl.engine.dist import first_host, place_from
from beitctl.engine.guard import Signals
from beitctl.errors import SetupError


def test_alone_without_variables():
    assert place_from({}) == {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def test_torchrun_variables_are_read():
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert place_from(env) == {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}


def test_a_missing_variable_is_named():
    with pytest.raises(SetupError, match="LOCAL_RANK=unset"):
        place_from({"RANK": "0", "WORLD_SIZE": "2"})


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(SetupError, match="RANK=first"):
        place_from({"RANK": "first", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def test_slurm_variables_are_read(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    env = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "42"}
    assert place_from(env | {"SLURM_NODELIST": "gpu[03-04]"}) == {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1}
    assert os.environ == {"MASTER_ADDR": "gpu03", "MASTER_PORT": "20042"}


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[1-3,7]", "n1"), ("gpu[03,05],x", "gpu03")]
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert first_host(nodes) == first


def test_an_empty_slurm_list_is_refused():
    with pytest.raises(SetupError, match="MASTER_ADDR"):
        first_host("")


@pytest.mark.parametrize(("number", "asked"), [(signal.SIGTERM, "stop"), (signal.SIGINT, "interrupt")])
def test_the_first_signal_only_asks(number, asked):
    with Signals() as signals:
        assert signals.requested is None
        os.kill(os.getpid(), number)
        assert signals.requested == asked


def signal_and_wait(number):
    os.kill(os.getpid(), number)
    time.sleep(1)


def test_the_second_ctrl_c_leaves_at_once(monkeypatch):
    monkeypatch.setattr("beitctl.engine.guard.ECHO_S", 0.0)
    with Signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal_and_wait(signal.SIGINT)


def test_the_second_sigterm_leaves_at_once(monkeypatch):
    monkeypatch.setattr("beitctl.engine.guard.ECHO_S", 0.0)
    with Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            signal_and_wait(signal.SIGTERM)
    assert left.value.code == 143


def test_an_echo_of_a_signal_is_the_same_request():
    with Signals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == "stop"


def test_slurms_warning_and_its_end_are_one_request(monkeypatch):
    monkeypatch.setattr("beitctl.engine.guard.ECHO_S", 0.0)
    with Signals() as signals:
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.requested == "stop"


def test_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_file_asks_and_is_removed(tmp_path):
    (tmp_path / "stop").touch()
    with Signals(tmp_path) as signals:
        assert signals.requested == "stop"
    assert not (tmp_path / "stop").exists()
