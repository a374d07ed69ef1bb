"""The table ``[data]`` of a recipe: sources under names, which stages refer to by ``"@data.NAME"``.

A reference means the table itself, as if it stood in its place. Named sources may refer to earlier ones.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from beitctl.api import SourceField
from beitctl.draft import Draft
from beitctl.problems import explain, shown, suggest
from beitctl.toml_places import Keys

TABLE = "data"
PREFIX = f"@{TABLE}."


class _Named(BaseModel):
    source: SourceField


def resolve(draft: Draft) -> set[Keys]:
    """Check the named sources of a draft and put them where its stages refer to them.

    Problems go to the draft. Returns the keys of references that have no source to stand for.
    """
    lost: set[Keys] = set()
    usable = _checked(draft, lost)
    for stage, table in draft.data.items():
        if stage != TABLE:
            draft.data[stage] = _replaced(table, (stage,), usable, draft, lost)
    return lost


def _checked(draft: Draft, lost: set[Keys]) -> dict[str, dict[str, Any] | None]:
    """The named tables, which may refer to those before them; None in place of one with problems."""
    data = draft.data.get(TABLE, {})
    if not isinstance(data, Mapping):
        draft.problem((TABLE,), f"must be a table of named sources, found {shown(data)}")
        return {}
    found: dict[str, dict[str, Any] | None] = {}
    for name, given in data.items():
        table = _replaced(given, (TABLE, name), found, draft, lost)
        found[name] = None
        if not isinstance(table, Mapping) or "kind" not in table:
            draft.problem((TABLE, name), f'must be a source: a table with kind = "...", found {shown(table)}')
            continue
        try:
            _Named.model_validate({"source": table})
            found[name] = dict(table)
        except ValidationError as error:
            for keys, message in explain(error, _Named, {"source": table}):
                if not at_fault((TABLE, name, *keys[1:]), lost):
                    draft.problem((TABLE, name, *keys[1:]), message)
    return found


def _replaced(
    value: Any, keys: Keys, known: Mapping[str, dict[str, Any] | None], draft: Draft, lost: set[Keys]
) -> Any:
    """A value with the tables that it refers to."""
    if isinstance(value, Mapping):
        return {key: _replaced(inner, (*keys, key), known, draft, lost) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, (*keys, place), known, draft, lost) for place, inner in enumerate(value)]
    if not isinstance(value, str) or not value.startswith(PREFIX):
        return value
    name = value.removeprefix(PREFIX)
    if name not in known:
        hint = suggest(value, [PREFIX + other for other in known])
        draft.problem(keys, f"no source '{name}' in [{TABLE}]{hint}")
    table = known.get(name)
    if table is None:
        lost.add(keys)
        return value
    return copy.deepcopy(table)


def at_fault(keys: Keys, lost: set[Keys]) -> bool:
    """Whether a problem at some keys follows from a reference that has no source to stand for."""
    return any(keys[: len(reference)] == reference for reference in lost)


def left(references: Iterator[tuple[Keys, str]]) -> Iterator[tuple[Keys, str]]:
    """The references of a table without those to named sources, which were told of already."""
    return ((keys, name) for keys, name in references if not f"@{name}".startswith(PREFIX))
