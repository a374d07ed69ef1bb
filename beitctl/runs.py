"""Run folders: where they are, what they hold, who works in them, and whether they still apply.

``config_hash`` covers what a run was asked to do: stage, settings (but those that change no result, see
``beitctl.settings``), data, and the fingerprints of its inputs.
``code_hash`` covers the sources that did it; ``fingerprint`` covers both.
"""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import tomlkit
from pydantic import BaseModel

from beitctl import settings
from beitctl.errors import UserError
from beitctl.recipe import StageTable

MANIFEST = "manifest.json"
LOCK = "lock"
SLURM = "slurm"
"""Folder of the logs of Slurm, in a run folder or beside them."""
VERSIONED = ("beitctl", "torch", "timm", "datasets")


@dataclass(frozen=True)
class Run:
    """A run folder and its manifest as it was when read."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def ok(self) -> bool:
        """Whether it finished."""
        return bool(self.manifest.get("status") == "ok")

    @property
    def metrics(self) -> Any:
        """What the stage returned."""
        return self.manifest.get("metrics", {})


@dataclass(frozen=True)
class Identity:
    """What a table of a recipe amounts to, given its inputs."""

    config: str
    code: str
    data: str
    """Fingerprint of the data; empty for a stage that reads none."""

    @property
    def fingerprint(self) -> str:
        """Hash of settings, data, inputs and code."""
        return digest(self.config, self.code)


def root() -> Path:
    """Folder of all runs: ``$BEITCTL_RUNS``, else ``runs`` in the current folder."""
    return Path(os.environ.get("BEITCTL_RUNS") or "runs").expanduser()


def digest(*parts: str) -> str:
    """32 hexadecimal digits of blake2b over some texts."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def identify(table: StageTable, parents: Mapping[str, Run]) -> Identity:
    """Hashes of a table whose references point to ``parents`` (by key).

    Raises:
        DataError: the data of the table are missing or unreadable.
    """
    plugin: Any = table.plugin
    lasting = json.dumps(settings.lasting(plugin), sort_keys=True)
    inputs = json.dumps({key: run.manifest["fingerprint"] for key, run in parents.items()}, sort_keys=True)
    data = str(plugin.inputs_fingerprint()) if hasattr(plugin, "inputs_fingerprint") else ""
    return Identity(digest(table.stage, lasting, inputs, data), code_hash(plugin), data)


def code_hash(plugin: Any) -> str:
    """Hash of the sources of beitctl and of every package that a stage and its plugins come from."""
    packages = {"beitctl", *_packages(plugin)}
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(packages):
        for label, path in _sources(name):
            found.update(f"{name}/{label}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


def _packages(value: Any) -> Iterator[str]:
    if isinstance(value, BaseModel):
        yield type(value).__module__.partition(".")[0]
        for name in type(value).model_fields:
            yield from _packages(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _packages(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _packages(item)


def _sources(package: str) -> Iterator[tuple[str, Path]]:
    module = sys.modules[package]
    folders = [Path(entry) for entry in getattr(module, "__path__", [])]
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(folder).as_posix(), path
    if not folders and module.__file__:
        yield "", Path(module.__file__)


def read(folder: Path) -> Run | None:
    """The run in a folder; None where there is none, or its manifest cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    usable = isinstance(manifest, dict) and {"key", "config_hash", "fingerprint"} <= manifest.keys()
    return Run(folder, manifest) if usable else None


def find(folder: Path, key: str) -> list[Run]:
    """Runs of a table directly below a folder, newest first."""
    if not folder.is_dir():
        return []
    found = [run for run in map(read, sorted(folder.iterdir())) if run and run.manifest["key"] == key]
    return sorted(found, key=lambda run: str(run.manifest.get("started", "")), reverse=True)


def up_to_date(page: Path, folders: Sequence[Path]) -> bool:
    """Whether a file is newer than what happened in some run folders."""
    try:
        written = page.stat().st_mtime_ns
        return all((folder / MANIFEST).stat().st_mtime_ns < written for folder in folders)
    except FileNotFoundError:
        return False


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there yet.

    Raises:
        UserError: something on the way is no folder and cannot become one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError) as error:  # below /proc, or below a link to nowhere
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}: {error.filename}); choose another folder with "
            "--out or BEITCTL_RUNS"
        ) from error


def new_folder(parent: Path, identity: Identity) -> Path:
    """Make ``parent/<time>-<hash8>``, with the next second where that is taken.

    Raises:
        UserError: ``parent`` cannot be made.
    """
    make_folder(parent)
    while True:
        folder = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{identity.fingerprint[:8]}"
        try:
            folder.mkdir()
        except FileExistsError:
            time.sleep(0.1)
        else:
            return folder


def write_file(path: Path, text: str) -> None:
    """Replace a file in one step, so that a crash leaves the old text or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class Workplace:
    """A run folder that this process works in: locked, with a manifest that it keeps up to date."""

    def __init__(self, folder: Path) -> None:
        """Lock an existing folder.

        Raises:
            UserError: another process works in it.
        """
        self.folder = folder
        self.manifest: dict[str, Any] = dict(run.manifest) if (run := read(folder)) else {}
        self._lock = _locked(folder)

    def begin(self, table: StageTable, facts: Mapping[str, Any]) -> None:
        """Write ``resolved.toml`` and the manifest of a run that starts or goes on."""
        write_file(self.folder / "resolved.toml", resolved(table))
        self.manifest = {
            **facts,
            "status": "running",
            "exit": None,
            "started": self.manifest.get("started") or now(),
            "ended": None,
            "metrics": {},
        }
        self._save()

    def end(self, status: str, exit: int, metrics: Any) -> None:
        """Record how the run ended."""
        self.manifest |= {"status": status, "exit": exit, "ended": now(), "metrics": metrics}
        self._save()

    def close(self) -> None:
        """Let other processes work here."""
        self._lock.close()

    def _save(self) -> None:
        write_file(self.folder / MANIFEST, json.dumps(self.manifest, indent=2) + "\n")


def _locked(folder: Path) -> BinaryIO:
    file = open(folder / LOCK, "ab+")  # noqa: SIM115 - held until the run ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "unknown"
        file.close()
        raise UserError(
            f"{folder}: another process (pid {holder}) works on this run; wait for it, stop it, or start "
            "another run with --no-resume"
        ) from None
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode())
    file.flush()
    return file


def facts(
    table: StageTable, recipe: str, identity: Identity, parents: Mapping[str, Run], *,
    command: Sequence[str], world: int,
) -> dict[str, Any]:  # fmt: skip
    """What a manifest says about a run before it starts."""
    return {
        "id": identity.fingerprint[:8],
        "stage": table.stage,
        "key": table.key,
        "recipe": recipe,
        "command": list(command),
        "world": world,
        "parents": {
            f"@{key}": {"folder": str(run.folder.resolve()), "fingerprint": run.manifest["fingerprint"]}
            for key, run in parents.items()
        },
        "data": identity.data,
        "settings": settings.lasting(table.plugin),
        "config_hash": identity.config,
        "code_hash": identity.code,
        "fingerprint": identity.fingerprint,
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git(),
        "host": platform.node(),
    }


def resolved(table: StageTable) -> str:
    """One table of a recipe, after --set, as TOML."""
    nested: dict[str, Any] = table.table
    for part in reversed(table.key.split(".")):
        nested = {part: nested}
    return tomlkit.dumps(nested)


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any]:
    """Commit of the checkout that beitctl runs from, and whether files differ from it; empty elsewhere."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return {}
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "changed": bool(changes)}
