"""The record of a run: JSON lines in ``events.jsonl``, and the same lines on stdout for scripts.

Every record has ``v`` (schema version, 1), ``event``, ``time`` (ISO 8601, UTC) and ``stage``; the rest:

    start       run, recipe, dir, plan, and resumed_from (a step) if the run goes on from a checkpoint
    step        step, of, metrics {name: number}
    samples     step, ids (objective/id of every sample of the step, sorted; with train.log_samples)
    eval        name, step, metrics {name: number, or a table of them}
    checkpoint  step, path (relative to the run folder), seconds
    image       name, path, title, caption, and step if one was reached
    table       name, title, columns, rows
    note        message
    warning     code, message, fix
    end         run, status, exit, metrics, and report (relative to the run folder)

JSON has no number for what is not finite: such values are the strings ``"nan"``, ``"inf"`` and ``"-inf"``,
which ``float()`` reads.
"""

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Self

from beitctl.errors import DISK_FULL
from beitctl.replacing import replace_file
from beitctl.report.progress import Progress

VERSION = 1
EVENTS = "events.jsonl"
MEDIA = "media"
PASSING = ("step", "samples", "note", "warning", "checkpoint")
"""Records without which a run goes on when the disk is full."""


def plain(value: Any) -> Any:
    """Value as JSON can hold it: arrays and tensors become lists, numbers that are not finite strings."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes | bytearray):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and torch, without importing them
        return plain(value.tolist())
    return str(value)


class EventLog:
    """The log of one run: appends to ``events.jsonl``, feeds the progress line; a ``beitctl.api.Log``.

    An existing log is continued; a last line that a crash left incomplete is removed. An ``OSError``, such as
    a full disk, reaches the caller, and the log then ends with the last complete record.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stage: str,
        recipe: str,
        run: str,
        json_stdout: bool = False,
        quiet: bool = False,
        active: bool = True,
    ) -> None:
        self.folder = folder
        self._stage = stage
        self._recipe = recipe
        self._run = run
        self._json_stdout = json_stdout
        self._active = active
        self._file: BinaryIO | None = None
        self._step: int | None = None
        self._full = False
        # JSON lines on the same terminal would tear a live block apart
        live = not (json_stdout and sys.stdout.isatty())
        self._progress = Progress(stage, quiet=quiet or not active, live=live)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last state of the progress line on the terminal and close the file."""
        try:
            self._progress.close()
        finally:
            if self._file is not None:
                self._file.close()
                self._file = None

    def start(self, plan: Mapping[str, Any], *, resumed_from: int | None = None) -> None:
        """Record that the run begins, or goes on from the checkpoint of step ``resumed_from``."""
        resumed = {} if resumed_from is None else {"resumed_from": resumed_from}
        where = {"run": self._run, "recipe": self._recipe, "dir": str(self.folder)}
        self._write("start", **where, plan=plan, **resumed)

    def step(self, step: int, of: int, metrics: Mapping[str, float]) -> None:
        """Record the numbers of one training step; also drawn as progress."""
        self._step = step
        self._write("step", step=step, of=of, metrics=metrics)
        self._progress.step(step, of, metrics)

    def samples(self, step: int, ids: Sequence[str]) -> None:
        """Record which samples a step was made of."""
        self._write("samples", step=step, ids=list(ids))

    def evaluation(self, name: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Record what an evaluation found after ``step`` steps."""
        self._write("eval", name=name, step=step, metrics=metrics)

    def checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Record a checkpoint that is complete."""
        shown = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
        self._write("checkpoint", step=step, path=shown.as_posix(), seconds=seconds)

    def figure(self, name: str, png: bytes, title: str, caption: str) -> None:
        """Write a picture to ``media/<name>.png`` and record it; the same name again replaces it."""
        if not self._active:
            return
        path = f"{MEDIA}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-') or 'figure'}.png"
        replace_file(self.folder / path, png)
        at = {} if self._step is None else {"step": self._step}
        self._write("image", name=name, path=path, title=title, caption=caption, **at)

    def table(self, name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Record a table; the same name again replaces it in the report."""
        self._write("table", name=name, title=title, columns=columns, rows=rows)

    def note(self, message: str) -> None:
        """Record and show something worth knowing."""
        self._write("note", message=message)
        self._progress.line(message)

    def warning(self, code: str, message: str, fix: str) -> None:
        """Record and show something that may be wrong, and what to do about it."""
        self._write("warning", code=code, message=message, fix=fix)
        self._progress.line(f"warning {code}: {message}" + (f" To fix: {fix}" if fix else ""))

    def end(
        self, status: str, exit: int, metrics: Mapping[str, Any], *, report: str | None = "report.html"
    ) -> None:
        """Record how the run ended; ``report`` is None where no page is written."""
        page = {} if report is None else {"report": report}
        self._progress.close()
        self._write("end", run=self._run, status=status, exit=exit, metrics=metrics, **page)

    def _write(self, event: str, **fields: Any) -> None:
        if not self._active:
            return
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"v": VERSION, "event": event, "time": time, "stage": self._stage, **plain(fields)}
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._file is None:
            self._file = _reopen(self.folder / EVENTS)
        try:
            _append(self._file, line.encode())
        except OSError as error:
            if event not in PASSING or error.errno not in DISK_FULL:
                raise
            self._lost(error)
        if self._json_stdout:
            sys.stdout.write(line)
            sys.stdout.flush()

    def _lost(self, error: OSError) -> None:
        """Say once that the log has gaps; training does not end for it."""
        if not self._full:
            self._full = True
            self._progress.line(f"warning: {self.folder / EVENTS} has gaps from here on: {error.strerror}")


