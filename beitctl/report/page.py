"""The report: one HTML file that opens without network or script, made from what a run folder holds.

Parts that are missing or broken are left out, so that a run that failed early still has a page.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from beitctl.replacing import replace_file
from beitctl.report import charts, events
from beitctl.report.charts import Picture, Room
from beitctl.report.progress import duration
from beitctl.report.tables import Table, mapping, meanings, table, tables, whole

REPORT = "report.html"
MAX_LISTED = 50
MAX_SETTINGS = 100_000

OUTCOMES = {
    0: ("done", "good", "The run is complete."),
    1: ("failed", "bad", "An unexpected error ended the run: a fault of the software."),
    2: ("failed", "bad", "The command or a setting is wrong. The message said what to change."),
    3: ("failed", "bad", "Data are missing, unreadable or not what the run started with."),
    4: ("failed", "bad", "The environment lacks something: see beitctl doctor."),
    5: ("failed", "bad", "It did not fit into memory or onto the disk. Use smaller batches, or free space."),
    6: (
        "diverged",
        "bad",
        "Training produced numbers that are not finite. A lower learning rate often helps.",
    ),
    7: ("check failed", "bad", "A check that was asked for did not hold."),
    75: ("stopped", "wait", "Stopped early on request. The same command goes on from the last checkpoint."),
    130: ("interrupted", "wait", "Stopped by Ctrl-C. The same command goes on from the last checkpoint."),
}
UNFINISHED = (
    "not finished",
    "wait",
    "The run still goes on, or was ended from outside. The same command goes on from the last checkpoint.",
)


@dataclass(frozen=True)
class Section:
    """One run as the template shows it."""

    anchor: str
    title: str
    status: str
    tone: str
    outcome: str
    took: str
    seconds: float
    facts: list[tuple[str, str]]
    warnings: list[dict[str, Any]]
    results: list[Table]
    terms: list[tuple[str, str]]
    restarts: list[int]
    charts: list[Picture]
    small_charts: list[Picture]
    pictures: list[Picture]
    tables: list[Table]
    command: str
    recipe: str
    environment: list[Table]
    notes: list[str]


@dataclass(frozen=True)
class Overview:
    """What stands above the stages of a whole recipe."""

    outcome: str
    results: list[Table]
    terms: list[tuple[str, str]] = field(default_factory=list)


def write(folder: Path) -> Path:
    """Write ``report.html`` of one run from its manifest, events, settings and pictures; returns its path.

    Raises:
        OSError: the page cannot be written.
    """
    section = _section(folder, folder, Room(), 0)
    return _render(folder, f"{section.title}: {section.status}", None, [section])


def write_pipeline(folder: Path, run_folders: Sequence[Path]) -> Path:
    """Write ``report.html`` of a whole recipe: ``summary.json`` of ``folder``, then every run in order.

    Raises:
        OSError: the page cannot be written.
    """
    room = Room()
    sections = [_section(run, folder, room, number) for number, run in enumerate(run_folders)]
    summary = _json(folder / "summary.json")
    done = sum(section.tone == "good" for section in sections)
    outcome = (
        f"{done} of {len(sections)} stages are done, {duration(sum(s.seconds for s in sections))} in all."
    )
    recipes = [str(r) for r in (_json(run / "manifest.json").get("recipe") for run in run_folders) if r]
    title = f"Recipe {recipes[0] if recipes else folder.name}"
    return _render(folder, title, Overview(outcome, tables(summary), meanings(summary)), sections)


def _render(folder: Path, title: str, overview: Overview | None, sections: list[Section]) -> Path:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("page.html.j2").render(title=title, overview=overview, sections=sections)
    path = folder / REPORT
    replace_file(path, html.encode("utf-8", errors="replace"))
    return path


def _section(folder: Path, page: Path, room: Room, place: int) -> Section:
    manifest = _json(folder / "manifest.json")
    records = _records(folder)
    of = _by_event(records)
    start = of["start"][0] if of["start"] else {}
    end = _end(records)
    exit_code = whole(end.get("exit") if manifest.get("exit") is None else manifest["exit"])
    status, tone, outcome = _outcome(exit_code)
    metrics = mapping(manifest.get("metrics")) or mapping(end.get("metrics"))
    began = manifest.get("started", start.get("time"))
    ended = manifest.get("ended") or (records[-1].get("time") if records else None)
    seconds = _seconds_between(began, ended)
    series = charts.collect(of["step"])
    restarts = charts.restarts(records)
    training = charts.training(series, metrics, restarts, room)
    evaluations, evaluation_tables = charts.evaluations(of["eval"], restarts, room)
    name = str(
        manifest.get("key")
        or manifest.get("stage")
        or start.get("stage")
        or f"{folder.parent.name}/{folder.name}"
    )
    return Section(
        anchor=f"stage-{place}",
        title=name,
        status=status,
        tone=tone,
        outcome=outcome,
        took=duration(seconds) if seconds else "",
        seconds=seconds,
        facts=_facts(manifest, start, of, seconds, exit_code),
        warnings=_warnings(of["warning"]),
        results=tables(metrics) + evaluation_tables,
        terms=meanings({**dict.fromkeys(series, 0), **metrics}),
        restarts=restarts,
        charts=training + evaluations,
        small_charts=charts.others(series, restarts, room),
        pictures=[_picture(folder, page, image, room) for image in of["image"]],
        tables=[_event_table(record) for record in of["table"]],
        command=_command(manifest.get("command")),
        recipe=_text(folder / "resolved.toml")[:MAX_SETTINGS],
        environment=_environment(manifest),
        notes=[str(record.get("message", "")) for record in of["note"][-MAX_LISTED:]],
    )


def _end(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last end, unless the run started again after it."""
    last = [record for record in records if record["event"] in ("start", "end")][-1:]
    return last[0] if last and last[0]["event"] == "end" else {}


