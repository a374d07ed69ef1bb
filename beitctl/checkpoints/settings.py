"""Settings of a model that somebody wrote by hand: in a call, in a recipe, in a ``config.json``."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Literal, get_args, get_origin, get_type_hints

from beitctl.config import ModelConfig
from beitctl.problems import NOUNS, shown

HINTS: dict[str, Any] = get_type_hints(ModelConfig)
"""Types of the settings by their names."""


def unknown(settings: Mapping[str, Any]) -> list[str]:
    """Names that no setting has."""
    return sorted(str(name) for name in settings if name not in HINTS)


def mistyped(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the types of settings, one text each: ``ModelConfig`` itself takes any."""
    return [
        f"{name} must be {_noun(HINTS[name])}, found {shown(value)}"
        for name, value in settings.items()
        if name in HINTS and not _fits(value, HINTS[name])
    ]


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is bool:
        return isinstance(value, bool)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool) and isfinite(value)
    pair = hint is not int and isinstance(value, tuple | list) and len(value) == 2
    return all(map(_whole, value)) if pair else _whole(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _noun(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    return NOUNS.get(hint, "a whole number or (height, width)")
