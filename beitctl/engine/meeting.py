"""How processes find one another at the start, and who is missing or is not like the others."""

import contextlib
import json
import os
import platform
import socket
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from beitctl.errors import SetupError

PARTING = timedelta(seconds=5)
"""How long a rank waits at the end for others, which may have died."""
NAMED = 16
"""Most ranks that an error names."""


def versions() -> dict[str, str]:
    """What has to be the same on all ranks."""
    try:
        own = metadata.version("beitctl")
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {"beitctl": own, "torch": str(torch.__version__), "python": platform.python_version()}


def point(rank: int, world: int, timeout: timedelta) -> Any:
    """The store that all ranks meet at: torchrun's, or one that rank 0 opens at MASTER_ADDR:MASTER_PORT.

    Raises:
        SetupError: it cannot be opened or reached.
    """
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = next(iter(rendezvous("env://", rank, world, timeout=timeout)))[0]
            # torchrun's store outlives a restart, with the addresses of processes that are gone
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            return dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # rendezvous() would let rank 0 wait for the others without saying who they are
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, port, world, rank == 0, timeout, wait_for_workers=False, multi_tenant=True
        )
    except (RuntimeError, ValueError) as error:
        raise failed(rank, world, error) from error
    except KeyError as error:
        raise failed(rank, world, ValueError(f"{error} is not set")) from error


def failed(rank: int, world: int, error: Exception) -> SetupError:
    """The error for a rank that could not join."""
    where = f"{os.environ.get('MASTER_ADDR', 'unset')}:{os.environ.get('MASTER_PORT', 'unset')}"
    return SetupError(f"rank {rank} of {world} cannot join the group at {where}, rank 0's address: {error}")


def all_arrive(store: Any, rank: int, world: int, timeout: timedelta) -> None:
    """Wait for all ranks and compare what they are.

    Raises:
        SetupError: some did not arrive in time, or have other versions; names them.
    """
    keys = [f"beitctl/{other}" for other in range(world)]
    try:
        store.set(keys[rank], json.dumps({"host": socket.gethostname(), "versions": versions()}))
        _wait(store, keys, timeout)
        found = [json.loads(value) for value in store.multi_get(keys)]
    except (RuntimeError, ValueError) as error:
        raise failed(rank, world, error) from error
    problem = _difference(found)
    if problem:
        with contextlib.suppress(RuntimeError):  # rank 0 takes the store with it: all have to read it first
            store.set(f"beitctl/read/{rank}", "")
            if rank == 0:
                store.wait([f"beitctl/read/{other}" for other in range(world)], timedelta(seconds=10))
        raise SetupError(problem)


def part(store: Any, rank: int, world: int) -> None:
    """Wait until every rank is through its last collective: sockets that close earlier can break it.

    Rank 0 goes last, because the store may be its own. Ranks that are gone already are waited for a moment.
    """
    others = [f"beitctl/gone/{other}" for other in range(1, world)]
    with contextlib.suppress(RuntimeError):
        store.set(f"beitctl/through/{rank}", "")
        store.wait([f"beitctl/through/{other}" for other in range(world)], PARTING)
        if rank:
            store.set(f"beitctl/gone/{rank}", "")
        else:
            store.wait(others, PARTING)


def _wait(store: Any, keys: list[str], timeout: timedelta) -> None:
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
        if not absent:
            raise
        raise SetupError(
            f"{len(absent)} of {len(keys)} ranks did not arrive within {timeout.total_seconds():g} s: "
            f"{_some(list(map(str, absent)))}; look at what these processes say, or whether they were started"
        ) from error


def _difference(found: list[dict[str, Any]]) -> str:
    """Which ranks have other versions than most; empty if none."""
    kinds = [json.dumps(one["versions"], sort_keys=True) for one in found]
    usual = max(kinds, key=kinds.count)
    odd = [rank for rank, kind in enumerate(kinds) if kind != usual]
    if not odd:
        return ""
    most = json.loads(usual)
    shown = []
    for rank in odd:
        own = found[rank]["versions"]
        other = ", ".join(f"{name} {own.get(name)}" for name in most if own.get(name) != most[name])
        shown.append(f"rank {rank} on {found[rank]['host']} has {other}")
    usually = ", ".join(f"{name} {version}" for name, version in most.items())
    return f"versions differ: {_some(shown)}; the others have {usually}. Install the same everywhere"


def _some(parts: list[str]) -> str:
    more = f" and {len(parts) - NAMED} more" if len(parts) > NAMED else ""
    return ", ".join(parts[:NAMED]) + more
