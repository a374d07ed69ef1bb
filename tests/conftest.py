"""Fixtures for all tests."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import run_on_ranks


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """``on_ranks(function, world, *arguments)``: what a top-level function returns on each rank."""
    return functools.partial(run_on_ranks, tmp_path / "ranks")
