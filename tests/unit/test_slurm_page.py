"""The scripts of docs/slurm.md, run with stand-ins for the programs of a cluster."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from beitctl import settings

PAGE = Path(__file__).parents[2] / "docs" / "slurm.md"


def program(name, text):
    path = Path("bin", name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def script(word):
    """The script on the page that runs a program."""
    blocks = [part.partition("\n```")[0] for part in PAGE.read_text().split("```bash\n")[1:]]
    (found,) = [block for block in blocks if block.startswith("#!/bin/bash") and f"{word} --" in block]
    Path("job.sh").write_text(found + "\n")
    return found


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    program("scontrol", 'echo "$@" >> scontrol.txt')


def requeued():
    return Path("scontrol.txt").read_text() if Path("scontrol.txt").exists() else ""


@pytest.mark.parametrize(("code", "asked"), [(75, "requeue 4711\n"), (0, ""), (6, ""), (137, "")])
def test_the_job_is_requeued_once_after_75_and_only_then(code, asked):
    script("srun")
    program("srun", f"sleep 0.1; exit {code}")
    assert subprocess.run(["bash", "job.sh"], timeout=30).returncode == code
    assert requeued() == asked


def test_the_warning_of_slurm_reaches_srun_and_its_exit_code_counts():
    script("srun")
    program("srun", "trap 'sleep 0.2; exit 75' USR1; touch ready; while true; do sleep 0.05; done")
    job = subprocess.Popen(["bash", "job.sh"])
    while not Path("ready").exists():
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 75
    assert requeued() == "requeue 4711\n"


def test_the_script_asks_for_a_task_for_every_gpu_and_for_the_warning():
    lines = script("srun").splitlines()
    for flag in ("ntasks-per-node=8", "gpus-per-node=8", "signal=B:USR1@300", "requeue", "open-mode=append"):
        assert f"#SBATCH --{flag}" in lines


@pytest.mark.parametrize(("last", "code"), [(0, 0), (6, 1)])
def test_torchrun_is_started_again_while_the_manifest_says_75(last, code):
    script("torchrun")
    Path("runs/base").mkdir(parents=True)
    count = 'n=$(cat count 2>/dev/null || echo 0); echo $((n + 1)) > count; code=75; [ "$n" = 2 ] && code='
    program(
        "torchrun",
        f'{count}{last}; echo "  \\"exit\\": $code," > runs/base/manifest.json; [ "$code" = 0 ]',
    )
    assert subprocess.run(["bash", "job.sh"], timeout=30).returncode == code
    assert Path("count").read_text() == "3\n"


def test_the_page_names_all_settings_that_need_no_leave():
    told = PAGE.read_text().rpartition("make no other run:")[2]
    assert {word.strip("`.,\n ") for word in told.split()} == settings.FREE
