"""The settings of a table as one flat mapping, and which of them change no result."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from beitctl.config import TrainConfig

FREE = frozenset(
    {
        # when and how the state is saved
        "save_every_steps", "save_every_minutes", "keep_checkpoints", "keep_every_hours", "async_save",
        # what is written about the run
        "log_every_steps", "log_samples", "profile",
        # when a process ends that can go on later
        "max_minutes", "hang_minutes",
        # how the same work is dealt out, as the number of processes itself
        "workers", "shard_ranks",
    }
)  # fmt: skip
"""Fields of ``TrainConfig`` with which a run does the same steps on the same samples: two runs that differ
in nothing else are one. Those that change the last bits of a sum (``compile``, ``attention_backend``,
``recompute``, ``memory_budget``, ``micro_samples``) are not among them."""


def flat(plugin: Any) -> dict[str, Any]:
    """Every setting of a table by its dotted key, defaults included, as JSON holds it."""
    return dict(_flat(plugin.model_dump(mode="json")))


def lasting(plugin: Any) -> dict[str, Any]:
    """Those settings of a table that make a run another run."""
    free = {f"{place}.{name}" if place else name for place in trainings(plugin) for name in FREE}
    return {
        key: value
        for key, value in flat(plugin).items()
        if not any(key == each or key.startswith(f"{each}.") for each in free)
    }


def trainings(value: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the training loops among the settings of a table."""
    if isinstance(value, TrainConfig):
        yield prefix
        return
    inner: Mapping[str, Any] = {}
    if isinstance(value, BaseModel):
        inner = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, Mapping):
        inner = value
    for name, item in inner.items():
        yield from trainings(item, f"{prefix}.{name}" if prefix else str(name))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not prefix):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
