"""What ranks do together: all of them succeed, or all raise the same error."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from beitctl.engine.dist import Ranks
from beitctl.errors import (
    DISK_FULL,
    BeitctlError,
    CapacityError,
    DataError,
    DivergedError,
    SetupError,
    UserError,
)

ERRORS: dict[str, type[BeitctlError]] = {
    kind.__name__: kind
    for kind in (UserError, DataError, SetupError, CapacityError, DivergedError, BeitctlError)
}

T = TypeVar("T")


@dataclass(frozen=True)
class Together:
    """Actions of all ranks on a folder of checkpoints. Every method is called by every rank."""

    ranks: Ranks
    folder: Path

    def everywhere(self, action: Callable[[], T]) -> list[T]:
        """What ``action`` returns on each rank, as JSON holds it.

        Raises:
            BeitctlError: the first that any rank met, the same on all ranks.
        """
        return everywhere(self.ranks, action, lambda error: _translated(error, self.folder))

    def on_main(self, action: Callable[[], T]) -> Any:
        """What ``action`` returns on rank 0, on every rank.

        Raises:
            BeitctlError: rank 0 met an error.
        """
        return self.everywhere(lambda: action() if self.ranks.main else None)[0]


def everywhere(
    ranks: Ranks, action: Callable[[], T], translated: Callable[[Exception], BeitctlError]
) -> list[T]:
    """What ``action`` returns on each rank, as JSON holds it; every rank calls it.

    Raises:
        BeitctlError: the first that any rank met, as ``translated`` says it, the same on all ranks.
    """
    outcome: dict[str, Any] = {}
    own: Exception | None = None
    try:
        outcome["value"] = action()
    except Exception as error:  # a rank that left the others waiting would hang them
        own, known = error, translated(error)
        kind = next(name for name, kind in ERRORS.items() if isinstance(known, kind))
        outcome |= {"error": kind, "text": str(known)}
    outcomes = ranks.gather_objects(outcome)
    for rank, other in enumerate(outcomes):
        if "error" in other:
            where = f" (rank {rank})" if ranks.world > 1 else ""
            raise ERRORS[other["error"]](other["text"] + where) from own
    return [other["value"] for other in outcomes]


def as_told(error: Exception) -> BeitctlError:
    """An error of ours as it is, any other as a fault of ours."""
    return error if isinstance(error, BeitctlError) else BeitctlError(f"unexpected error: {error!r}")


def _translated(error: Exception, folder: Path) -> BeitctlError:
    if isinstance(error, BeitctlError):
        return error
    if not isinstance(error, OSError):
        return BeitctlError(f"{folder}: unexpected error with a checkpoint: {error!r}")
    reason = error.strerror or str(error)
    if error.errno in DISK_FULL:
        return CapacityError(
            f"{folder}: no space left for a checkpoint ({reason}); make room, or use another --out"
        )
    return UserError(
        f"{error.filename or folder}: cannot be used for checkpoints ({reason}); make it readable and "
        "writable, or use another --out"
    )
