"""What a device reaches, measured and remembered."""

import json
import time

import pytest
import torch

from beitctl.engine.measuring import ceilings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def measured():
    begun = time.monotonic()
    return ceilings.measure(CPU) | {"seconds": time.monotonic() - begun}


def test_a_processor_multiplies_and_copies_at_some_speed(measured):
    assert 1e-4 < measured["gemm_tflops"] < 1e3
    assert 0.1 < measured["copy_gb_per_s"] < 1e5


def test_products_are_measured_in_the_type_that_auto_computes_in(monkeypatch):
    monkeypatch.setattr(ceilings, "compute_dtype", lambda precision, device: torch.float64)
    monkeypatch.setattr(ceilings, "CPU_SHAPES", ((8, 8, 8),))
    monkeypatch.setattr(ceilings, "CPU_COPY_BYTES", 1024)
    assert ceilings.measure(CPU)["dtype"] == "float64"


def test_the_best_shape_counts(monkeypatch):
    speeds = {(1, 1, 1): 2.0, (2, 2, 2): 5.0, (3, 3, 3): 3.0}
    monkeypatch.setattr(ceilings, "CPU_SHAPES", tuple(speeds))
    monkeypatch.setattr(ceilings, "gemm", lambda shape, dtype, device: speeds[shape])
    assert ceilings.measure(CPU)["gemm_tflops"] == 5.0


def test_the_median_of_the_repetitions_counts(monkeypatch):
    seconds = iter([9.0, 1.0, 2.0, *[2.0] * 17])
    monkeypatch.setattr(ceilings, "_cpu_seconds", lambda work: next(seconds))
    assert ceilings._seconds(lambda: None, CPU) == 2.0


def test_what_was_measured_is_remembered(tmp_path):
    assert ceilings.remembered(CPU, tmp_path) is None
    assert ceilings.remember(CPU, {"gemm_tflops": 0.25, "measured": "2026-01-02"}, tmp_path)
    assert ceilings.remembered(CPU, tmp_path) == 0.25


def test_further_figures_leave_those_that_are_known(tmp_path):
    ceilings.remember(CPU, {"gemm_tflops": 0.25}, tmp_path)
    ceilings.remember(CPU, {"pictures_per_core": 500.0}, tmp_path)
    found = ceilings.recalled(CPU, tmp_path)
    assert (found["gemm_tflops"], found["pictures_per_core"]) == (0.25, 500.0)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_another_device_torch_or_driver_is_measured_anew(tmp_path, monkeypatch, place):
    ceilings.remember(CPU, {"gemm_tflops": 0.25}, tmp_path)
    other = list(ceilings.identity(CPU))
    other[place] += " of another kind"
    monkeypatch.setattr(ceilings, "identity", lambda device: tuple(other))
    assert ceilings.remembered(CPU, tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[1]", json.dumps({"gemm_tflops": "fast"}), "\x00"])
def test_a_damaged_memory_is_none(tmp_path, content):
    ceilings.remember(CPU, {"gemm_tflops": 0.25}, tmp_path)
    (file,) = (tmp_path / "ceilings").iterdir()
    file.write_text(content)
    assert ceilings.remembered(CPU, tmp_path) is None


def test_a_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "ceilings").write_text("in the way")
    assert not ceilings.remember(CPU, {"gemm_tflops": 0.25}, tmp_path)


def test_the_cache_of_the_data_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path))
    ceilings.remember(CPU, {"gemm_tflops": 0.5})
    assert ceilings.remembered(CPU, tmp_path) == 0.5


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\n", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n", "580.95.05"),
        ("something else\n", ""),
    ],
)
def test_the_driver_is_read_from_where_it_says_its_version(tmp_path, text, version):
    (tmp_path / "version").write_text(text)
    assert ceilings.driver(tmp_path / "version") == version


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_multiplies_faster_than_it_could_copy():
    found = ceilings.measure(torch.device("cuda"))
    assert found["gemm_tflops"] > 1
    assert found["copy_gb_per_s"] > 10
