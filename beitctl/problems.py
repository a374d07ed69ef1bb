"""What pydantic found wrong with a table, in words for the person who wrote it."""

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from beitctl import registry
from beitctl.api import Kind
from beitctl.errors import PluginError
from beitctl.toml_places import Keys

NOUNS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
}
EXPECTED = {
    "int_type": NOUNS[int],
    "int_parsing": NOUNS[int],
    "int_from_float": NOUNS[int],
    "float_type": NOUNS[float],
    "float_parsing": NOUNS[float],
    "string_type": NOUNS[str],
    "bool_type": NOUNS[bool],
    "bool_parsing": NOUNS[bool],
    "list_type": NOUNS[list],
    "tuple_type": NOUNS[list],
    "dict_type": "a table",
    "model_type": "a table",
    "dataclass_type": "a table",
}
"""Pydantic's error types to what the value must be."""
MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")
FIELD = re.compile(r"([\w.]+) \((.*?)\) (must .*)", re.DOTALL)
"""How the check of a whole table names the one setting that is wrong, and its value."""
_ABSENT = object()


class Hint(NamedTuple):
    """The type of a field with what ``Annotated`` attaches to it."""

    type: Any
    marks: tuple[Any, ...] = ()


def explain(error: ValidationError, model: Any, table: Mapping[str, Any]) -> list[tuple[Keys, str]]:
    """Every problem of a table that ``model`` refused: the keys down to it, and what is wrong."""
    found = []
    for detail in error.errors(include_url=False):
        keys = _keys(detail["loc"], table)
        if detail["type"] == "kind_unknown":
            keys = (*keys, "kind")
        found.append(_at_field(keys, _message(detail, keys, model, table), model, table))
    return found


def _at_field(keys: Keys, message: str, model: Any, table: Mapping[str, Any]) -> tuple[Keys, str]:
    """A problem of a table at the setting that its message names, if it names one."""
    named = FIELD.fullmatch(message)
    names = named[1].split(".") if named else [""]
    if named is None or names[0] not in _fields(_opened(*_hint_at(keys, model, table))):
        return keys, message
    return (*keys, *names), f"{named[3]}, found {named[2]}"


def field_names(model: Any) -> list[str]:
    """Names of the settings of a plugin or a settings class."""
    return list(_fields(model))


def suggest(name: str, known: Iterable[str]) -> str:
    """``, did you mean 'steps'?`` if a known name is close, else the known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f", did you mean '{close[0]}'?"
    return f"; there are {', '.join(known)}" if known else ""


def shown(value: Any) -> str:
    """A value as it is named in a message: ``the text "fast"``, ``the number 3``, ``a table``."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return f'the text "{value}"'
        case int() | float():
            return f"the number {value}"
        case Mapping():
            return "a table"
        case list():
            return "a list" if value else "an empty list"
    return str(value)


def _keys(location: tuple[int | str, ...], table: Mapping[str, Any]) -> Keys:
    """A pydantic location without its names of union members."""
    keys: Keys = ()
    value: Any = table
    for place, part in enumerate(location):
        below = _below(value, part)
        if below is _ABSENT and not (place == len(location) - 1 and isinstance(value, Mapping)):
            continue
        keys, value = (*keys, part), below
    return keys


def _below(value: Any, part: int | str) -> Any:
    if isinstance(value, Mapping):
        return value.get(part, _ABSENT)
    if isinstance(value, list) and isinstance(part, int) and part < len(value):
        return value[part]
    return _ABSENT


def _message(detail: ErrorDetails, keys: Keys, model: Any, table: Mapping[str, Any]) -> str:
    kind, message, value = detail["type"], detail["msg"], detail["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        opened = _opened(*_hint_at(keys[:-1], model, table))
        return f"unknown key{suggest(str(keys[-1]), field_names(opened))}"
    if kind in (*MISSING, "too_long") and (wrong := _number_of_entries(keys, model, table)):
        return wrong
    if kind in MISSING:
        return f"missing key, expected {_noun(_hint_at(keys, model, table)[0])}"
    if kind in EXPECTED:
        return f"must be {EXPECTED[kind]}, found {shown(value)}"
    if kind == "literal_error":
        allowed = [str(choice).strip("'") for choice in _choices(_hint_at(keys, model, table)[0])]
        return f"must be one of {', '.join(map(repr, allowed))}, found {shown(value)}"
    if message.startswith("Input should be "):
        return f"must be {message.removeprefix('Input should be ')}, found {shown(value)}"
    return message.removeprefix("Value error, ").removeprefix("Assertion failed, ")


def _number_of_entries(keys: Keys, model: Any, table: Mapping[str, Any]) -> str:
    """What is wrong with the length of a list of which every entry has its meaning; empty if it is none."""
    hint, value = _hint_at(keys, model, table)
    opened = _opened(hint, value)
    if get_origin(opened) is not tuple or not isinstance(value, list):
        return ""
    return f"must be a list of {len(get_args(opened))} entries, found one of {len(value)}"


def _hint_at(keys: Keys, model: Any, table: Any) -> tuple[Hint, Any]:
    """Type and value at some keys below a model."""
    hint = Hint(model)
    for part in keys:
        hint, table = _child(hint, table, part), _below(table, part)
    return hint, table


def _child(hint: Hint, value: Any, part: int | str) -> Hint:
    opened = _opened(hint, value)
    fields = _fields(opened)
    if part in fields:
        return fields[str(part)]
    inner = get_args(opened)
    if not inner:
        return Hint(None)
    return Hint(inner[0] if isinstance(part, int) else inner[-1])


def _opened(hint: Hint, value: Any) -> Any:
    """Class or container behind a type: a table's plugin, the part of a union that has fields."""
    for mark in hint.marks:
        if isinstance(mark, Kind):
            return _plugin(mark, value)
    origin, inner = get_origin(hint.type), get_args(hint.type)
    if origin is Annotated:
        return _opened(Hint(inner[0], inner[1:]), value)
    if origin in (Union, types.UnionType):
        opened = [_opened(Hint(choice), value) for choice in inner]
        return next((choice for choice in opened if _fields(choice) or get_args(choice)), opened[0])
    return hint.type


def _plugin(mark: Kind, value: Any) -> Any:
    try:
        return registry.get(mark.group, value["kind"])
    except (PluginError, KeyError, TypeError):
        return None


def _fields(model: Any) -> dict[str, Hint]:
    """Fields of a pydantic model or a dataclass; of anything else none."""
    if not isinstance(model, type):
        return {}
    if issubclass(model, BaseModel):
        return {name: Hint(f.annotation, tuple(f.metadata)) for name, f in model.model_fields.items()}
    if dataclasses.is_dataclass(model):
        hints = get_type_hints(model, include_extras=True)
        return {f.name: Hint(hints[f.name]) for f in dataclasses.fields(model) if f.init}
    return {}


def _choices(hint: Hint) -> tuple[Any, ...]:
    """Values that a ``Literal`` allows, also inside a union."""
    if get_origin(hint.type) is Literal:
        return get_args(hint.type)
    return tuple(value for inner in get_args(hint.type) for value in _choices(Hint(inner)))


def _noun(hint: Hint) -> str:
    """What a field takes, such as ``a whole number``."""
    if choices := _choices(hint):
        return f"one of {', '.join(map(repr, choices))}"
    return NOUNS.get(get_origin(hint.type) or hint.type, "a table")
