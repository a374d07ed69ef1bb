"""``--verify``: a stage checks what its finished run left, and changes nothing."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from beitctl import registry, runs
from beitctl.api import Job
from beitctl.errors import PluginError, UserError
from beitctl.recipe import Recipe, StageTable
from beitctl.report.events import EventLog, plain
from beitctl.runs import Run

STAGES = "beitctl.stages"


def verify(recipe: Recipe, keys: Sequence[str], root: Path, out: Path | None) -> dict[str, Mapping[str, Any]]:
    """What the tables of a stage say of their newest finished runs, by key.

    Args:
        recipe: as it is on the command line.
        keys: tables of one stage.
        root: folder of the recipe's runs.
        out: the run folder, where it is given.

    Raises:
        UserError: the stage cannot check, or there is no finished run with these settings.
        CheckFailed: what a run left does not hold.
        DataError: it cannot be checked, because data are gone or have changed.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for key in keys:
        table = recipe.tables[key]
        check = getattr(table.plugin, "verify", None)
        if not callable(check):
            able = [name for name in registry.names(STAGES) if _offers(name)]
            raise UserError(
                f"--verify: the stage {table.stage} has nothing to check; stages that have: "
                f"{', '.join(able) or 'none'}"
            )
        run = _finished(table, root, out)
        parents = run.manifest.get("parents", {})
        inputs = {name: Path(parent["folder"]) for name, parent in parents.items()}
        log = EventLog(run.folder, stage=table.stage, recipe=recipe.name, run="", quiet=True, active=False)
        with log:
            found[key] = {"run": str(run.folder), **plain(check(Job(run.folder, log, inputs)))}
    return found


def _offers(stage: str) -> bool:
    try:
        return callable(getattr(registry.get(STAGES, stage), "verify", None))
    except PluginError:
        return False


def _finished(table: StageTable, root: Path, out: Path | None) -> Run:
    """The newest finished run of a table with its settings, whatever has become of its data."""
    if out is not None:
        run = runs.read(out)
        there = [run] if run is not None and run.manifest["key"] == table.key else []
    else:
        there = runs.find(root / table.key, table.key)
    fitting = [run for run in there if run.ok and _same_settings(run, table)]
    if not fitting:
        where = out or root / table.key
        raise UserError(
            f"--verify: no finished run of [{table.key}] with these settings in {where} ({len(there)} other "
            f"runs); run beitctl {table.stage} first, or name its folder with --out"
        )
    return fitting[0]


def _same_settings(run: Run, table: StageTable) -> bool:
    """Whether a run was made with a table's settings; those that decide nothing may differ."""
    plugin: Any = table.plugin
    try:
        value: Any = tomllib.loads((run.folder / "resolved.toml").read_text(encoding="utf-8"))
        for part in table.key.split("."):
            value = value[part]
        before = type(plugin).model_validate(value)
    except (OSError, ValueError, LookupError, TypeError, ValidationError):
        return False
    return bool(before.model_dump(mode="json") == plugin.model_dump(mode="json"))
