"""The commands that list what there is: recipes, plugins, doctor.

Their modules are imported inside the commands, so that --help answers at once.
"""

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beitctl import registry
from beitctl.errors import PluginError, RecipeError, SetupError, UserError

if TYPE_CHECKING:
    from beitctl.recipe import Recipe

SCHEMA = "beitctl.schema.json"
STAGES = "beitctl.stages"
COMMANDS = ("run", "recipes", "plugins", "data", "doctor", "plan")
"""Names of commands, which no stage may have."""

recipes = typer.Typer(help="Find, read, copy and check recipes.", no_args_is_help=True)
plugins = typer.Typer(help="See what is installed.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON array on stdout.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="Name or file of a recipe.")]


def plugin(group: str, name: str) -> Any:
    """A plugin class that the command line can use.

    Raises:
        PluginError: it cannot be imported, or is a stage with the name of a command.
    """
    if group == STAGES and name in COMMANDS:
        origin = registry.origin(group, name)
        raise PluginError(
            f"the stage '{name}' of {origin} has the name of a command; "
            f"it must be renamed, or uninstall {origin}"
        )
    return registry.get(group, name)


def verified(recipe: "Recipe", keys: Sequence[str], out: Path | None) -> dict[str, Any]:
    """What finished runs of a stage's tables say when they are checked, by key."""
    from beitctl import runs, verifying

    return dict(verifying.verify(recipe, keys, runs.root() / recipe.name, out))


def stage_help(name: str) -> str:
    """Docstring of a stage and its settings with their defaults, or why it cannot be used."""
    try:
        stage = plugin(STAGES, name)
    except PluginError as error:
        cause = error.__cause__
        text = f"{type(cause).__name__}: {cause}".partition("\n")[0] if cause else str(error)
        return f"(broken: {registry.origin(STAGES, name)}: {text})"
    from beitctl.problems import field_names

    lines = [inspect.getdoc(stage) or "", "", "Settings:"]
    for field_name, field in getattr(stage, "model_fields", {}).items():
        default = "required"
        if not field.is_required():
            value = field.get_default(call_default_factory=True, validated_data={})
            default = f"default {json.dumps(value, default=str)}"
        about = " ".join((field.description or "").replace("``", "").split())
        inner = field_names(field.annotation)
        keys = f" Its settings: {', '.join(inner)}." if inner else ""
        lines += ["", f"* {field_name} ({default}): {about}{keys}"]
    return "\n".join(lines)


@recipes.command("ls")
def _recipes_ls(as_json: JsonOption = False) -> None:
    """List the recipes."""
    from beitctl import recipe

    rows = []
    for name in recipe.names():
        try:
            found = recipe.load(name)
        except UserError as error:
            rows.append({"name": name, "stages": [], "summary": f"broken: {error}".partition("\n")[0]})
            continue
        rows.append({"name": name, "stages": list(found.tables), **found.meta, "path": str(found.path)})
    columns = ("name", "summary", "needs", "expect")
    _show(rows if as_json else [_row(row) for row in rows], columns, as_json)


def _row(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as a line of the list, with the first number that was published for it."""
    first = next(iter(recipe.get("published", {}).items()), None)
    expect = f"{first[0]} {first[1]}" if first and isinstance(first[1], int | float) else ""
    return {**recipe, "needs": recipe.get("needs", ""), "expect": expect}


@recipes.command("show")
def _recipes_show(name: NameArgument) -> None:
    """Print the file of a recipe."""
    from beitctl import recipe

    sys.stdout.write(recipe.find(name).read_text(encoding="utf-8"))


@recipes.command("copy")
def _recipes_copy(
    name: NameArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting. Repeatable.")
    ] = [],  # noqa: B006 - typer reads the default and never changes it
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Copy a recipe to a file of your own, comments kept."""
    from beitctl import recipe

    recipe.copy(name, file, settings, force=force)
    sys.stderr.write(f"wrote {file}. Next: beitctl recipes check {file}, then beitctl run {file}\n")


@recipes.command("check")
def _recipes_check(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Names or files of recipes.")],
) -> None:
    """Check recipes: every problem of every one, with line and column."""
    from beitctl import recipe

    problems: list[str] = []
    for file in files:
        try:
            recipe.load(file)
        except RecipeError as error:
            problems += error.problems
        except UserError as error:
            problems.append(str(error))
        else:
            sys.stdout.write(f"{file}: ok\n")
    if problems:
        raise RecipeError(problems)


@recipes.command("schema")
def _recipes_schema(
    write: Annotated[bool, typer.Option("--write", help=f"Write {SCHEMA} instead of printing it.")] = False,
) -> None:
    """Print the JSON Schema of recipes, with which editors complete and check them."""
    from beitctl import recipe
    from beitctl.runs import write_file

    text = json.dumps(recipe.schema(), indent=2) + "\n"
    if not write:
        sys.stdout.write(text)
        return
    write_file(Path(SCHEMA), text)
    sys.stderr.write(f"wrote {SCHEMA}; put this line first in a recipe: #:schema ./{SCHEMA}\n")


@plugins.command("ls")
def _plugins_ls(as_json: JsonOption = False) -> None:
    """List the plugins, and what is wrong with those that cannot be used."""
    rows = []
    for group in registry.GROUPS:
        for name in registry.names(group):
            try:
                plugin(group, name)
                state = "ok"
            except PluginError as error:
                state = f"broken: {error}"
            short = group.partition(".")[2]
            rows.append(
                {"group": short, "name": name, "distribution": registry.origin(group, name), "state": state}
            )
    _show(rows, ("group", "name", "distribution", "state"), as_json)


def check_environment(
    as_json: JsonOption = False,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure products, copies and decoding; try the compiler: a minute."),
    ] = False,
) -> None:
    """Check this machine: versions, GPUs, memory, disk, extras, numerics, speeds, which recipes fit."""
    from beitctl import doctor

    findings = doctor.examine(measure)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings]) + "\n")
    else:
        sys.stdout.write(doctor.as_text(findings))
    if any(finding.blocking for finding in findings):
        raise SetupError(doctor.advice(findings))
    sys.stderr.write(doctor.advice(findings) + "\n")


def _show(rows: Sequence[dict[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """Rows as one JSON array, or in columns."""
    if as_json:
        sys.stdout.write(json.dumps(rows) + "\n")
        return
    shown = [[name.upper() for name in columns], *([str(row[name]) for name in columns] for row in rows)]
    widths = [max(len(row[place]) for row in shown) for place in range(len(columns))]
    for row in shown:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
