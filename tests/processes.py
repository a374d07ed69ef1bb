"""Running one function on several processes that form a process group."""

import importlib
import json
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

SECONDS = 60
PRELOADED = ["torch", "torch.distributed.checkpoint", "beitctl.engine.saving.checkpoint"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_on_ranks(folder: Path, function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """What a top-level function of a test file returns on each rank; notes are kept in ``folder``.

    Every rank is a process with torchrun's variables. Arguments and results go through JSON, paths as text.
    The first rank that fails, or ``SECONDS`` without an end, fails the test with the ranks' stderr.
    """
    context = multiprocessing.get_context("forkserver")  # torch is imported once, not by every rank
    context.set_forkserver_preload(PRELOADED)
    place = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    call = (function.__module__, function.__name__, json.dumps(arguments, default=str))
    folder.mkdir(parents=True, exist_ok=True)
    processes: list[BaseProcess] = []
    for rank in range(world):
        env = {key: str(value) for key, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
        processes.append(context.Process(target=_rank, args=(str(folder), rank, env, call)))
        processes[-1].start()
    try:
        _wait(processes, folder)
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world)]


def _rank(folder: str, rank: int, env: dict[str, str], call: tuple[str, str, str]) -> None:
    log = os.open(Path(folder) / f"stderr-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    os.environ |= env
    module, name, arguments = call
    value = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    (Path(folder) / f"result-{rank}.json").write_text(json.dumps(value))


def _wait(processes: list[BaseProcess], folder: Path) -> None:
    limit = time.monotonic() + SECONDS
    while True:
        codes = [process.exitcode for process in processes]
        if all(code == 0 for code in codes):
            return
        failed = any(code not in (None, 0) for code in codes)
        if failed or time.monotonic() > limit:
            what = f"exit codes {codes}" if failed else f"no end within {SECONDS} s"
            logs = sorted(folder.glob("stderr-*.txt"))
            pytest.fail(
                "\n".join([what, *(f"{log.name}: {log.read_text()[-3000:]}" for log in logs)]), pytrace=False
            )
        time.sleep(0.02)


def in_a_child(action: Callable[[], Any]) -> int:
    """Run ``action`` in a forked process; gives its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Exit code of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
