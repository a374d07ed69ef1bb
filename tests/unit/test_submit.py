"""``--submit slurm``: the job script, what is said about the job, and what is refused."""

import builtins
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from run_stubs import beitctl, install, place  # noqa: F401 - the fixture works by being here

from beitctl import launch, submit
from beitctl.errors import UserError
from beitctl.submit import Request

pytest.importorskip("submitit")
OWN = ("make", "--recipe", "r.toml", "--only", "first", "--out", "own")
SBATCH = 'cp "$1" sbatch.txt; echo "Submitted batch job 4711"'


def program(name, text):
    """A program on PATH."""
    path = Path("bin", name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(monkeypatch):
    """A machine where jobs can be submitted: sbatch keeps what it is given."""
    program("sbatch", SBATCH)
    program("srun", 'printf "%s\\n" "$@" > srun.txt; exit ${CODE:-0}')
    program("scontrol", 'echo "$@" >> scontrol.txt')
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}{os.pathsep}{os.environ['PATH']}")


def script():
    return Path("sbatch.txt").read_text()


def flags():
    """Options of sbatch in the script."""
    lines = [line.removeprefix("#SBATCH --") for line in script().splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_the_job_number_goes_to_stdout_and_the_log_is_named(cluster, capsys):
    code, out, err = beitctl(capsys, *OWN, "--submit", "slurm")
    assert (code, out) == (0, "4711\n"), err
    folder = Path("own/slurm").resolve()
    assert err.splitlines() == [
        "job 4711 is submitted; it comes back by itself until it is done",
        f"log: {folder}/4711_0_log.out   script: {folder}/4711_submission.sh   cancel: scancel 4711",
    ]
    assert (folder / "4711_submission.sh").read_text() == script()


def test_json_gives_one_record(cluster, capsys):
    code, out, _ = beitctl(capsys, *OWN, "--submit", "slurm", "--json")
    made = json.loads(out)
    assert (code, made["event"], made["scheduler"], made["job"]) == (0, "submitted", "slurm", "4711")
    assert Path(made["script"]).is_file()


def test_there_is_one_task_for_each_gpu_and_it_comes_back(cluster, capsys):
    asked = ("--nodes", "2", "--gpus", "8", "--partition", "gpu", "--time", "4h", "--slurm", "account=vision")
    assert beitctl(capsys, *OWN, "--submit", "slurm", *asked, "--slurm", "exclusive")[0] == 0
    found = flags()
    wanted = {
        "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "partition": "gpu", "time": "240",
        "signal": "USR1@300", "requeue": "", "open-mode": "append", "account": "vision", "exclusive": "",
        "job-name": "beitctl-r",
    }  # fmt: skip
    assert {key: found.get(key) for key in wanted} == wanted
    assert "wckey" not in found


def test_without_a_time_that_of_the_partition_holds(cluster, capsys):
    beitctl(capsys, *OWN, "--submit", "slurm")
    assert "time" not in flags()


def test_a_short_job_is_warned_half_way(cluster, capsys):
    beitctl(capsys, *OWN, "--submit", "slurm", "--time", "5m")
    assert flags()["signal"] == "USR1@150"


def test_an_option_of_sbatch_replaces_ours(cluster, capsys):
    beitctl(capsys, *OWN, "--submit", "slurm", "--slurm", "gpus_per_node=h200:1", "--slurm", "signal=USR1@60")
    found = flags()
    assert (found["gpus-per-node"], found["signal"]) == ("h200:1", "USR1@60")
    assert script().count("gpus-per-node") == 1


def test_tasks_run_the_same_command_without_what_is_about_the_job():
    given = ["--debug", *OWN, "--submit=slurm", "--gpus", "8", "--nodes=2", "--set", "value=--gpus", "--json"]
    given += ["--slurm", "a=b", "--time", "4h", "--partition", "x", "--max-time", "3h"]
    kept = ["--debug", *OWN, "--set", "value=--gpus", "--json", "--max-time", "3h"]
    assert submit.command(given) == [sys.executable, "-u", "-m", "beitctl", *kept]


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (1, False), (137, False)])
def test_the_script_requeues_after_75_and_only_then(cluster, capsys, monkeypatch, code, requeued):
    beitctl(capsys, *OWN, "--set", "make.first.value=5", "--submit", "slurm")
    monkeypatch.setenv("CODE", str(code))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert subprocess.run(["bash", "sbatch.txt"]).returncode == code
    asked = Path("scontrol.txt").read_text().split("\n") if Path("scontrol.txt").exists() else []
    assert asked == (["requeue 4711", ""] if requeued else [])
    words = Path("srun.txt").read_text().splitlines()
    assert words[-10:] == ["-u", "-m", "beitctl", *OWN, "--set", "make.first.value=5"][-10:]


