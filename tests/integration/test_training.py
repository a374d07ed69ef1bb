"""Training through the command line: any number of processes, any number of passes, any number of deaths."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow
EXACT = ["--set", "train.precision='fp32'", "--set", "train.log_every_steps=1"]
ENV = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1",
    "CI": "1",
}


def command(root, out, *arguments, module=("-m", "beitctl")):
    return [sys.executable, *module, "pretrain", "--recipe", "tiny", "--out", str(out), *EXACT, *arguments], {
        "env": ENV | {"BEITCTL_RUNS": str(root)},
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }


def run(root, out, *arguments, code=0):
    line, options = command(root, out, *arguments)
    done = subprocess.run(line, **options, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    return done


def losses(out):
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return {e["step"]: e["metrics"] for e in events if e["event"] == "step"}


def weights(out):
    return load_file(out / "weights" / "model.safetensors")


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if first[name].tobytes() != second[name].tobytes()] == []


def assert_close(first, second, tolerance=1e-5):
    one, two = losses(first), losses(second)
    assert one.keys() == two.keys()
    for step, metrics in one.items():
        for name in (n for n in metrics if n.endswith(("loss", "accuracy"))):
            assert two[step][name] == pytest.approx(metrics[name], abs=tolerance), (step, name)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A runs folder with the tokenizers and the token store of recipe tiny."""
    folder = tmp_path_factory.mktemp("runs")
    line = [sys.executable, "-m", "beitctl", "tokenize-images", "--recipe", "tiny"]
    subprocess.run(
        line, env=ENV | {"BEITCTL_RUNS": str(folder)}, check=True, capture_output=True, timeout=120
    )
    line[3:] = ["train-tokenizer", "--recipe", "tiny", "--only", "text"]
    subprocess.run(
        line, env=ENV | {"BEITCTL_RUNS": str(folder)}, check=True, capture_output=True, timeout=120
    )
    return folder


@pytest.fixture(scope="module")
def straight(root):
    """One uninterrupted run on one process."""
    run(root, root / "straight")
    return root / "straight"


def test_two_processes_learn_what_one_does(root, straight):
    run(root, root / "two", "--gpus", "2")
    assert_close(straight, root / "two")


def test_torchrun_learns_the_same(root, straight):
    line, options = command(
        root,
        root / "torchrun",
        module=("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "beitctl"),
    )
    done = subprocess.run(line, **options, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert_close(straight, root / "torchrun")


def test_accumulation_learns_what_the_big_batch_does(root, straight):
    run(root, root / "accumulated", "--set", "train.micro_samples=5")
    assert_close(straight, root / "accumulated")


def test_the_log_says_what_the_weights_are_and_where_the_traces_lie(root):
    out = root / "averaged"
    asked = ("train.steps=3", "train.optim.warmup_steps=1", "train.ema_decay=0.9", "train.profile=[1, 2]")
    run(root, out, *(word for setting in asked for word in ("--set", setting)))
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    notes = " ".join(event["message"] for event in events if event["event"] == "note")
    assert "the weights are the moving average of those of all steps (ema_decay = 0.9)" in notes
    assert f"profile of steps 1 to 2: {out / 'profile'}" in notes


def test_the_same_run_twice_is_equal_to_the_last_bit(root, straight):
    run(root, root / "again")
    assert_same(weights(straight), weights(root / "again"))


def test_worker_processes_change_nothing(root, straight):
    run(root, root / "workers", "--set", "train.workers=2")
    assert_same(weights(straight), weights(root / "workers"))


LONG = ["--set", "train.steps=60", "--set", "train.save_every_steps=2"]


def test_ten_kills_and_as_many_resumes_equal_the_uninterrupted_run(root):
    run(root, root / "long", *LONG)
    out, draw = root / "killed", random.Random(0)
    kills = 0
    while kills < 10:
        line, options = command(root, out, *LONG)
        process = subprocess.Popen(line, **options)
        target = _last(out) + draw.randint(1, 4)
        while _last(out) < target and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.05)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
        assert kills == 10 or process.returncode == -signal.SIGKILL, "the run ended before it was killed"
    run(root, out, *LONG)
    assert_same(weights(root / "long"), weights(out))


def _last(out: Path) -> int:
    """Newest step in the log, torn lines left out."""
    try:
        lines = (out / "events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    found = [0]
    for text in lines:
        if '"event": "step"' in text or '"event":"step"' in text:
            try:
                found.append(json.loads(text)["step"])
            except ValueError:
                continue
    return found[-1]


def stopped(root, out, number=signal.SIGTERM, code=75):
    """Start a long run and stop it politely after some steps."""
    line, options = command(root, out, *LONG)
    process = subprocess.Popen(line, **options)
    while _last(out) < 6 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == code, text
    return text


def test_sigterm_saves_and_leaves_with_75(root):
    text = stopped(root, root / "term")
    assert "stopped at step" in text
    assert json.loads((root / "term" / "manifest.json").read_text())["status"] == "stopped"
    last = max(int(p.name[5:]) for p in (root / "term" / "checkpoints").glob("step-*"))
    assert last >= 6


def test_ctrl_c_saves_and_leaves_with_130(root):
    assert "stopped at step" in stopped(root, root / "int", signal.SIGINT, 130)


def test_a_damaged_checkpoint_is_found_and_the_one_before_it_used(root):
    out = root / "flipped"
    stopped(root, out)
    run(root, root / "long2", *LONG)
    newest = max((out / "checkpoints").glob("step-*"))
    shard = next(newest.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run(root, out, *LONG)
    assert newest.with_name(f"{newest.name}.corrupt").is_dir()
    assert_same(weights(root / "long2"), weights(out))


def test_a_folder_of_another_recipe_is_refused_and_left_alone(root, straight):
    copy = root / "copy"
    shutil.copytree(straight, copy)
    before = sorted((p, p.stat().st_mtime) for p in copy.rglob("*") if p.is_file())
    done = run(root, copy, "--set", "train.optim.peak_lr=0.5", code=2)
    assert "peak_lr" in done.stderr
    assert sorted((p, p.stat().st_mtime) for p in copy.rglob("*") if p.is_file()) == before