def _outcome(exit_code: int | None) -> tuple[str, str, str]:
    if exit_code is None:
        return UNFINISHED
    return OUTCOMES.get(exit_code, ("failed", "bad", f"The run ended with exit code {exit_code}."))


def _by_event(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    kinds = ("start", "step", "eval", "checkpoint", "image", "table", "note", "warning", "end")
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for record in records:
        found.setdefault(record["event"], []).append(record)
    return found


def _facts(
    manifest: Mapping[str, Any],
    start: Mapping[str, Any],
    of: Mapping[str, list[dict[str, Any]]],
    seconds: float,
    exit_code: Any,
) -> list[tuple[str, str]]:
    checkpoint = of["checkpoint"][-1] if of["checkpoint"] else {}
    facts = {
        "Recipe": manifest.get("recipe", start.get("recipe")),
        "Run": manifest.get("id", start.get("run")),
        "Started": manifest.get("started", start.get("time")),
        "Took": duration(seconds) if seconds else None,
        "Last step": of["step"][-1].get("step") if of["step"] else None,
        "Last checkpoint": checkpoint.get("path"),
        "Restarts": max(len(of["start"]) - 1, 0) or None,
        "Exit code": exit_code,
        "Processes": manifest.get("world"),
        "Code": manifest.get("git"),
    }
    return [(name, _shown(value)) for name, value in facts.items() if value not in (None, "", {}, [])]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = {key: item for key, item in value.items() if item not in (None, "", False)}
        return ", ".join(key if item is True else f"{key} {_shown(item)}" for key, item in parts.items())
    moment = _moment(value)
    return moment.strftime("%Y-%m-%d %H:%M") if moment else str(value)


def _environment(manifest: Mapping[str, Any]) -> list[Table]:
    single = {
        name: manifest[name] for name in ("fingerprint", "config_hash", "code_hash") if manifest.get(name)
    }
    nested = {name: mapping(manifest.get(name)) for name in ("versions", "parents")}
    return tables(single) + [t for name, group in nested.items() if group for t in tables(group, name)]


def _warnings(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[str, ...], int] = {}
    for record in records:
        key = tuple(str(record.get(part, "")) for part in ("code", "message", "fix"))
        found[key] = found.get(key, 0) + 1
    return [
        {"code": code, "message": message, "fix": fix, "count": count}
        for (code, message, fix), count in list(found.items())[:MAX_LISTED]
    ]


def _picture(folder: Path, page: Path, record: Mapping[str, Any], room: Room) -> Picture:
    title, caption = str(record.get("title", "")), str(record.get("caption", ""))
    alt = f"{title}. {caption}"
    path = folder / str(record.get("path", ""))
    if not path.resolve().is_relative_to(folder.resolve()):
        return Picture(title, caption, alt)  # a page must not carry files from elsewhere
    try:
        src = room.embed(path.read_bytes())
    except OSError:
        return Picture(title, caption, alt)
    return Picture(title, caption, alt, src, Path(os.path.relpath(path, page)).as_posix())


def _event_table(record: Mapping[str, Any]) -> Table:
    columns, rows = record.get("columns"), record.get("rows")
    return table(
        str(record.get("title", "")),
        columns if isinstance(columns, list) else [],
        rows if isinstance(rows, list) else [],
    )


def _records(folder: Path) -> list[dict[str, Any]]:
    try:
        return events.read(folder)
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        return mapping(json.loads(_text(path)))
    except (ValueError, RecursionError):
        return {}


def _command(value: Any) -> str:
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value or "")


def _moment(value: Any) -> datetime | None:
    if not isinstance(value, str) or not re.match(r"\d{4}-\d\d-\d\dT", value):
        return None
    try:
        return datetime.fromisoformat(value).astimezone()
    except (ValueError, OverflowError):
        return None


def _seconds_between(began: Any, ended: Any) -> float:
    first, last = _moment(began), _moment(ended)
    span = (last - first).total_seconds() if first and last else 0.0
    return span if math.isfinite(span) and span > 0 else 0.0
