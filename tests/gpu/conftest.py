"""Tests that need a CUDA device; elsewhere they are skipped."""

import os

import pytest
import torch

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read once, when CUDA multiplies for the first time


@pytest.fixture
def gpu():
    """The GPU of the tests."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())
