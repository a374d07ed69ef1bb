"""Fixtures for all tests."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import run_on_ranks


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests cache goes into a folder of its own, also in the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEITCTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """``on_ranks(function, world, *arguments)``: what a top-level function returns on each rank."""
    return functools.partial(run_on_ranks, tmp_path / "ranks")
