"""The folder of a pack: what is complete in it, so that an interrupted pack goes on, and what came of it."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from beitctl.data.lock import NAME as LOCK
from beitctl.errors import DataError, UserError
from beitctl.runs import write_file

VERSION = 1
DONE, BEGUN, LEFT_OUT = "packed.json", "packing.jsonl", "left-out.jsonl"
READ = "read"
"""Key of ``packed.json`` with the table that reads the shards, without ``path``."""


@dataclass
class Entry:
    """A complete shard, or the end of the source without one: examples up to ``stop`` are dealt with."""

    stop: int
    name: str = ""
    examples: int = 0
    having: dict[str, int] = field(default_factory=dict)
    """How many of them have a picture, captions, a label, text, and a picture that is as it was."""
    size: int = 0
    """Bytes of the file."""
    sha256: str = ""
    left_out: list[dict[str, str]] = field(default_factory=list)
    """Broken examples since the shard before."""


class Journal:
    """What is known of a folder in which a pack is made; one writer at a time."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Read what an earlier call left in a folder, or begin.

        Args:
            folder: exists.
            identity: what decides the bytes of the shards, as plain data.

        Raises:
            UserError: the folder holds a pack of other data or with other settings.
        """
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.entries: list[Entry] = []
        self.bad = 0
        """Number of broken examples so far."""
        self.done = self._done()
        if self.done is None:
            for draft in folder.glob(".*.tmp"):
                draft.unlink()
            self.entries = self._complete()
            self.bad = len(self.left_out)
            lines = [json.dumps(self.identity), *(json.dumps(asdict(entry)) for entry in self.entries)]
            write_file(folder / BEGUN, "".join(f"{line}\n" for line in lines))

    @property
    def stop(self) -> int:
        """Examples that are dealt with."""
        return self.entries[-1].stop if self.entries else 0

    @property
    def shards(self) -> list[Entry]:
        """The complete shards."""
        return [entry for entry in self.entries if entry.name]

    @property
    def left_out(self) -> list[dict[str, str]]:
        """Broken examples so far."""
        return [row for entry in self.entries for row in entry.left_out]

    def add(self, entry: Entry) -> None:
        """Note that a shard is complete and has its name."""
        with (self.folder / BEGUN).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)
        self.bad += len(entry.left_out)

    def write_left_out(self, problems: list[str], more: Sequence[Mapping[str, str]] = ()) -> None:
        """List what is not in the shards: what the source left out, what was broken, and ``more``."""
        rows = [*({"id": None, "reason": line} for line in problems), *self.left_out, *more]
        if rows:
            write_file(self.folder / LEFT_OUT, "".join(json.dumps(row) + "\n" for row in rows))

    def finish(self, problems: list[str]) -> dict[str, Any]:
        """Write ``packed.json``; returns what it says."""
        self.write_left_out(problems)
        shards = self.shards
        packed = sum(entry.examples for entry in shards)
        having = dict(sum((Counter(entry.having) for entry in shards), Counter()))
        summary = {
            **self.identity,
            READ: reading(self.identity["settings"]["format"], packed, having),
            "packed": packed,
            "with": having,
            "left_out": len(self.left_out),
            "left_out_by_source": len(problems),
            "bytes": sum(entry.size for entry in shards),
            "shards": [
                {"name": e.name, "examples": e.examples, "bytes": e.size, "sha256": e.sha256} for e in shards
            ],
        }
        write_file(self.folder / DONE, json.dumps(summary, indent=2) + "\n")
        (self.folder / BEGUN).unlink()
        return summary

    def _done(self) -> dict[str, Any] | None:
        """What a finished pack in the folder says."""
        path = self.folder / DONE
        if not path.exists():
            return None
        summary = _json(path.read_bytes())
        self._compare(summary)
        for shard in summary["shards"]:
            file = self.folder / shard["name"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise DataError(
                    f"{file}: is gone or has changed since it was packed; remove {self.folder} and pack again"
                )
        (self.folder / BEGUN).unlink(missing_ok=True)
        return summary

    def _complete(self) -> list[Entry]:
        """Entries of the shards that an interrupted pack left, up to the first that is not whole."""
        path = self.folder / BEGUN
        if not path.exists():
            return []
        first, *lines = path.read_bytes().split(b"\n")
        self._compare(_json(first))
        entries = []
        for line in lines:
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):  # the call was killed while it wrote
                break
            file = self.folder / entry.name
            if entry.name and (not file.is_file() or file.stat().st_size != entry.size):
                break
            entries.append(entry)
        return entries

    def _compare(self, there: Mapping[str, Any]) -> None:
        """Refuse a pack of other data, or with other settings."""
        for name, here in self.identity.items():
            if there.get(name) != here:
                raise UserError(
                    f"{self.folder}: holds a pack of {name} = {json.dumps(there.get(name))}, now it is "
                    f"{json.dumps(here)}; choose another --out, or remove that folder"
                )


def reading(format: str, packed: int, having: Mapping[str, int]) -> dict[str, str]:
    """The table, without ``path``, of the source that reads shards as they were packed.

    A column is named only if all examples have it: sources refuse examples without what was asked for.
    """
    every = {name for name, count in having.items() if count == packed}
    if format == "tar":
        cells = {"label": "cls", "text": "json:text"}
        return {"kind": "webdataset", **{name: cell for name, cell in cells.items() if name in every}}
    table = {"kind": "parquet", "image": "image" if "image" in every else "", "id": "id"}
    if not table["image"] and "text" not in every:
        table["image"] = "image"
    table |= {name: name for name in ("label", "text") if name in every}
    if "text" in every and "captions" in every:
        table["caption"] = "captions"  # found without being named only beside pictures alone
    return table


def packed(folder: Path) -> dict[str, Any] | None:
    """The table that reads a finished pack in a folder; None if there is none."""
    try:
        found = _json((folder / DONE).read_bytes()).get(READ)
    except OSError:
        return None
    if not isinstance(found, dict) or "kind" not in found:
        return None
    return {"kind": found["kind"], "path": str(folder), **found}


def refuse_others(folder: Path) -> None:
    """Refuse a folder with something else in it.

    Raises:
        UserError: it is a file, or has files and no pack.
    """
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise UserError(f"{folder}: a file, but --out must be a folder")
        return
    names = {entry.name for entry in os.scandir(folder)}
    others = sorted(n for n in names if n != LOCK and not (n.startswith(".") and n.endswith(".tmp")))
    if others and not names & {DONE, BEGUN}:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(f"{folder}: not empty ({shown}) and no pack; choose a new folder with --out")


def _json(data: bytes) -> dict[str, Any]:
    """A JSON object; an empty one for what is none."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
