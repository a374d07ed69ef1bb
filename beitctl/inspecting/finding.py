"""From a path to the source that reads it: every installed source is asked, the surest wins.

A folder that ``beitctl data pack`` made says itself how it is read.
"""

import errno
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError

from beitctl import overrides, registry
from beitctl.api import Examples
from beitctl.errors import PluginError, UserError
from beitctl.inspecting.journal import packed
from beitctl.problems import explain
from beitctl.toml_places import dotted

GROUP = "beitctl.sources"
EMBEDDED = "embedded"
"""Word that stands for the data that come with beitctl, in place of a path."""
COUNTED_FILES = 100_000
"""A folder in which no layout is found is counted up to this number of files."""


@dataclass(frozen=True)
class Found:
    """A source that reads a path."""

    kind: str
    table: Mapping[str, Any]
    """Its settings, without ``kind``."""
    source: Any
    """The source itself, not opened yet."""
    also: tuple[str, ...] = ()
    """Kinds that were as sure and come later in the alphabet."""
    warnings: tuple[str, ...] = ()
    """Sources that could not be asked, and why."""

    @property
    def line(self) -> str:
        """The line that makes a recipe read the same."""
        return recipe_line(self.kind, self.table)

    def open(self) -> Examples:
        """Open the source."""
        examples: Examples = self.source.open()
        return examples


def recipe_line(kind: str, table: Mapping[str, Any]) -> str:
    """A source as one line of TOML: ``source = { kind = "...", path = "..." }``."""
    cells = [f"{key} = {tomlkit.item(_toml(value)).as_string()}" for key, value in table.items()]
    return f"source = {{ {', '.join([f'kind = {json.dumps(kind)}', *cells])} }}"


def find(path: str, kind: str | None = None, settings: Sequence[str] = ()) -> Found:
    """The source that reads a path.

    Args:
        path: a file or folder, or the word ``embedded``; with ``kind`` whatever that source reads.
        kind: name of the source; None asks all of them.
        settings: changes of its table, ``KEY=VALUE`` each, where VALUE is TOML.

    Raises:
        UserError: there is nothing at the path, no source reads it, or a setting is wrong.
    """
    warnings: list[str] = []
    also: tuple[str, ...] = ()
    if path == EMBEDDED and kind in (None, EMBEDDED):
        kind, table = EMBEDDED, {}
    elif kind is not None:
        table = _table(kind, path)
    elif (known := packed(_existing(path))) is not None:
        kind, table = str(known.pop("kind")), known
    else:
        place = _existing(path)
        guesses = _guesses(place, warnings)
        if not guesses:
            raise UserError("\n".join([_unknown(place), *warnings]))
        surest = max(guesses.values(), key=lambda guess: guess[0])[0]
        best = sorted(name for name, (certainty, _) in guesses.items() if certainty == surest)
        kind, also, table = best[0], tuple(best[1:]), guesses[best[0]][1]
    table = _changed(table, settings)
    return Found(kind, table, _validated(kind, table), also, tuple(warnings))


