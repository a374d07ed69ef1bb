"""Processes: who they are, and the few collectives that run on the host."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from beitctl.engine import meeting
from beitctl.errors import SetupError, UserError

START_TIMEOUT = timedelta(minutes=5)
"""How long processes wait for one another to begin."""
TIMEOUT = timedelta(hours=2)
"""How long a collective waits: rank 0 may list millions of files meanwhile."""
PORTS = range(20_000, 50_000)


@dataclass(frozen=True)
class Ranks:
    """This process among all. Collectives must be called by every rank in the same order."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    group: Any = None
    """Process group of the collectives; None: the one of all ranks."""
    local_world: int = 0
    """Ranks on this machine; ``world`` if none are given."""
    store: Any = None
    """Where the processes met; None where there is but one."""

    def __post_init__(self) -> None:
        if not self.local_world:
            object.__setattr__(self, "local_world", self.world)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in fp64 on the host."""
        if self.world == 1:
            return list(map(float, values))
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        found: list[float] = tensor.tolist()
        return found

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank; anything that JSON holds, because nothing is ever unpickled."""
        return self.gather_objects(value if self.main else None)[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; anything that JSON holds."""
        if self.world == 1:
            return [json.loads(json.dumps(value))]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self.group)
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.group)
        return [
            json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)
        ]

    def background(self) -> "Ranks":
        """The same ranks over a gloo group of their own, for a thread beside the training; all call it."""
        if not dist.is_initialized():
            return self
        return dataclasses.replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def mesh(self, shard_ranks: int = 0) -> DeviceMesh:
        """Ranks by who holds what: groups of ``shard_ranks`` share one copy of the weights.

        Args:
            shard_ranks: ranks in such a group; 0: those of this machine.

        Returns:
            One axis, "shard", if all ranks are one group; else two, "replicate" and "shard".

        Raises:
            UserError: the ranks cannot be divided into such groups.
        """
        shard = shard_ranks or self.local_world
        if shard > self.world or self.world % shard:
            allowed = [str(size) for size in range(1, self.world + 1) if self.world % size == 0]
            raise UserError(
                f"shard_ranks = {shard_ranks}: {self.world} ranks cannot be divided into "
                f"groups of {shard}; allowed are {', '.join(allowed)}"
            )
        return _mesh(self.device.type, self.world, shard)

    def stop(self) -> None:
        """Leave the process group, if this process is in one, with all others."""
        if self.store is not None:
            meeting.part(self.store, self.rank, self.world)
        if dist.is_initialized():
            dist.destroy_process_group()
        start.cache_clear()
        _mesh.cache_clear()


@functools.cache
def _mesh(device: str, world: int, shard: int) -> DeviceMesh:
    if shard == world:
        return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world // shard, shard), mesh_dim_names=("replicate", "shard"))


@functools.cache
def start() -> Ranks:
    """Join the process group that torchrun, ``--gpus`` or Slurm describe; alone without them.

    Raises:
        SetupError: the environment names a group but leaves out, or garbles, a part of it; ranks did not
            arrive in time, or have other versions of what has to be the same everywhere.
    """
    place = place_from(os.environ)
    cuda = torch.cuda.is_available()
    if cuda:
        if place["LOCAL_RANK"] >= torch.cuda.device_count():
            raise SetupError(
                f"process {place['LOCAL_RANK']} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}; start fewer processes or check CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(place["LOCAL_RANK"])
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    rank, world = place["RANK"], place["WORLD_SIZE"]
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return Ranks(0, 1, 0, device)
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's own name may not resolve
    store = meeting.point(rank, world, START_TIMEOUT)
    meeting.all_arrive(store, rank, world, START_TIMEOUT)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise meeting.failed(rank, world, error) from error
    local = local_world(os.environ, world)
    return Ranks(rank, world, place["LOCAL_RANK"], device, local_world=local, store=store)


def leave() -> None:
    """Leave the process group, if this process has joined one with ``start``."""
    if start.cache_info().currsize:
        start().stop()


def place_from(env: Mapping[str, str]) -> dict[str, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK from the variables of torchrun or Slurm; sets MASTER_* for Slurm.

    Raises:
        SetupError: a variable is missing or no number.
    """
    if "WORLD_SIZE" in env:
        return _numbers(env, {name: name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")})
    if "SLURM_PROCID" in env and env.get("SLURM_NTASKS", "1") != "1":
        names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        place = _numbers(env, names)
        job = _numbers(env, {"job": "SLURM_JOB_ID"})["job"]
        os.environ.setdefault(
            "MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "")))
        )
        os.environ.setdefault("MASTER_PORT", str(PORTS[job % len(PORTS)]))
        return place
    return {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


def local_world(env: Mapping[str, str], world: int) -> int:
    """Ranks on this machine, from the variables of torchrun or Slurm; all where they do not say."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE"):
        given = re.match(r"\d+", env.get(name, ""))  # Slurm: 8(x64)
        if given and int(given[0]):
            return min(int(given[0]), world)
    return world


def _numbers(env: Mapping[str, str], names: Mapping[str, str]) -> dict[str, int]:
    bad = [f"{name}={env.get(name, 'unset')}" for name in names.values() if not env.get(name, "").isdigit()]
    if bad:
        raise SetupError(
            f"the environment describes several processes, but {', '.join(bad)}; start them with torchrun, "
            "--gpus N or srun, which set these variables to numbers"
        )
    return {key: int(env[name]) for key, name in names.items()}


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: ``gpu[03-05,7],cpu1`` is ``gpu03``.

    Raises:
        SetupError: the list is empty.
    """
    match = re.match(r"([^\[,]+)(?:\[([^\]\-,]+))?", nodes)
    if not match:
        raise SetupError("SLURM_NODELIST is empty: rank 0's host is unknown; set MASTER_ADDR")
    return match.group(1) + (match.group(2) or "")