def read(folder: Path) -> list[dict[str, Any]]:
    """Records of a run as they count at the end; empty where there is no log.

    Lines that are no record are passed over. After a restart from a checkpoint some steps were done twice: of
    such steps the later values count. Of evaluations with the same name and step, and of pictures and tables
    with the same name, the last counts.
    """
    try:
        text = (folder / EVENTS).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return _without_replaced(_without_overtaken([r for r in map(_record, text.split("\n")) if r]))


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("event"), str) else None


def _without_overtaken(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what steps gave that were done again later, after a new start or a return to a checkpoint.

    Metric by metric, for a stage may train more than one model, each with its own steps and names.
    """
    kept = []
    done_again: dict[str, int] = {}  # metric to the first step that comes later
    for record in reversed(records):
        if record["event"] == "step":
            step, metrics = record.get("step"), record.get("metrics")
            if not isinstance(step, int) or not isinstance(metrics, dict):
                continue
            metrics = {
                n: value for n, value in metrics.items() if n not in done_again or step < done_again[n]
            }
            if not metrics:
                continue
            done_again |= dict.fromkeys(metrics, step)
            record = {**record, "metrics": metrics}
        kept.append(record)
    return kept[::-1]


def _without_replaced(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    named = {"eval": ("name", "step"), "image": ("name",), "table": ("name",)}
    kept: list[dict[str, Any]] = []
    seen: set[str] = set()
    for record in reversed(records):
        if record["event"] in named:
            key = json.dumps([record["event"], *(record.get(part) for part in named[record["event"]])])
            if key in seen:
                continue
            seen.add(key)
        kept.append(record)
    return kept[::-1]


def _reopen(path: Path) -> BinaryIO:
    """Open for appending, at the end of the last complete line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 - closed by EventLog.close
    try:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        while b"\n" not in tail and len(tail) < size:
            file.seek(max(size - len(tail) - 65536, 0))
            tail = file.read(size - len(tail) - file.tell()) + tail
        torn = tail.rpartition(b"\n")[2]
        if torn and _record(torn.decode(errors="replace")):
            _append(file, b"\n")
        elif torn:
            file.truncate(size - len(torn))
    except OSError:
        file.close()
        raise
    return file


def _append(file: BinaryIO, data: bytes) -> None:
    """Append all of it, or nothing and raise: a full disk may take a part only."""
    before = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(before)
        raise
