"""Every error that beitctl raises on purpose, with the exit code that scripts see.

A message says where, what was found, what is allowed and what to do. It is printed without a traceback.
"""

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of the system that mean: no more space."""


class BeitctlError(Exception):
    """Base of all errors with an exit code; raised itself only for our own faults."""

    exit_code = 1


class UserError(BeitctlError):
    """Wrong usage: the command line, a path, a setting."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe that does not validate; holds every problem, one line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class PluginError(UserError):
    """A plugin that is absent, installed twice, broken, or of the wrong kind."""


class DataError(BeitctlError):
    """Data that is missing, unreadable or not what the run started with."""

    exit_code = 3


class ChangedError(DataError):
    """Data that were removed or changed while they were in use; no example can replace another then."""


class SetupError(BeitctlError):
    """The environment lacks something: an extra, a device, a newer version."""

    exit_code = 4


class CapacityError(BeitctlError):
    """It does not fit: memory or disk."""

    exit_code = 5


class DivergedError(BeitctlError):
    """Training produced numbers that are not finite."""

    exit_code = 6


class CheckFailed(BeitctlError):
    """A check that the user asked for did not hold."""

    exit_code = 7


class Stopped(BeitctlError):
    """Stopped early on request (SIGTERM, time limit); a checkpoint is written and the run can resume."""

    exit_code = 75


class Interrupted(Stopped):
    """Stopped by Ctrl-C; a checkpoint is written and the run can resume."""

    exit_code = 130
