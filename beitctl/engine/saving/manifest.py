"""``manifest.json``: what a checkpoint consists of, sealed, so that no change goes unnoticed."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from beitctl.errors import DataError, UserError

FORMAT = 1
MANIFEST = "manifest.json"


def write(folder: Path, body: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, so that it lasts through a power cut."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(_sealed({"format": FORMAT, **body}))
        stream.flush()
        os.fsync(stream.fileno())
    sync(folder)


def read(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of the checkpoint of a step.

    Raises:
        DataError: it is missing, was changed, or is that of another step.
        UserError: another version of beitctl wrote it.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        body = json.loads(text)
        seal = body.pop("sha256")
        whole = _sealed(body) == text and body["step"] == step
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{folder}: {MANIFEST} cannot be read ({error!r})") from error
    if not whole:
        raise DataError(f"{folder}: {MANIFEST} was changed: it is not that of step {step} with sha256 {seal}")
    if body["format"] != FORMAT:
        raise UserError(
            f"{folder} has format {body['format']}, this beitctl reads {FORMAT}; install the one that "
            "wrote it"
        )
    return dict(body)


def verified(folder: Path, step: int) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is as the manifest says.

    Raises:
        DataError: a file is not, or the manifest is not that of the step.
        UserError: another version of beitctl wrote it.
    """
    body = read(folder, step)
    with ThreadPoolExecutor(8) as pool:
        for problem in pool.map(lambda item: _difference(folder / item[0], item[1]), body["files"].items()):
            if problem:
                raise DataError(problem)
    return body


def entry(path: Path) -> dict[str, Any]:
    """Size in bytes and hash of a file, as a manifest lists them."""
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def sync(folder: Path) -> None:
    """Make names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _difference(path: Path, expected: dict[str, Any]) -> str:
    """How a file differs from its entry in the manifest; empty if it does not."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path} has {size} bytes instead of {expected['bytes']}"
        whole = entry(path) == expected
        return "" if whole else f"{path} was changed: its sha256 is not that of the manifest"
    except PermissionError:
        raise
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def _sealed(body: Mapping[str, Any]) -> str:
    """A manifest as text, with the hash of all the rest in it."""
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": seal}, sort_keys=True, indent=1)
