"""One line of the check of a machine."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the check."""

    name: str
    state: Literal["ok", "note", "missing", "failed"]
    """``missing`` is something that beitctl cannot work without; ``failed`` is a check whose numbers are
    wrong, so that a training would be."""
    value: str
    fix: str = ""

    @property
    def blocking(self) -> bool:
        """Whether nothing should be run before it is mended."""
        return self.state in ("missing", "failed")


def guarded(
    name: str, look: Callable[[], Iterable[Finding]], fix: str, state: Literal["note", "failed"] = "note"
) -> Iterator[Finding]:
    """The findings of a check; whatever it raises is a finding as well."""
    try:
        yield from look()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield Finding(name, state, text, fix)
