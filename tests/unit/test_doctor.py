"""What ``beitctl doctor`` finds on machines of several kinds."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from run_stubs import beitctl

from beitctl import doctor, recipe
from beitctl.engine.measuring import ceilings, selfcheck
from beitctl.engine.measuring.selfcheck import Check
from beitctl.examining import devices, numerics, speeds
from beitctl.examining.finding import Finding, guarded
from beitctl.examining.fitting import RECIPES, fitting
from beitctl.planning.memory import per_gpu
from beitctl.planning.work import work_of

CPU, GIB = torch.device("cpu"), 2**30


@pytest.fixture
def pretended(monkeypatch):
    """``pretended(name, free)``: a GPU of 80 GiB that says its name and does nothing else."""

    def put(name="NVIDIA H100 80GB HBM3", free=79):
        card = SimpleNamespace(name=name, total_memory=80 * GIB, major=9, uuid="abc")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free * GIB, 80 * GIB))
        monkeypatch.setattr(devices.shutil, "which", lambda name: None)

    return put


def named(findings):
    return {finding.name: finding for finding in findings}


# --- devices ---


def test_a_known_gpu_is_told_with_its_peak(pretended):
    pretended()
    gpu = devices._gpu(0)
    assert gpu.state == "ok"
    assert gpu.value == "NVIDIA H100 80GB HBM3, 80 GiB, bf16, 989 TFLOP/s nominal, 79 GiB free"


def test_the_peak_of_an_unknown_gpu_is_not_guessed(pretended):
    pretended("NVIDIA GB99")
    assert "nominal peak not known: runs report no mfu" in devices._gpu(0).value


def test_a_gpu_that_somebody_else_uses_is_noted(pretended):
    pretended(free=30)
    gpu = devices._gpu(0)
    assert (gpu.state, "30 GiB free" in gpu.value, "nvidia-smi" in gpu.fix) == ("note", True, True)


def test_the_processes_on_a_gpu_are_those_that_nvidia_smi_names(pretended, monkeypatch, tmp_path):
    pretended(free=30)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 41\necho 42\n")
    program.chmod(0o755)
    monkeypatch.setattr(devices.shutil, "which", lambda name: str(program))
    assert devices._gpu(0).value.endswith("used by processes 41, 42")


def test_a_broken_nvidia_smi_is_nothing(pretended, monkeypatch, tmp_path):
    pretended()
    monkeypatch.setattr(devices.shutil, "which", lambda name: str(tmp_path / "absent"))
    assert devices._gpu(0).value.endswith("GiB free")


def test_a_compiler_that_is_not_there_is_noted(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = devices.compiler()
    assert (found.state, found.value) == ("note", "no no-such-compiler, which torch.compile needs")


# --- numerics ---


def test_this_processor_computes_right():
    found = named(numerics.checks(CPU))
    assert {name: finding.state for name, finding in found.items()} == {
        "attention padded": "ok",
        "FSDP": "ok",
    }


def test_wrong_attention_is_a_failure_with_its_numbers(monkeypatch):
    wrong = Check("mixed lengths", {"out": 0.5, "dq": float("nan")}, "not finite: dq")
    monkeypatch.setattr(selfcheck, "attends", lambda *arguments: [wrong])
    found = named(numerics.checks(CPU))["attention padded"]
    assert found.state == "failed"
    assert "not finite: dq (out 5.0e-01, dq nan)" in found.value


def test_a_wrong_backend_that_nobody_uses_unasked_is_a_note(monkeypatch):
    wrong = Check("mixed lengths", {"out": 0.5}, "out above 1e-02")
    monkeypatch.setattr(selfcheck, "attends", lambda *arguments: [wrong])
    monkeypatch.setattr(numerics, "available", lambda *arguments: "")
    found = named(numerics.checks(CPU))
    assert [found[f"attention {name}"].state for name in ("varlen-flash", "varlen-cudnn")] == [
        "failed",
        "note",
    ]
    assert found["attention varlen-flash"].fix.startswith('set train.attention_backend = "padded"')


def test_a_check_that_raises_is_a_failure(monkeypatch):
    def raising(device):
        raise RuntimeError("NCCL error\nwith a long story")

    monkeypatch.setattr(numerics, "BACKENDS", ())
    monkeypatch.setattr(numerics.sharding_check, "shards", raising)
    found = named(numerics.checks(CPU))["FSDP"]
    assert (found.state, found.value) == ("failed", "RuntimeError: NCCL error")


def test_a_compiler_that_fails_matters_on_gpus_alone(monkeypatch):
    def raising(function, fullgraph):
        raise RuntimeError("no gcc")

    monkeypatch.setattr(torch, "compile", raising)
    (found,) = numerics.compiled(CPU)
    assert (found.state, found.value) == ("note", "fails: RuntimeError: no gcc")


def test_compiled_code_with_other_numbers_is_a_failure(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: lambda x: function(x) + 1)
    (found,) = numerics.compiled(CPU)
    assert (found.state, found.value) == ("failed", "compiled code gives other numbers")


# --- speeds ---


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path))
    known = {"gemm_tflops": 0.25, "copy_gb_per_s": 8.0, "dtype": "bfloat16", "measured": "2026-01-02"}
    monkeypatch.setattr(ceilings, "measure", lambda device: known)
    monkeypatch.setattr(speeds, "decoded_per_second", lambda: 512.0)


def test_what_was_never_measured_says_how_to(quick):
    found = list(speeds.speeds(CPU, anew=False))
    assert [(f.name, f.state, f.fix) for f in found] == [
        (name, "note", "beitctl doctor --measure") for name in ("matrix products", "copies", "decoding")
    ]


def test_what_was_measured_is_told_the_next_time_with_its_day(quick):
    list(speeds.speeds(CPU, anew=True))
    found = named(speeds.speeds(CPU, anew=False))
    assert found["matrix products"].value.startswith("0.25 TFLOP/s in bfloat16, measured 2026-01-02")
    assert found["decoding"].value.startswith("512 pictures/s and core")
    assert ceilings.remembered(CPU) == 0.25


def test_a_cache_that_cannot_be_written_is_noted(quick, tmp_path):
    (tmp_path / "ceilings").write_text("in the way")
    assert named(speeds.speeds(CPU, anew=True))["cache"].state == "note"


def test_pictures_are_decoded_at_some_speed(monkeypatch):
    monkeypatch.setattr(speeds, "SECONDS", 0.05)
    assert 10 < speeds.decoded_per_second() < 100_000


# --- what fits ---


def needs(name):
    """Bytes of memory on one GPU and the recipe's work."""
    found = recipe.load(name, stage="pretrain")
    work = work_of(found, found.tables["pretrain"], 24)
    return per_gpu(work, 1, work.train.micro_samples).total(), work


