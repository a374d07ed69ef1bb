"""Processes, who is missing among them, and polite stops."""

import os
import signal
import time
from datetime import timedelta

import pytest

from beitctl.engine import dist, meeting
from beitctl.engine.dist import first_host, local_world, place_from, start
from beitctl.engine.guarding.signals import Signals
from beitctl.errors import SetupError, UserError


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
    monkeypatch.setattr("beitctl.engine.guarding.signals.ECHO_S", 0.0)
    with Signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal_and_wait(signal.SIGINT)


def test_the_second_sigterm_leaves_at_once(monkeypatch):
    monkeypatch.setattr("beitctl.engine.guarding.signals.ECHO_S", 0.0)
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


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGTERM, "SIGTERM received: finishing this step, then saving"),
        (signal.SIGUSR1, "SIGUSR1 received: finishing this step, then saving"),
        (signal.SIGINT, "Ctrl-C: finishing this step, then saving (once more to leave now)"),
    ],
)
def test_what_was_received_is_told_and_what_follows(capfd, number, text):
    with Signals():
        os.kill(os.getpid(), number)
    assert capfd.readouterr().err == f"\n{text}\n"


def test_slurms_warning_and_its_end_are_one_request(monkeypatch):
    monkeypatch.setattr("beitctl.engine.guarding.signals.ECHO_S", 0.0)
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


@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, 16),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)"}, 4),
        ({"LOCAL_WORLD_SIZE": "99"}, 16),
    ],
)
def test_ranks_of_this_machine(env, found):
    assert local_world(env, 16) == found


def test_ranks_are_on_one_machine_unless_told_otherwise():
    assert dist.Ranks(0, 4, 0, "cpu").local_world == 4


def test_groups_that_do_not_divide_the_ranks_are_refused_with_what_does():
    with pytest.raises(UserError) as caught:
        dist.Ranks(0, 12, 0, "cpu").mesh(5)
    assert str(caught.value) == (
        "shard_ranks = 5: 12 ranks cannot be divided into groups of 5; allowed are 1, 2, 3, 4, 6, 12"
    )


def meshes_as_rank():
    """Axes and sizes of the meshes of 4 ranks."""
    ranks = start()
    found = [ranks.mesh(size) for size in (0, 4, 2, 1)]
    ranks.stop()
    return [[list(mesh.mesh_dim_names), list(mesh.shape)] for mesh in found]


def test_one_group_is_one_axis_and_several_are_two(on_ranks):
    both = ["replicate", "shard"]
    assert on_ranks(meshes_as_rank, 4)[0] == [
        [["shard"], [4]],
        [["shard"], [4]],
        [both, [2, 2]],
        [both, [4, 1]],
    ]


def rank_without_its_third():
    """Two ranks of three start."""
    os.environ["WORLD_SIZE"] = "3"
    dist.START_TIMEOUT = timedelta(seconds=3)
    try:
        start()
    except SetupError as error:
        return str(error)


def test_a_rank_that_never_arrives_is_named(on_ranks):
    assert on_ranks(rank_without_its_third, 2)[0] == (
        "1 of 3 ranks did not arrive within 3 s: 2; look at what these processes say, or whether they were "
        "started"
    )


def rank_without_the_first():
    os.environ |= {"WORLD_SIZE": "2", "RANK": "1"}
    dist.START_TIMEOUT = timedelta(seconds=1)
    try:
        start()
    except SetupError as error:
        return str(error)


def test_the_address_of_rank_0_is_named_if_it_is_not_there(on_ranks):
    (said,) = on_ranks(rank_without_the_first, 1)
    assert said.startswith("rank 1 of 2 cannot join the group at 127.0.0.1:")


def rank_with_other_torch():
    """Rank 1 has an older torch."""
    own = meeting.versions() | {"torch": "2.11.0" if os.environ["RANK"] == "1" else "2.14.1"}
    meeting.versions = lambda: own
    try:
        start()
    except SetupError as error:
        return str(error)


def test_ranks_with_other_versions_are_named(on_ranks):
    said = on_ranks(rank_with_other_torch, 3)
    assert said[0] == said[1] == said[2]
    assert said[0].startswith("versions differ: rank 1 on ")
    assert " has torch 2.11.0; the others have beitctl " in said[0]
    assert said[0].endswith(", torch 2.14.1. Install the same everywhere")
