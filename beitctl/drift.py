"""Config drift: a run that goes on with other settings, data or torch than it began with.

All of it is refused by name. ``--allow KEY`` permits what a checkpoint can go on with, and the manifest keeps
what was permitted.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from beitctl import runs, settings
from beitctl.errors import DataError, UserError
from beitctl.recipe import StageTable
from beitctl.runs import Identity, Run

DATA, TORCH, CODE = "data", "torch", "code"
UNFIT = "the weights of the checkpoint would not fit"
MEANING = "what the checkpoint has learnt belongs to the old one"
REASONS = {
    **dict.fromkeys(("model", "shape", "codes", "code_width", "frozen", "ema_decay"), UNFIT),
    **dict.fromkeys(
        (
            "kind", "teacher", "text_tokenizer", "tokens", "tokens_from", "image_tokenizer",
            "image_tokenizer_settings",
        ),
        MEANING,
    ),
    **dict.fromkeys(("init", "init_settings"), "it is read when a run begins, never again"),
}  # fmt: skip
"""Parts of dotted keys that no run can go on with, and why."""
SOURCES = {"source", "sources", "held_out"}
"""Parts of keys of data, which a run can change whatever they are called further down."""
OWN_FILES = {
    runs.MANIFEST, runs.LOCK, runs.SLURM, "recipe.toml", "resolved.toml", "events.jsonl", "report.html",
}  # fmt: skip
"""What is in the folder of every run, whatever its stage has done."""
CLOSE = 0.8
"""How alike a name must be to be what was meant: keys of one table begin alike."""
LONGEST = 60
"""Characters of a value that a message shows."""


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was when the run began."""

    key: str
    """Dotted key of a setting within its table, ``@reference``, ``data``, ``torch`` or ``code``."""
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"

    @property
    def refusal(self) -> str:
        """Why no run can go on with it; empty if one can."""
        if self.key.startswith("@"):
            return MEANING
        parts = self.key.split(".")
        if not SOURCES.isdisjoint(parts):
            return ""
        if parts[-1] == "ema_decay" and self.old and self.new:
            return ""
        return next((REASONS[part] for part in parts if part in REASONS), "")


def changes(run: Run, table: StageTable, identity: Identity, parents: Mapping[str, Run]) -> list[Change]:
    """What differs between a run and what is asked for now, in alphabetical order within each kind.

    Of a finished run the version of torch is passed over, if nothing else has changed: it is done.
    """
    manifest = run.manifest
    found: list[Change] = []
    if manifest["config_hash"] != identity.config:
        then, now = manifest.get("settings", {}), settings.lasting(table.plugin)
        found = [
            Change(key, then.get(key, _ABSENT), now.get(key, _ABSENT))
            for key in sorted(then.keys() | now.keys())
            if then.get(key, _ABSENT) != now.get(key, _ABSENT)
        ]
        used = {ref: str(parent.get("fingerprint")) for ref, parent in manifest.get("parents", {}).items()}
        given = {f"@{key}": str(parent.manifest["fingerprint"]) for key, parent in parents.items()}
        both = sorted(used.keys() & given.keys())
        found += [
            Change(ref, f"run {used[ref][:8]}", f"run {given[ref][:8]}")
            for ref in both
            if used[ref] != given[ref]
        ]
        if manifest.get("data", "") != identity.data:
            found.append(Change(DATA, _short(manifest.get("data", "")), _short(identity.data)))
    was, now_torch = _minor(manifest.get("versions", {}).get("torch", "")), _minor(torch_version())
    if was and was != now_torch and (found or not run.ok):
        found.append(Change(TORCH, was, now_torch))
    return found


def nothing_done(run: Run, table: StageTable) -> bool:
    """Whether a run has not come so far that anything could go on from it: no checkpoint, or not a file."""
    if run.ok:
        return False
    if _trains(table):
        saved = [path for path in run.folder.rglob("checkpoints/step-*") if path.suffix != ".tmp"]
        return not saved
    return {path.name for path in run.folder.iterdir()} <= OWN_FILES


