"""Conditions on metrics that a stage must meet: ``require = ["accuracy>=0.6"]``, ``--require``."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from beitctl.errors import CheckFailed, UserError

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
REQUIREMENT = re.compile(rf"^\s*([\w./@-](?:[\w ./@()-]*[\w./@()-])?)\s*(>=|<=|>|<)\s*({NUMBER})\s*$")


def _readable(value: list[str]) -> list[str]:
    for condition in value:
        if not REQUIREMENT.match(condition):
            raise ValueError(f"'{condition}' is no condition; write METRIC>=NUMBER, or with > < <=")
    return value


Require = Annotated[list[str], AfterValidator(_readable)]


def check(metrics: Mapping[str, Any], require: Sequence[str]) -> None:
    """Hold metrics against conditions.

    Raises:
        UserError: there is no such metric.
        CheckFailed: a condition does not hold; all of them are named.
    """
    missed = []
    for condition in require:
        name, sign, bound = REQUIREMENT.match(condition).groups()  # type: ignore[union-attr]
        if not isinstance(metrics.get(name), int | float):
            known = [key for key, value in metrics.items() if isinstance(value, int | float)]
            raise UserError(f"require: no metric '{name}'; there are {', '.join(known)}")
        value, limit = float(metrics[name]), float(bound)
        holds = {">=": value >= limit, "<=": value <= limit, ">": value > limit, "<": value < limit}[sign]
        if not holds:
            missed.append(f"{condition} (found {value:.4g})")
    if missed:
        raise CheckFailed("required but not so: " + "; ".join(missed))
