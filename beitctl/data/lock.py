"""One writer for a folder: a lock that ends with its process, however that ends."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from beitctl.errors import SetupError, UserError

NAME = "writer.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; of a job on several ranks, rank 0 holds it for all.

    The lock is the kernel's (flock), so that kill -9 leaves none behind. On NFS it holds across machines
    (Linux 2.6.12 and later); Lustre needs the mount option ``flock``.

    Raises:
        UserError: another process holds it; says which.
        SetupError: the file system knows no locks.
    """
    path = folder / NAME
    file = _taken(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _taken(path: Path) -> BinaryIO:
    """The lock file, locked and with a note of who holds it."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except BlockingIOError:
            holder = _holder(file)
            file.close()
            raise UserError(
                f"{path.parent}: {holder} writes here; wait for it, stop it, or choose another --out"
            ) from None
        except FileNotFoundError:
            pass  # its last holder removed it in this moment
        except OSError as error:
            file.close()
            raise SetupError(
                f"{path}: this file system keeps no locks ({error.strerror}), which keep a second writer "
                "away; choose a folder on another one with --out, or mount it with locks"
            ) from error
        file.close()
    file.truncate(0)
    note = {
        "pid": os.getpid(),
        "host": platform.node(),
        "started": datetime.now(UTC).isoformat("T", "seconds"),
    }
    file.write(json.dumps(note).encode())
    file.flush()
    return file


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    try:
        note = json.loads(file.read())
        return f"process {note['pid']} on {note['host']} (since {note['started']})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
