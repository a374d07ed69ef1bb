"""Threads that decode and crop ahead of whoever needs the pictures."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    function: Callable[[T], R], items: Iterable[T], threads: int, most: int
) -> Generator[R, None, None]:
    """Results of a function in order, up to ``most`` of them made by threads before they are asked for."""
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(threads, "ahead", torch.set_num_threads, (1,))  # in each of them alone
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
