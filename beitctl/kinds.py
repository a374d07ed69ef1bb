"""The two classes that make a plugin: its base, and the mark of a field that holds one.

Nothing here imports torch. Read them as ``beitctl.api.Plugin`` and ``beitctl.api.Kind``.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from beitctl import registry
from beitctl.errors import PluginError


class Plugin(BaseModel):
    """Base of every plugin: frozen, unknown keys are errors, field docstrings are the help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


GROUP_MARK = "x-beitctl-group"
"""Key of a JSON Schema that says which group's plugins a table may name."""


@dataclass(frozen=True)
class Kind:
    """Marks a field whose table names a plugin: ``{ kind = "name", ... }``."""

    group: str
    needs: tuple[str, ...] = ()
    """Methods that the plugin must have, besides those of its group."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate a table by the class that its ``kind`` names; a plugin object passes as it is."""
        return core_schema.no_info_plain_validator_function(
            self._validate, serialization=core_schema.plain_serializer_function_ser_schema(self._dump)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """A table with an installed name as its ``kind``; ``beitctl.recipe.schema`` adds the fields."""
        names = registry.names(self.group)
        return {
            "type": "object",
            "properties": {"kind": {"enum": names}},
            "required": ["kind"],
            GROUP_MARK: self.group,
        }

    def _validate(self, value: Any) -> Any:
        if isinstance(value, Plugin):
            return value
        noun = self.group.rpartition(".")[2].removesuffix("s")
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
            raise PydanticCustomError(
                "kind_missing",
                "expected a table with kind = one of {names}, which names the {noun}",
                {"names": ", ".join(registry.names(self.group)), "noun": noun},
            )
        try:
            plugin = registry.get(self.group, value["kind"])
        except PluginError as error:
            raise PydanticCustomError("kind_unknown", "{text}", {"text": str(error)}) from error
        missing = [method for method in self.needs if not callable(getattr(plugin, method, None))]
        if missing:
            raise PydanticCustomError(
                "kind_unfit",
                "the {noun} '{name}' has no method {what}, which is needed here",
                {"noun": noun, "name": value["kind"], "what": ", ".join(missing)},
            )
        return plugin.model_validate({key: item for key, item in value.items() if key != "kind"})

    def _dump(self, value: Any) -> dict[str, Any]:
        try:
            kind = registry.name_of(self.group, type(value))
        except PluginError:
            kind = type(value).__name__
        return {"kind": kind, **value.model_dump(mode="json")}
