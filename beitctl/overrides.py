"""Overrides of a recipe: ``KEY=VALUE``, ``KEY+=VALUE`` and ``KEY=!``."""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tomlkit
from tomlkit.exceptions import TOMLKitError

from beitctl.problems import shown, suggest
from beitctl.toml_places import Keys, dotted, dotted_key


@dataclass(frozen=True)
class Change:
    """One override, read."""

    keys: Keys
    action: Literal["=", "+=", "=!"]
    """Set, append to a list, or remove."""
    value: Any


def toml_value(text: str) -> Any:
    """The TOML value that a text is, or else the text itself."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["value"] if list(found) == ["value"] else text


def tomlkit_value(text: str) -> Any:
    """As ``toml_value``, but it keeps how the value was written."""
    try:
        found = tomlkit.parse(f"value = {text}")
    except TOMLKitError:
        return text
    return found["value"] if list(found) == ["value"] else text


def read(text: str, parse: Callable[[str], Any] = toml_value) -> Change:
    """Read ``KEY=VALUE``, ``KEY+=VALUE`` or ``KEY=!``.

    Raises:
        ValueError: it is none of them.
    """
    try:
        parts, end = dotted_key(text)
    except ValueError:
        parts, end = [], 0
    rest, keys = text[end:].strip(), tuple(name for name, _ in parts)
    if keys and rest == "=!":
        return Change(keys, "=!", None)
    if keys and rest.startswith("+="):
        return Change(keys, "+=", parse(rest[2:].strip()))
    if keys and rest.startswith("="):
        return Change(keys, "=", parse(rest[1:].strip()))
    raise ValueError("expected KEY=VALUE such as pretrain.train.steps=100, KEY+=VALUE or KEY=!")


def apply(data: Any, keys: Keys, change: Change) -> Keys:
    """Change ``data`` in place; returns the keys of what changed, list entries as numbers.

    Raises:
        ValueError: there is nothing at these keys that can be changed so.
    """
    path: Keys = ()
    node = data
    for key in keys[:-1]:
        step = _step(node, str(key), path)
        if isinstance(node, dict) and step not in node:
            node[step] = {}
        node, path = node[step], (*path, step)
    last = _step(node, str(keys[-1]), path)
    path = (*path, last)
    absent = isinstance(node, dict) and last not in node
    if change.action == "=":
        node[last] = change.value
    elif change.action == "+=":
        if absent:
            node[last] = []
        if not isinstance(node[last], list):
            raise ValueError(f"'{dotted(keys)}' is {shown(node[last])}, no list to append to")
        node[last].append(change.value)
        path = (*path, len(node[last]) - 1)
    elif absent:
        raise ValueError(f"nothing to remove: no key '{last}'{suggest(str(last), map(str, node))}")
    else:
        del node[last]
    return path


def _step(node: Any, key: str, above: Keys) -> str | int:
    """The key or the number of the list entry that ``key`` means inside ``node``."""
    if isinstance(node, list):
        if not key.isdecimal() or int(key) >= len(node):
            raise ValueError(f"'{dotted(above)}' is a list of {len(node)}: '{key}' is no entry, count from 0")
        return int(key)
    if isinstance(node, dict):
        return key
    raise ValueError(f"'{dotted(above)}' is {shown(node)}, no table")
