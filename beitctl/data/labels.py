"""Classes and words of examples, read without their pictures where the source can."""

from collections.abc import Iterator

from beitctl.api import Examples
from beitctl.errors import ChangedError, DataError


def labels(examples: Examples) -> Iterator[str | None]:
    """Class of every example in order; None of one that has none or cannot be used.

    Raises:
        ChangedError: the data are not any more what was opened.
    """
    found = getattr(examples, "label", None)
    for index in range(len(examples)):
        try:
            yield found(index) if callable(found) else examples[index].label
        except ChangedError:
            raise
        except DataError:
            yield None


def classes(examples: Examples) -> tuple[str, ...]:
    """Names of the classes that there are, sorted."""
    return tuple(sorted({label for label in labels(examples) if label}))


def words(examples: Examples, index: int) -> tuple[str, ...]:
    """Captions of an example, and its text if there is one.

    Raises:
        DataError: it cannot be used.
    """
    found = getattr(examples, "words", None)
    if callable(found):
        return tuple(found(index))
    example = examples[index]
    return (*example.captions, *([example.text] if example.text else []))
