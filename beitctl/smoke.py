"""``--smoke``: tables of one stage at toy size on embedded data, with what they need from the recipe tiny.

Everything happens on plain tables; what comes out is a recipe like any other.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomlkit

from beitctl import recipe, registry
from beitctl.draft import STAGES, Draft
from beitctl.errors import PluginError, UserError
from beitctl.recipe import Recipe

PARENTS = "tiny"
"""The bundled recipe whose tables stand in for those of other stages."""
Table = dict[str, Any]
"""One table of a recipe as TOML data."""


def shrunk(full: Recipe, stage: str, keys: Sequence[str], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe ``NAME-smoke``: some tables of a stage at toy size, and all that they refer to.

    Args:
        full: a recipe that validates, as it is in its file.
        stage: the stage to try out.
        keys: its tables that are asked for.
        overrides: ``--set``, applied to the small tables.

    Raises:
        UserError: the stage offers no toy size, or refers to what the recipe tiny has not.
        RecipeError: the small tables do not validate; every problem there is, one line each.
    """
    own = _own(full, stage, keys, _shrinker(stage))
    outside = [name for table in own.values() for _, name in recipe.references(table) if name not in own]
    data = {
        "recipe": {"summary": f"{full.meta['summary']}, at toy size"},
        **_nested({**_parents(outside, stage), **own}),
    }
    name = f"{full.name}-smoke"
    text = tomlkit.dumps(data)  # before --set, as of every recipe
    made = recipe.build(Draft(Path(name), data, {}), text, overrides, stage=stage)
    return replace(made, name=name, path=full.path)


def _shrinker(stage: str) -> Callable[[Mapping[str, Any]], Table]:
    shrink = _offered(stage)
    if shrink is None:
        able = [name for name in registry.names(STAGES) if _offered(name)]
        raise UserError(
            f"--smoke: the stage {stage} has no toy size; stages that have one: {', '.join(able) or 'none'}"
        )
    return shrink


def _offered(stage: str) -> Callable[[Mapping[str, Any]], Table] | None:
    """How a stage makes its tables small; None if it cannot, or cannot be used at all."""
    try:
        found: Any = getattr(registry.get(STAGES, stage), "smoke", None)
    except PluginError:
        return None
    return found if callable(found) else None


def _own(
    full: Recipe, stage: str, keys: Sequence[str], shrink: Callable[[Mapping[str, Any]], Table]
) -> dict[str, Table]:
    """Small tables of the stage: those asked for and those that they refer to, in the order of the recipe."""
    same = [key for key, table in full.tables.items() if table.stage == stage]
    found: dict[str, Table] = {}
    waiting = list(keys)
    while waiting:
        key = waiting.pop()
        if key not in found:
            found[key] = shrink(copy.deepcopy(full.tables[key].table))
            waiting += [name for _, name in recipe.references(found[key]) if name in same]
    return {key: found[key] for key in same if key in found}


def _parents(names: Iterable[str], stage: str) -> dict[str, Table]:
    """Tables of the recipe tiny, with all that they refer to, in its order.

    Raises:
        UserError: it has no such table, or only in the stage that is tried out.
    """
    tiny = recipe.load(str(recipe.bundled(PARENTS)))
    usable = [key for key, table in tiny.tables.items() if table.stage != stage]
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        key = waiting.pop()
        if key not in usable:
            raise UserError(
                f"--smoke: nothing stands in for '@{key}'; refer to a table that the recipe {PARENTS} has, "
                f"one of {', '.join(usable)}"
            )
        found.add(key)
        waiting += [name for name in tiny.tables[key].references if name not in found]
    return {key: table.table for key, table in tiny.tables.items() if key in found}


def _nested(tables: Mapping[str, Table]) -> Table:
    """Tables by key as a recipe holds them: ``finetune.retrieval`` inside ``finetune``."""
    data: Table = {}
    for key, table in tables.items():
        stage, _, name = key.partition(".")
        if name:
            data.setdefault(stage, {})[name] = table
        else:
            data[stage] = table
    return data
