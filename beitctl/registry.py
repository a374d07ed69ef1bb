"""Plugins by name, from entry points; only what is asked for is imported."""

import difflib
import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from beitctl.errors import PluginError

GROUPS: dict[str, tuple[str, ...]] = {
    "beitctl.stages": ("run", "plan"),
    "beitctl.tasks": ("heads", "prepare", "terms", "loss", "output"),
    "beitctl.sources": ("open",),
    "beitctl.tokenizers": ("load",),
    "beitctl.teachers": ("open",),
}
"""Entry-point group to the methods that a plugin of the group must have."""


@functools.cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    return tuple(sorted(entry_points(group=group), key=lambda entry: entry.name))


def names(group: str) -> list[str]:
    """Names of the installed plugins of a group; imports nothing."""
    return sorted({entry.name for entry in _entries(group)})


def name_of(group: str, plugin: type) -> str:
    """Name under which a plugin class is installed; imports others only if it is told of by another module.

    Raises:
        PluginError: it is not.
    """
    told = f"{plugin.__module__}:{plugin.__qualname__}"
    for entry in _entries(group):
        if entry.value == told:
            return entry.name
    for name in names(group):
        if get(group, name) is plugin:
            return name
    raise PluginError(f"{plugin.__name__} is not installed in {group}")


def origin(group: str, name: str) -> str:
    """Distribution and version that a plugin comes from, such as ``acme-beit 0.3``."""
    found = [entry.dist for entry in _entries(group) if entry.name == name]
    return ", ".join(f"{dist.name} {dist.version}" if dist else "unknown" for dist in found)


def get(group: str, name: str) -> Any:
    """Import one plugin class.

    Raises:
        PluginError: no such name (with the closest match), a name installed by two distributions, a module
            that fails to import, or a class that lacks a method of its group.
    """
    found = [entry for entry in _entries(group) if entry.name == name]
    if not found:
        close = difflib.get_close_matches(name, names(group), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "."
        raise PluginError(f"no '{name}' in {group}{hint} Installed: {', '.join(names(group)) or 'none'}.")
    if len(found) > 1:
        raise PluginError(
            f"'{name}' in {group} is installed by {origin(group, name)}; uninstall all but one of them"
        )
    try:
        plugin = found[0].load()
    except Exception as error:  # a third party's code is loaded here: anything can happen
        raise PluginError(
            f"plugin '{name}' ({origin(group, name)}) cannot be imported: {type(error).__name__}: {error}"
        ) from error
    missing = [method for method in GROUPS[group] if not callable(getattr(plugin, method, None))]
    if missing:
        raise PluginError(
            f"plugin '{name}' ({origin(group, name)}) is no {group.rpartition('.')[2]} plugin: "
            f"it has no method {', '.join(missing)}"
        )
    return plugin
