"""Classes and words of examples, read without their pictures where the source can."""

from collections.abc import Iterator

from beitctl.api import Example, Examples
from beitctl.errors import ChangedError, DataError


def label(examples: Examples, index: int) -> str | None:
    """Class of an example.

    Raises:
        DataError: it cannot be used.
    """
    found = getattr(examples, "label", None)
    return found(index) if callable(found) else examples[index].label


def labels(examples: Examples) -> Iterator[str | None]:
    """Class of every example in order; None of one that has none or cannot be used.

    Raises:
        ChangedError: the data are not any more what was opened.
    """
    for index in range(len(examples)):
        try:
            yield label(examples, index)
        except ChangedError:
            raise
        except DataError:
            yield None


def classes(examples: Examples) -> tuple[str, ...]:
    """Names of the classes that there are, sorted."""
    return tuple(sorted({name for name in labels(examples) if name}))


def words(examples: Examples, index: int) -> tuple[str, ...]:
    """Captions of an example, then its text if it has one.

    Raises:
        DataError: it cannot be used.
    """
    found = getattr(examples, "words", None)
    return tuple(found(index)) if callable(found) else words_of(examples[index])


def words_of(example: Example) -> tuple[str, ...]:
    """Captions of an example, then its text if it has one."""
    return (*example.captions, *([example.text] if example.text else []))