def test_a_job_that_always_stops_does_not_come_back_for_ever(cluster, capsys, monkeypatch):
    beitctl(capsys, *OWN, "--submit", "slurm")
    for name, value in {"CODE": "75", "SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "1000"}.items():
        monkeypatch.setenv(name, value)
    assert subprocess.run(["bash", "sbatch.txt"]).returncode == 75
    assert not Path("scontrol.txt").exists()


def test_the_folder_of_the_logs_does_not_make_out_somebody_elses(cluster, capsys):
    beitctl(capsys, *OWN, "--submit", "slurm")
    assert beitctl(capsys, *OWN)[0] == 0


def test_run_is_submitted_too_with_its_logs_beside_the_runs(cluster, capsys):
    code, _, err = beitctl(capsys, "run", "r.toml", "--submit", "slurm")
    assert code == 0, err
    assert Path("runs/r/slurm/4711_submission.sh").is_file()
    assert not Path("runs/r/make.first").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((*OWN, "--set", "make.first.value=x"), "--set make.first.value=x"),
        (("make", "--recipe", "none.toml"), "none.toml"),
        (("make", "--recipe", "r.toml", "--only", "third"), "--only third"),
        (("run", "r.toml", "--until", "third"), "--until third"),
        ((*OWN, "--max-time", "soon"), "--max-time soon"),
        ((*OWN, "--time", "soon"), "--time soon: is no time above 0"),
        ((*OWN, "--gpus", "0"), "--gpus 0: must be at least 1"),
        ((*OWN, "--nodes", "0"), "--nodes 0"),
        ((*OWN, "--slurm", "=x"), "--slurm =x: write KEY=VALUE"),
        ((*OWN, "--slurm", "a b=x"), "--slurm a b=x: write KEY=VALUE"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_submitted(cluster, capsys, command, said):
    code, _, err = beitctl(capsys, *command, "--submit", "slurm")
    assert (code, said in err, Path("sbatch.txt").exists(), Path("own").exists()) == (
        2,
        True,
        False,
        False,
    ), err


@pytest.mark.parametrize(
    ("asked", "world"), [(("--nodes", "2", "--gpus", "8", "--submit", "slurm"), 16), (("--gpus", "2"), 2)]
)
def test_groups_that_do_not_divide_the_processes_are_refused_before_they_start(
    cluster, capsys, monkeypatch, asked, world
):
    install(monkeypatch, {"learn": "run_stubs:Learn"})
    monkeypatch.setattr(launch, "run", lambda *arguments: pytest.fail("started"))
    train = "train = { steps = 1, shard_ranks = 3, optim = { peak_lr = 1e-3 } }"
    Path("l.toml").write_text(f'[recipe]\nsummary = "x"\n[learn]\n{train}\n')
    for command in (("learn", "--recipe", "l.toml"), ("run", "l.toml")):
        code, _, err = beitctl(capsys, *command, *asked)
        said = f"learn.train.shard_ranks (3) must divide the number of processes, {world} (--nodes x --gpus)"
        assert (code, said in err, Path("sbatch.txt").exists()) == (2, True, False), err


@pytest.mark.parametrize(
    "option", [("--nodes", "2"), ("--partition", "a"), ("--time", "1h"), ("--slurm", "a=b")]
)
def test_options_of_a_job_are_refused_without_one(capsys, option):
    code, _, err = beitctl(capsys, *OWN, *option)
    assert (code, f"{option[0]} belongs to --submit slurm" in err, Path("own").exists()) == (2, True, False)


def test_what_sbatch_says_against_it_is_passed_on(cluster, capsys):
    program("sbatch", 'echo "sbatch: error: invalid partition specified: x" >&2; exit 1')
    code, _, err = beitctl(capsys, *OWN, "--submit", "slurm", "--partition", "x")
    assert (code, "sbatch refused the job: sbatch: error: invalid partition specified: x" in err) == (2, True)


def test_a_machine_without_slurm_is_no_place_to_submit_from(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = beitctl(capsys, *OWN, "--submit", "slurm")
    assert (code, "there is no srun on this machine" in err) == (4, True)


def test_without_submitit_the_extra_is_named(cluster, capsys, monkeypatch):
    found = builtins.__import__

    def missing(name, *arguments, **words):
        if name.startswith("submitit"):
            raise ImportError(name)
        return found(name, *arguments, **words)

    monkeypatch.setattr(builtins, "__import__", missing)
    code, _, err = beitctl(capsys, *OWN, "--submit", "slurm")
    assert (code, "pip install 'beitctl[slurm]'" in err) == (4, True)


def test_an_unknown_scheduler_is_wrong_usage(capsys):
    code, _, err = beitctl(capsys, *OWN, "--submit", "lsf")
    assert (code, "slurm" in err) == (2, True)


def test_a_request_without_options_is_for_one_gpu():
    found = Request().parameters("x")
    assert (found["nodes"], found["gpus_per_node"], found["ntasks_per_node"]) == (1, 1, 1)
    with pytest.raises(UserError, match="--gpus -1: must be at least 1"):
        Request(gpus=-1).parameters("x")
