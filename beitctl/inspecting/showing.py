"""The report of ``beitctl data check`` for people: short tables that fit into 80 columns."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from beitctl.report.naming import printable

WIDTH = 80
SHOWN = 10
"""Lines of broken and left-out examples that are shown; --json has more."""
NAME_CHARACTERS = 44
HAVING = {
    "image": "picture", "second": "second picture", "segmentation": "segmentation", "captions": "captions",
    "text": "text", "label": "label", "answers": "answers", "token_ids": "ids of text",
    "caption_ids": "ids of captions", "objects": "objects",
}  # fmt: skip


def size(count: int) -> str:
    """A number of bytes for people: ``1.3 GB``."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count:,} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def show(report: Mapping[str, Any]) -> None:
    """Print a report on stdout."""
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, highlight=False, markup=False, width=None if terminal else WIDTH)
    with console.capture() as capture:
        console.print(_overview(report))
        for title, part in _parts(report):
            console.print(Text(f"\n{title}", style="bold"))
            console.print(part)
    lines = [printable(report["recipe"]), "", *(line.rstrip() for line in capture.get().splitlines())]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _parts(report: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Everything that there is something to say of."""
    ignored = _grid([("files", _counts(report["ignored"]))]) if report["ignored"] else None
    notes = _grid([("", printable(note)) for note in report["notes"]]) if report["notes"] else None
    for title, part in (
        ("pictures", _pictures(report["pictures"])),
        ("classes", _classes(report["classes"])),
        ("answers", _classes(report["answers"])),
        ("objects", _classes(report["objects"])),
        ("captions", _writing(report["captions"])),
        ("text", _writing(report["text"])),
        ("broken", _broken(report["broken"])),
        ("duplicates", _duplicates(report["duplicates"])),
        ("left out", _left_out(report["left_out"])),
        ("ignored", ignored),
        ("notes", notes),
    ):
        if part is not None:
            yield title, part


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and what is said of them."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=13)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            table.add_row(Text(f"  {name}" if name else ""), Text(value))
    return table


def _overview(report: Mapping[str, Any]) -> Table:
    checked, total = report["checked"], report["examples"]
    looked = f", of which {checked:,} were looked at, evenly spread" if checked < total else ""
    having = ", ".join(f"{HAVING[name]} {count:,}" for name, count in report["with"].items() if count)
    return _grid(
        [
            ("kind", report["kind"]),
            ("also fits", ", ".join(f"{kind} (read it so with --kind {kind})" for kind in report["also"])),
            ("examples", f"{total:,}{looked}"),
            ("with", having),
            ("size", size(report["bytes"])),
            ("fingerprint", report["fingerprint"]),
        ]
    )


def _counts(counts: Mapping[str, int], shown: int = SHOWN) -> str:
    """Names with their numbers, most first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f", {len(ordered) - shown:,} more" if len(ordered) > shown else ""
    return ", ".join(f"{printable(name)} {count:,}" for name, count in ordered[:shown]) + more


def _pictures(found: Mapping[str, Any] | None) -> Table | None:
    if found is None:
        return None
    small = "  ".join(f"{share:.1%} below {side} px" for side, share in found["smaller_than"].items())
    special = {
        "animated (first frame is used)": found["animated"],
        "CMYK": found["cmyk"],
        "with transparency": found["transparent"],
    }
    return _grid(
        [
            ("formats", _counts(found["formats"])),
            ("modes", _counts(found["modes"])),
            ("width", _pixels(found["width"])),
            ("height", _pixels(found["height"])),
            ("short side", small),
            ("bytes", f"{size(found['bytes'])}, {size(found['bytes'] // found['count'])} a picture"),
            ("special", _counts({name: count for name, count in special.items() if count})),
        ]
    )


def _pixels(spread: Mapping[str, int]) -> str:
    return f"{spread['min']:,} to {spread['max']:,} px, median {spread['median']:,}"


def _classes(found: Mapping[str, Any] | None) -> Table | None:
    if found is None:
        return None
    least = "" if found["complete"] else "more than "
    first = ", ".join(f"{printable(name, NAME_CHARACTERS)} {count:,}" for name, count in found["first"])
    rest = f", {found['count'] - len(found['first']):,} more" if found["count"] > len(found["first"]) else ""
    rows = [("count", f"{least}{found['count']:,}")]
    for name in ("largest", "smallest"):
        label, count = found[name]
        rows.append((name, f"{printable(label, NAME_CHARACTERS)} {count:,}"))
    return _grid([*rows, ("first", first + rest)])


def _writing(found: Mapping[str, Any] | None) -> Table | None:
    if found is None:
        return None
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "right", "right"):
        table.add_column(justify=justify, no_wrap=True, min_width=13 if justify == "left" else 7)
    table.add_row("", "min", "median", "99 %", "max")
    names = {"per_example": "per example", "characters": "characters", "words": "words"}
    for key, name in names.items():
        if key in found:
            table.add_row(f"  {name}", *(f"{value:,}" for value in found[key].values()))
    shares = [(name, share) for name, share in found["scripts"].items() if share >= 0.0005][:SHOWN]
    written = ", ".join(f"{name} {share:.1%}" for name, share in shares) or "no letters"
    repeated = f"{found['repeated']:,} ({found['repeated'] / found['count']:.1%})"
    outer = Table.grid()
    outer.add_row(_grid([("count", f"{found['count']:,}"), ("repeated", repeated), ("scripts", written)]))
    outer.add_row(table)
    return outer


def _broken(found: Mapping[str, Any]) -> Table | None:
    if not found["count"]:
        return None
    rows = [("count", f"{found['count']:,} ({found['share']:.2%})")]
    return _listed(rows, [f"{_short(row['id'])}: {printable(row['reason'])}" for row in found["first"]],
                   found["count"])  # fmt: skip


def _left_out(found: Mapping[str, Any]) -> Table | None:
    if not found["count"]:
        return None
    rows = [("count", f"{found['count']:,}")]
    return _listed(rows, [printable(line) for line in found["first"]], found["count"])


def _listed(rows: list[tuple[str, str]], lines: Sequence[str], count: int) -> Table:
    for number, line in enumerate(lines[:SHOWN]):
        rows.append(("first" if number == 0 else "", line))
    if count > SHOWN:
        rows.append(("", f"{count - SHOWN:,} more; --json lists up to 1,000"))
    return _grid(rows)


def _duplicates(found: Mapping[str, Any]) -> Table | None:
    if not found["groups"]:
        return None
    copies = "1 copy" if found["extra"] == 1 else f"{found['extra']:,} copies"
    pictures = "1 picture" if found["groups"] == 1 else f"{found['groups']:,} pictures"
    rows = [("count", f"{copies} of {pictures}, byte for byte")]
    for number, group in enumerate(found["first"]):
        names = " = ".join(_short(name) for name in group[:3])
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        rows.append(("first" if number == 0 else "", names + more))
    return _grid(rows)


def _short(name: str) -> str:
    return printable(name, NAME_CHARACTERS)