def test_a_recipe_fits_where_its_plan_does():
    largest = max(needs(name)[0] for name in RECIPES)
    assert [finding.state for finding in fitting(1, largest, 2**60)] == ["ok"] * 3


def test_a_recipe_that_does_not_fit_comes_with_the_setting_that_makes_it():
    memory, work = needs("beit3-base")
    base = next(iter(fitting(1, memory - GIB, 2**60)))
    assert base.state == "note"
    setting = re.search(r"--set pretrain\.train\.micro_samples=(\d+)", base.fix)
    assert per_gpu(work, 1, int(setting[1])).total() <= memory - GIB


def test_a_disk_that_is_too_small_for_the_checkpoints_is_noted():
    base = next(iter(fitting(1, 2**60, GIB)))
    assert (base.state, "1 GiB are free" in base.value) == ("note", True)


def test_the_largest_recipe_that_fits_is_what_is_next():
    found = [
        Finding("recipe beit3-base", "ok", "fits"),
        Finding("recipe beit3-large", "ok", "fits"),
        Finding("recipe beit3-giant", "note", "does not fit"),
    ]
    assert "beitctl plan --recipe beit3-large" in doctor.advice(found)


# --- all of it ---


def test_a_gpu_on_which_everything_fails_is_findings_and_no_traceback(pretended):
    pretended()
    found = named(doctor.examine())
    assert {found[name].state for name in ("attention padded", "FSDP", "torch.compile")} == {"failed"}
    assert found["recipe beit3-base"].state == "ok"


def test_failed_checks_end_with_4(capsys, monkeypatch):
    failed = Finding("attention padded", "failed", "wrong in bfloat16", "do not train on this machine")
    monkeypatch.setattr(numerics, "checks", lambda device: [failed])
    code, out, err = beitctl(capsys, "doctor", "--json")
    assert (code, named_rows(out)["attention padded"]["state"]) == (4, "failed")
    assert "not ready: attention padded: do not train on this machine" in err


def named_rows(out):
    return {row["name"]: row for row in json.loads(out)}


def test_measure_reaches_the_checks(capsys, monkeypatch, quick):
    monkeypatch.setattr(numerics, "checks", lambda device: [])
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    code, out, _ = beitctl(capsys, "doctor", "--json", "--measure")
    rows = named_rows(out)
    assert (code, rows["torch.compile"]["state"]) == (0, "ok")
    assert rows["copies"]["value"].startswith("8 GB/s")


def test_a_torch_that_is_too_old_for_the_engine_is_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "beitctl.examining.numerics", None)
    found = named(doctor.examine())["checks"]
    assert (found.state, found.fix) == ("failed", 'pip install --upgrade "torch>=2.11"')


def test_no_checks_are_made_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = named(doctor.examine())
    assert (found["torch"].state, "checks" in found) == ("missing", False)


def test_what_a_check_finds_before_it_raises_is_kept():
    def look():
        yield Finding("first", "ok", "fine")
        raise OSError("no device")

    found = list(guarded("both", look, "look at it"))
    assert [(f.name, f.state) for f in found] == [("first", "ok"), ("both", "note")]
