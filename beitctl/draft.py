"""A recipe on its way to be checked: its data, its problems, and where in the file they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beitctl import overrides, registry
from beitctl.errors import RecipeError
from beitctl.problems import field_names, suggest
from beitctl.toml_places import Keys, dotted

STAGES = "beitctl.stages"
OWN_TABLES = ("recipe", "summary", "data")


@dataclass
class Draft:
    """A recipe while it is checked; collects problems and knows where each of them is."""

    path: Path
    data: dict[str, Any]
    places: dict[Keys, tuple[int, int]]
    given: dict[Keys, str] = field(default_factory=dict)
    """Overrides by the keys that they changed."""
    problems: list[tuple[tuple[int, int], str]] = field(default_factory=list)

    def override(self, text: str, stage: str | None) -> None:
        """Apply one ``--set``."""
        try:
            change = overrides.read(text)
            keys = self._full(change.keys, stage)
            self.given[overrides.apply(self.data, keys, change)] = text
        except ValueError as error:
            self.problems.append(((0, 0), f"--set {text}  {error}"))

    def problem(self, keys: Keys, message: str) -> None:
        """Remember one problem of the value at some keys."""
        place, where = self._where(keys)
        joint = ": " if keys else ""
        if message.startswith("must "):
            joint = " "
        self.problems.append((place, f"{where}  {dotted(keys)}{joint}{message}"))

    def raise_problems(self) -> None:
        """Raise all problems, those of the file in its order."""
        if self.problems:
            raise RecipeError([line for _, line in sorted(self.problems, key=lambda item: item[0])])

    def stage_keys(self, stage: str, fields: Sequence[str]) -> list[Keys]:
        """Keys of the tables of a stage: itself, or the named tables in it."""
        group = self.data[stage]
        named = isinstance(group, dict) and group and all(isinstance(value, dict) for value in group.values())
        return [(stage, name) for name in group] if named and not set(group) & set(fields) else [(stage,)]

    def _where(self, keys: Keys) -> tuple[tuple[int, int], str]:
        above = [keys[:end] for end in range(len(keys), 0, -1)]
        for known in above:
            if known in self.given:
                return (0, 0), f"--set {self.given[known]}"
        for known in above:
            if known in self.places:
                line, column = self.places[known]
                return (line, column), f"{self.path}:{line}:{column}"
        return (0, 0), str(self.path)

    def _full(self, keys: Keys, stage: str | None) -> Keys:
        """Keys from the top: as they are, or within the table of ``stage``."""
        first = str(keys[0])
        if first in self.data or first in OWN_TABLES:
            return keys
        known = list(self.data)
        if stage in self.data and stage is not None:
            fields = field_names(registry.get(STAGES, stage))
            tables = self.stage_keys(stage, fields)
            if (stage, first) in tables:
                return (stage, *keys)
            if first in fields:
                if len(tables) > 1:
                    options = ", ".join(f"{dotted(table)}.{first}" for table in tables)
                    raise ValueError(f"'{first}' is in several tables; write one of {options}")
                return (*tables[0], *keys)
            known += fields
        raise ValueError(f"no table '{first}'{suggest(first, known)}")