def _toml(value: Any) -> Any:
    """A value as TOML can hold it."""
    if isinstance(value, Mapping):
        inner = tomlkit.inline_table()
        inner.update({key: _toml(item) for key, item in value.items()})
        return inner
    if isinstance(value, list | tuple):
        return [_toml(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def _existing(path: str) -> Path:
    place = Path(path).expanduser()
    try:
        place.stat()
        if place.is_dir():
            os.scandir(place).close()
        elif not os.access(place, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file or folder; correct it, write '{EMBEDDED}' for the data that come with "
            "beitctl, or name a source that reads other things with --kind (hub: a name such as owner/name)"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
    return place


def _guesses(place: Path, warnings: list[str]) -> dict[str, tuple[int, dict[str, Any]]]:
    """How sure each source is, and with which table; those that cannot be asked are warnings."""
    found = {}
    for name in registry.names(GROUP):
        try:
            guess = _guess(registry.get(GROUP, name), place)
        except PluginError as error:
            warnings.append(f"warning: {error}")
            continue
        except Exception as error:  # a third party's code is asked here: anything can happen
            warnings.append(
                f"warning: source '{name}' ({registry.origin(GROUP, name)}) cannot say whether it reads "
                f"{place}: {type(error).__name__}: {error}"
            )
            continue
        if guess is not None:
            found[name] = guess
    return found


def _guess(plugin: Any, place: Path) -> tuple[int, dict[str, Any]] | None:
    """What a source says of a path; None if it does not know it, or has no opinion."""
    method = getattr(plugin, "guess", None)
    guess = method(place) if callable(method) else None
    if guess is None:
        return None
    certainty, table = guess
    return int(certainty), {str(key): value for key, value in dict(table).items() if key != "kind"}


def _table(kind: str, path: str) -> dict[str, Any]:
    """The table with which a named source reads a path."""
    plugin = registry.get(GROUP, kind)
    place = Path(path).expanduser()
    if os.path.lexists(place):
        try:
            guess = _guess(plugin, place)
        except Exception:  # its opinion is not needed: it was named
            guess = None
        if guess is not None:
            return guess[1]
    fields = getattr(plugin, "model_fields", {})
    if "path" in fields:
        return {"path": path}
    required = [name for name, field in fields.items() if field.is_required()]
    if len(required) == 1:
        return {required[0]: path}
    raise UserError(f"the source '{kind}' has no setting 'path'; give what it needs with --set")


def _changed(table: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A table with the changes of ``--set``."""
    changed = dict(table)
    for text in settings:
        try:
            change = overrides.read(text)
            if change.keys[0] == "kind":
                raise ValueError("the source is named with --kind")
            overrides.apply(changed, change.keys, change)
        except ValueError as error:
            message = str(error).replace("pretrain.train.steps=100", 'labels="folders"')
            raise UserError(f"--set {text}: {message}") from None
    return changed


def _validated(kind: str, table: Mapping[str, Any]) -> Any:
    plugin = registry.get(GROUP, kind)
    try:
        return plugin.model_validate(table)
    except ValidationError as error:
        lines = [f"{dotted(keys)}: {text}" if keys else text for keys, text in explain(error, plugin, table)]
        start = f"source '{kind}', {recipe_line(kind, table)}"
        raise UserError("".join([start, *(f"\n  {line}" for line in lines)])) from None


def _unknown(place: Path) -> str:
    """That no source knows a path: what lies there, and what could."""
    lines = [f"{place}: no source knows this layout. Found: {contents(place)}. There are:"]
    names = registry.names(GROUP)
    width = max(map(len, names), default=0)
    for name in names:
        try:
            about = (registry.get(GROUP, name).__doc__ or "").strip().partition("\n")[0].replace("``", "")
        except PluginError:
            about = "(broken)"
        lines.append(f"  {name:<{width}}  {about}")
    lines.append(
        "Correct the path, or name one with --kind NAME and --set KEY=VALUE; docs/data.md shows each"
    )
    return "\n".join(lines)


def contents(place: Path) -> str:
    """Numbers of files by ending, such as ``12 .txt, 3 .doc in 4 folders``."""
    if not place.is_dir():
        return f"a file that ends in {place.suffix}" if place.suffix else "a file without an ending"
    endings: Counter[str] = Counter()
    folders = 0
    for _, _, files in os.walk(place):
        folders += 1
        endings.update(Path(name).suffix.lower() or "without an ending" for name in files)
        if endings.total() > COUNTED_FILES:
            break
    if not endings:
        return f"no file in {folders} folder{'s' if folders > 1 else ''}"
    shown = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(10))
    more = f" and {len(endings) - 10} other endings" if len(endings) > 10 else ""
    rest = " at least" if endings.total() > COUNTED_FILES else ""
    return f"{shown}{more} in{rest} {folders:,} folder{'s' if folders > 1 else ''}"
