"""Sources that are opened once, though several parts of a run ask for them: listing files takes time."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from beitctl.api import Examples, Source

_kept: ContextVar[list[tuple[Source, Examples]] | None] = ContextVar("opened sources", default=None)


@contextmanager
def once() -> Iterator[None]:
    """Inside this context equal sources are opened once; what changes meanwhile is not seen."""
    token = _kept.set([])
    try:
        yield
    finally:
        _kept.reset(token)


def opened(source: Source) -> Examples:
    """The examples of a source.

    Raises:
        DataError: it cannot be used.
    """
    kept = _kept.get()
    if kept is None:
        return source.open()
    for known, examples in kept:
        if known is source or (type(known) is type(source) and known == source):
            return examples
    kept.append((source, source.open()))
    return kept[-1][1]
