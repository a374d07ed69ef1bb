"""Work on many examples by several threads, with results in order and little in memory."""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

CHUNK = 16
"""Examples that a thread takes at a time."""

Result = TypeVar("Result")


def in_order(
    function: Callable[[int], Result], indices: Sequence[int], workers: int
) -> Generator[Result, None, None]:
    """Results of a function for each index, in their order, computed by threads a little ahead.

    Close it (``contextlib.closing``) when leaving early: the threads then stop after what they are at.
    """
    stop = threading.Event()
    waiting: deque[Future[list[Result]]] = deque()

    def chunk(some: Sequence[int]) -> list[Result]:
        return [function(int(index)) for index in some if not stop.is_set()]

    # Pillow's decoders warn, and each thread would change the filters of all of them in its own order
    with warnings.catch_warnings(action="ignore"):
        pool = ThreadPoolExecutor(workers, thread_name_prefix="beitctl-data")
        try:
            for first in range(0, len(indices), CHUNK):
                waiting.append(pool.submit(chunk, indices[first : first + CHUNK]))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
