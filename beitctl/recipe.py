"""Recipes: TOML files with one table per stage, found by name, changed by ``--set``, checked as a whole."""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel, ConfigDict, ValidationError

from beitctl import named_data, registry
from beitctl import overrides as changes
from beitctl.api import GROUP_MARK, Stage
from beitctl.draft import OWN_TABLES, STAGES, Draft
from beitctl.errors import PluginError, RecipeError, UserError
from beitctl.problems import explain, field_names, shown, suggest
from beitctl.toml_places import Keys, dotted, places

FOLDERS = "BEITCTL_RECIPES"
"""Environment variable with folders of recipes, searched before the bundled ones."""
DEFAULT = "beitctl.toml"
"""Recipe in the current folder that is taken when none is named."""
_TABLE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Meta(BaseModel):
    """The table ``[recipe]``: what the recipe is."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    summary: str
    """One sentence."""
    needs: str = ""
    """Hardware, data and time that it takes."""
    tags: list[str] = []
    """Words to find it by."""
    published: dict[str, Any] = {}
    """The numbers to expect, and where they were published."""


@dataclass(frozen=True)
class StageTable:
    """One table of a recipe: a stage with its settings."""

    key: str
    """``pretrain``, or ``finetune.retrieval`` for a named table."""
    stage: str
    """Name of the stage."""
    table: dict[str, Any]
    """The settings after ``--set``."""
    plugin: Stage
    """The stage with its settings, checked."""
    references: tuple[str, ...]
    """Keys of the earlier tables whose results it reads, without the ``@``."""


@dataclass(frozen=True)
class Recipe:
    """A recipe that validates."""

    name: str
    path: Path
    text: str
    """The file as it is, without ``--set``."""
    tables: dict[str, StageTable]
    """Stage tables by key, in the order of the file."""
    meta: dict[str, Any]
    """The table ``[recipe]`` with its defaults."""
    summary: dict[str, Any]
    """The table ``[summary]``."""


def load(name_or_path: str | None, overrides: Sequence[str] = (), *, stage: str | None = None) -> Recipe:
    """Read a recipe, apply the overrides, check everything.

    Args:
        name_or_path: a name, a path, or None for ``beitctl.toml`` in the current folder.
        overrides: ``KEY=VALUE`` sets, ``KEY+=VALUE`` appends to a list, ``KEY=!`` removes; VALUE is TOML, or
            else a text.
        stage: a stage whose table the keys of overrides may leave out.

    Raises:
        RecipeError: every problem there is, one line each.
        UserError: there is no such recipe.
    """
    path = _default() if name_or_path is None else find(name_or_path)
    text = _read(path)
    return build(Draft(path, _parsed(text, path), places(text)), text, overrides, stage=stage)


def build(draft: Draft, text: str, overrides: Sequence[str] = (), *, stage: str | None = None) -> Recipe:
    """The recipe that a draft becomes: as ``load``, for data that are read already.

    Raises:
        RecipeError: every problem there is, one line each.
    """
    for override in overrides:
        draft.override(override, stage)
    tables, meta, summary = _checked(draft)
    draft.raise_problems()
    return Recipe(draft.path.stem, draft.path, text, tables, meta, summary)


def names() -> list[str]:
    """Names of the recipes in the folders of ``$BEITCTL_RECIPES`` and of those that come with beitctl."""
    return sorted({path.stem for folder in _folders() for path in folder.glob("*.toml")})


def find(name: str) -> Path:
    """File of a recipe: a path as it is, a name in ``$BEITCTL_RECIPES``, then among the bundled ones.

    Raises:
        UserError: no such file or name.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix == ".toml":
        raise UserError(f"{path}: no such recipe file")
    for folder in _folders():
        if (folder / f"{name}.toml").is_file():
            return folder / f"{name}.toml"
    known = names()
    close = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean '{close[0]}'?" if close else "."
    raise UserError(f"no recipe '{name}'{hint} There are {', '.join(known) or 'none'}; a file ends in .toml")


def bundled(name: str) -> Path:
    """File of a recipe that comes with beitctl, whatever else has its name."""
    return _bundled() / f"{name}.toml"