def check(run: Run, table: StageTable, found: Sequence[Change], allow: Sequence[str], advice: str) -> None:
    """Let a run go on with what has changed, if all of it is allowed.

    Raises:
        UserError: something is not allowed, or cannot be; names it all.
        DataError: only the data are others.
    """
    refuse_unknown(table, run, allow, {change.key for change in found})
    allowed = {_within(table, key) for key in allow}
    lines, open_ = [], []
    for change in found:
        if change.refusal:
            lines.append(f"{change} (cannot be allowed: {change.refusal})")
        elif change.key not in allowed:
            lines.append(str(change))
            open_.append(change.key)
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        able = _trains(table) and len(open_) == len(lines)
        goes_on = f"--out {run.folder} {' '.join(f'--allow {key}' for key in open_)}"
        again = f"to go on with it all the same: {goes_on}; else " if able else ""
        if [change.key for change in found] == [DATA]:
            also = f"; to go on with them all the same: {goes_on}" if able else ""
            raise DataError(
                f"{run.folder}: the data are not those that this run started with; choose another folder "
                f"with --out, or undo the change{also}{listed}"
            )
        raise UserError(
            f"{run.folder}: this run began with other settings, data or versions:{listed}\n{again}{advice}"
        )
    if found and run.ok and not _longer(found):
        raise UserError(
            f"{run.folder}: this run is finished, and goes on only with more steps: raise train.steps and "
            "add --allow train.steps"
        )


def records(run: Run, found: Iterable[Change], identity: Identity) -> list[dict[str, Any]]:
    """What the manifest keeps of permitted changes, and of other code, which is always permitted."""
    kept = list(found)
    if (was := str(run.manifest.get("code_hash", ""))) != identity.code:
        kept.append(Change(CODE, was[:8], identity.code[:8]))
    return [
        {"time": runs.now(), "key": change.key, "old": _stored(change.old), "new": _stored(change.new)}
        for change in kept
    ]


def told(record: Mapping[str, Any]) -> tuple[str, str]:
    """A record as a warning, and what to do about it; empty where that is nothing."""
    if record["key"] == CODE:
        return (
            f"the code is not what this run began with ({record['old']}, now {record['new']})",
            "if the change touches results, begin a new run",
        )
    return (
        f"going on with {Change(record['key'], record['old'], record['new'])}, as --allow says; "
        "manifest.json keeps it under drift",
        "",
    )


def torch_version() -> str:
    """Version of torch, without importing it; empty without torch."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


class _Absent:
    """A setting that is not there."""

    def __repr__(self) -> str:
        return "not set"


_ABSENT = _Absent()


def refuse_unknown(table: StageTable, run: Run, allow: Sequence[str], changed: Iterable[str] = ()) -> None:
    """Refuse to allow what does not exist, or what no run can go on with.

    Args:
        table: as it is asked for now.
        run: the one that is to go on.
        allow: keys from the command line.
        changed: keys that may be allowed besides those of settings.

    Raises:
        UserError: names the key, and one that is close.
    """
    if not allow:
        return
    if not _trains(table):
        raise UserError(
            f"--allow {allow[0]}: [{table.key}] does not train, so there is no checkpoint to go on from with "
            "other settings; begin a new run"
        )
    then = run.manifest.get("settings", {})
    known = {*settings.flat(table.plugin), *then, *changed, DATA, TORCH, CODE}
    for given in allow:
        key = _within(table, given)
        if key not in known:
            below = sorted(name for name in known if name.startswith(f"{key}."))
            close = difflib.get_close_matches(key, known, n=1, cutoff=CLOSE)
            hint = f"; name each setting, such as {below[0]}" if below else ""
            hint = hint or (f", did you mean '{close[0]}'?" if close else "")
            raise UserError(
                f"--allow {given}: [{table.key}] has no such setting, nor is it data or torch{hint}"
            )
        refusal = Change(key, 0, 0).refusal
        if refusal and not key.endswith("ema_decay"):
            raise UserError(f"--allow {given}: cannot be allowed: {refusal}; begin a new run")


def _trains(table: StageTable) -> bool:
    return next(settings.trainings(table.plugin), None) is not None


def _within(table: StageTable, key: str) -> str:
    """The key within its table of one that may name the table too."""
    return key.removeprefix(f"{table.key}.").removeprefix(f"{table.stage}.")


def _longer(found: Sequence[Change]) -> bool:
    return any(
        change.key.rpartition(".")[2] == "steps" and isinstance(change.old, int) and change.new > change.old
        for change in found
    )


def _minor(version: str) -> str:
    return ".".join(version.partition("+")[0].split(".")[:2])


def _short(fingerprint: str) -> str:
    """A name for data: fingerprints may be long, and several in a row."""
    return runs.digest(fingerprint)[:8] if fingerprint else "none"


def _stored(value: Any) -> Any:
    return None if value is _ABSENT else value


def _shown(value: Any) -> str:
    if value is _ABSENT or value is None:
        return "not set"
    text = value if isinstance(value, str) and value else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
