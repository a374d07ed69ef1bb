"""Work on many examples by several threads, with results in order and little in memory."""

import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TypeVar

from beitctl.data.threads import ahead

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

    def chunk(some: Sequence[int]) -> list[Result]:
        return [function(int(index)) for index in some if not stop.is_set()]

    chunks = (indices[first : first + CHUNK] for first in range(0, len(indices), CHUNK))
    found = ahead(chunk, chunks, workers, 2 * workers)
    # Pillow's decoders warn, and each thread would change the filters of all of them in its own order
    with warnings.catch_warnings(action="ignore"), closing(found):
        try:
            for results in found:
                yield from results
        finally:
            stop.set()