def references(table: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Where a plain table says ``"@KEY"``, and the key of the table that it refers to."""
    for place, text in _texts(table, keys):
        if text.startswith("@"):
            yield place, text[1:]


def schema() -> dict[str, Any]:
    """JSON Schema of a whole recipe with the stages that are installed, for editors."""
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {
        "recipe": _hoisted(Meta.model_json_schema(), {}, definitions),
        "summary": {
            "type": "object",
            "description": "What goes into summary.json: '@TABLE:path.to.metric' each.",
        },
        "data": {
            "type": "object",
            "description": "Sources under names; stages refer to them by '@data.NAME'.",
            "additionalProperties": _any_of_group("beitctl.sources", definitions),
        },
    }
    for name, found in _schemas(STAGES):
        definitions[f"stage-{name}"] = _hoisted(found, {}, definitions)
        one = {"$ref": f"#/$defs/stage-{name}"}
        properties[name] = {"anyOf": [one, {"type": "object", "additionalProperties": one}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "beitctl recipe",
        "type": "object",
        "properties": properties,
        "required": ["recipe"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def copy(source: str, target: Path, overrides: Sequence[str] = (), *, force: bool = False) -> None:
    """Write a recipe to a file of one's own, comments kept, with the overrides in it.

    Raises:
        RecipeError: the recipe with these overrides does not validate.
        UserError: no such recipe, or ``target`` exists and ``force`` is not set.
    """
    recipe = load(source, overrides)
    if target.exists() and not force:
        raise UserError(f"{target} exists already; choose another name, or overwrite it with --force")
    document = tomlkit.parse(recipe.text)
    for override in overrides:
        change = changes.read(override, changes.tomlkit_value)
        changes.apply(document, change.keys, change)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(tomlkit.dumps(document), encoding="utf-8")


def _default() -> Path:
    path = Path(DEFAULT)
    if not path.is_file():
        raise UserError(
            f"no recipe named and no {DEFAULT} here; give --recipe NAME of {', '.join(names()) or 'none'}; "
            f"or --recipe FILE; or make your own with: beitctl recipes copy NAME {DEFAULT}"
        )
    return path


def _folders() -> list[Path]:
    """Folders of recipes, the user's before the bundled one."""
    own = [Path(folder).expanduser() for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]
    for folder in own:
        if not folder.is_dir():
            raise UserError(f"{FOLDERS}: {folder} is no folder; correct the variable or unset it")
    return [*own, _bundled()]


def _bundled() -> Path:
    """Folder of the recipes that come with beitctl: in the package if installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}  is no UTF-8 text (byte {error.start}); save it as UTF-8"]) from None


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, line, column = str(error), text.count("\n") + 1, len(text) - text.rfind("\n")
        if found := re.search(r" \(at line (\d+), column (\d+)\)$", message):
            message, line, column = message[: found.start()], int(found[1]), int(found[2])
        raise RecipeError([f"{path}:{line}:{column}  no valid TOML: {message}"]) from None


def _checked(draft: Draft) -> tuple[dict[str, StageTable], dict[str, Any], dict[str, Any]]:
    """Validate everything; problems go to the draft."""
    meta: dict[str, Any] = {}
    try:
        meta = Meta.model_validate(draft.data.get("recipe", {})).model_dump()
    except ValidationError as error:
        for inner, message in explain(error, Meta, draft.data.get("recipe", {})):
            draft.problem(("recipe", *inner), message)
    lost = named_data.resolve(draft)
    found = {
        key: stage for stage in draft.data if stage not in OWN_TABLES for key in _stage_keys(draft, stage)
    }
    order = sorted(found, key=lambda key: (key not in draft.places, draft.places.get(key)))
    known = [dotted(key) for key in order]
    tables = {}
    for number, key in enumerate(order):
        references = _references(draft, key, known, number)
        plugin = _validated(draft, key, found[key], lost)
        if plugin is not None:
            table = _value(draft.data, key)
            tables[known[number]] = StageTable(known[number], found[key], table, plugin, references)
    if not set(draft.data) - set(OWN_TABLES):
        draft.problem(
            (), f"no stage; add a table such as [pretrain], one of {', '.join(registry.names(STAGES))}"
        )
    summary = draft.data.get("summary", {})
    _check_summary(draft, ("summary",), summary, known)
    return tables, meta, summary


def _stage_keys(draft: Draft, stage: str) -> list[Keys]:
    """Tables of one top-level key; none, and a problem, if it is no table of a usable stage."""
    if not isinstance(draft.data[stage], dict):
        draft.problem((stage,), f"must be a table, found {shown(draft.data[stage])}")
        return []
    installed = registry.names(STAGES)
    if stage not in installed:
        draft.problem((stage,), f"unknown stage{suggest(stage, [*installed, *OWN_TABLES])}")
        return []
    try:
        model = registry.get(STAGES, stage)
    except PluginError as error:
        draft.problem((stage,), str(error))
        return []
    keys = draft.stage_keys(stage, field_names(model))
    for key in keys:
        if not _TABLE_NAME.fullmatch(str(key[-1])):
            draft.problem(key, "must be named by letters, digits, - and _: the name becomes a folder")
    return keys


def _validated(draft: Draft, key: Keys, stage: str, lost: set[Keys]) -> Stage | None:
    model, table = registry.get(STAGES, stage), _value(draft.data, key)
    try:
        plugin: Stage = model.model_validate(table)
    except ValidationError as error:
        for keys, message in explain(error, model, table):
            if not named_data.at_fault((*key, *keys), lost):
                draft.problem((*key, *keys), message)
        return None
    return plugin


def _references(draft: Draft, key: Keys, known: list[str], number: int) -> tuple[str, ...]:
    """Keys of the tables that a table refers to; they must come before it, the ``number``-th of ``known``."""
    found: dict[str, None] = {}
    for keys, name in named_data.left(references(_value(draft.data, key), key)):
        value = f"@{name}"
        if name in known[:number]:
            found[name] = None
        elif name in known:
            draft.problem(
                keys, f"'{value}' is not earlier in the recipe; move [{name}] before [{dotted(key)}]"
            )
        else:
            draft.problem(
                keys, f"no table '{name}' to refer to{suggest(value, [f'@{n}' for n in known[:number]])}"
            )
    return tuple(found)


def _check_summary(draft: Draft, keys: Keys, value: Any, known: list[str]) -> None:
    """Check that every value is ``@TABLE:path``, a number, or ``@TABLE``, all numbers, of a known table."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_summary(draft, (*keys, key), inner, known)
        return
    table, colon, path = str(value).removeprefix("@").partition(":")
    if not isinstance(value, str) or not value.startswith("@") or bool(colon) != bool(path):
        draft.problem(keys, f"must be '@TABLE:path.to.metric' or '@TABLE', found {shown(value)}")
    elif table not in known:
        draft.problem(keys, f"no table '{table}'{suggest(table, known)}")


def _texts(value: Any, keys: Keys) -> Iterator[tuple[Keys, str]]:
    """Every text in a value, with its keys."""
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, (*keys, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, (*keys, index))


def _value(data: Any, keys: Keys) -> Any:
    for key in keys:
        data = data[key]
    return data


def _schemas(group: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON Schema of every plugin of a group; a broken plugin cannot be offered to the editor."""
    for name in registry.names(group):
        try:
            plugin = registry.get(group, name)
        except PluginError:
            continue
        yield name, plugin.model_json_schema()


def _hoisted(node: Any, scope: Mapping[str, str], definitions: dict[str, Any]) -> Any:
    """A JSON Schema whose own ``$defs`` moved to ``definitions``, and with the plugins that it may name.

    ``scope`` maps its references to the moved ones.
    """
    if isinstance(node, list):
        return [_hoisted(item, scope, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if GROUP_MARK in node:
        return _any_of_group(node[GROUP_MARK], definitions)
    local = node.get("$defs", {})
    moved = {name: f"{name}-{len(definitions) + place}" for place, name in enumerate(local)}
    scope = {**scope, **{f"#/$defs/{old}": f"#/$defs/{new}" for old, new in moved.items()}}
    definitions.update(dict.fromkeys(moved.values()))
    for name, inner in local.items():
        definitions[moved[name]] = _hoisted(inner, scope, definitions)
    return {
        key: scope.get(value, value) if key == "$ref" else _hoisted(value, scope, definitions)
        for key, value in node.items()
        if key != "$defs"
    }


def _any_of_group(group: str, definitions: dict[str, Any]) -> dict[str, str]:
    """Reference to the definition of a group: any of its plugins, told apart by ``kind``."""
    if group not in definitions:
        choices: list[Any] = []
        definitions[group] = {"anyOf": choices} if registry.names(group) else {"type": "object"}
        if group == "beitctl.sources":
            choices.append({"type": "string", "pattern": r"^@data\."})
        for name, found in _schemas(group):
            found["properties"] = {"kind": {"const": name}} | found.get("properties", {})
            found["required"] = ["kind", *found.get("required", [])]
            choices.append(_hoisted(found, {}, definitions))
    return {"$ref": f"#/$defs/{group}"}
