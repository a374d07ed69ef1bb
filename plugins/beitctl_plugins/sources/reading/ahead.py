"""Work on many files by several processes, which leave what they find in the cache."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from beitctl.errors import DataError
from beitctl.report.bars import Bar

MOST_PROCESSES = 4


def each(task: Callable[[Any], Any], items: Sequence[Any], title: str) -> None:
    """Do a task for every item, several at a time and with a bar; it puts its results into the cache.

    Whatever fails is left to the caller, who does again what is not in the cache: errors are his to tell.
    """
    processes = min(MOST_PROCESSES, os.cpu_count() or 1, len(items))
    if processes < 1:
        return
    quietly = functools.partial(_quietly, task)
    with Bar(title, len(items)) as bar:
        if processes == 1 or multiprocessing.current_process().daemon:
            for item in items:
                quietly(item)
                bar.advance()
            return
        pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("fork"), initializer=_worker, initargs=(os.getpid(),)
        )
        try:
            for done in as_completed([pool.submit(quietly, item) for item in items]):
                done.result()
                bar.advance()
        except BrokenProcessPool:
            pass  # stopped from outside or out of memory: the rest is done by the caller, one after the other
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _quietly(task: Callable[[Any], Any], item: Any) -> None:
    with contextlib.suppress(DataError):
        task(item)


def _worker(parent: int) -> None:
    """Let a worker process end with its parent, and by Ctrl-C without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
