"""Figures of a step: useful TFLOP/s and its shares of what the GPU could do."""

import pytest
import torch

from beitctl.engine.measuring.meter import Meter, nominal

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """``card(name)``: a GPU of that name, which holds 3 GiB."""

    def put(name):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)

    return put


def test_operations_of_all_ranks_are_shared_among_them():
    assert Meter(CPU, 4).figures(8e12, 2.0) == {"tflops_per_gpu": 1.0}


def test_a_known_gpu_has_its_share_of_the_nominal_peak(card):
    card("NVIDIA H200")
    assert Meter(GPU, 1).figures(989e12, 2.0)["mfu"] == 0.5


@pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB", "Radeon"])
def test_a_gpu_of_another_name_has_no_share_instead_of_a_guess(card, name):
    card(name)
    assert set(Meter(GPU, 1).figures(1e12, 1.0)) == {"tflops_per_gpu", "memory_gib"}


def test_a_measured_ceiling_gives_a_share_of_its_own(card):
    card("NVIDIA H200")
    found = Meter(GPU, 2, ceiling=800.0).figures(800e12, 1.0)
    assert (found["mfu_of_measured"], found["mfu"]) == (0.5, pytest.approx(400 / 989))


def test_an_unknown_gpu_has_a_share_of_what_it_was_measured_to_reach(card):
    card("NVIDIA GB99")
    found = Meter(GPU, 1, ceiling=100.0).figures(25e12, 1.0)
    assert (found["mfu_of_measured"], "mfu" in found) == (0.25, False)


def test_memory_is_that_of_the_gpu_in_gib(card):
    card("NVIDIA L40S")
    assert Meter(GPU, 1).figures(1e12, 1.0)["memory_gib"] == 3.0


def test_a_processor_has_no_share_of_anything():
    assert set(Meter(CPU, 1, ceiling=0.5).figures(1e9, 1.0)) == {"tflops_per_gpu"}


def test_peaks_are_without_sparsity():
    assert (nominal("NVIDIA H100 80GB HBM3"), nominal("NVIDIA A100-SXM4-80GB")) == (989.0, 312.0)
