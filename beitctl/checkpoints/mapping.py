"""One table says how the tensors of another library lie in ours; reading and writing both follow it.

A ``Pair`` names tensors of ours and of theirs that hold the same numbers. From the table of a format follow
what a file must hold, what is left over, and the way back. Names of ours that begin with ``unread.`` keep
what a file holds and no model reads, so that the way back gives every bit again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from beitctl.config import ModelConfig

UNREAD = "unread."
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Tensors that hold the same numbers: one side is one tensor, the other its parts along ``axis``."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """Shape of each of ``theirs``."""
    own: tuple[Shape, ...]
    """Shape of each of ``ours``, as a part of theirs when theirs is joined from several of ours."""
    axis: int = 0
    group: str = ""
    """Name of an optional part: a file holds all pairs of a group or none. Empty: it must."""
    counts: bool = False
    """Whether it holds whole numbers: how many batches a norm has seen."""

    def read(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Ours from theirs; names and shapes are known to fit."""
        parts = [state[name] for name in self.theirs]
        joined = torch.cat(parts, self.axis) if len(parts) > 1 else parts[0]  # a single one may be 0-d
        if len(self.ours) == 1:
            return {self.ours[0]: joined.reshape(self.own[0])}
        sizes = [shape[self.axis] for shape in self.own]
        whole = (*self.own[0][: self.axis], sum(sizes), *self.own[0][self.axis + 1 :])
        split = torch.split(joined.reshape(whole), sizes, self.axis)
        return dict(zip(self.ours, (part.contiguous() for part in split), strict=True))

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Theirs from ours; parts that are not there and only ``unread`` become zeros."""
        if self.ours[0].startswith(UNREAD) and self.own == self.shapes:  # kept as it was, whatever its size
            return {self.theirs[0]: tensors[self.ours[0]]}
        device = next(tensors[name].device for name in self.ours if name in tensors)
        parts = [
            tensors[name].reshape(shape) if name in tensors else torch.zeros(shape, device=device)
            for name, shape in zip(self.ours, self.own, strict=True)
        ]
        joined = torch.cat(parts, self.axis) if len(parts) > 1 else parts[0]
        if len(self.theirs) == 1:
            return {self.theirs[0]: joined.reshape(self.shapes[0])}
        split = torch.split(joined, [shape[self.axis] for shape in self.shapes], self.axis)
        return dict(zip(self.theirs, (part.contiguous() for part in split), strict=True))


def same(ours: str, theirs: str, shape: Sequence[int], group: str = "") -> Pair:
    """One tensor under two names."""
    return Pair((ours,), (theirs,), (tuple(shape),), (tuple(shape),), group=group)


def view(ours: str, theirs: str, own: Sequence[int], shape: Sequence[int], group: str = "") -> Pair:
    """One tensor under two names and in two shapes: ``own`` is ours, ``shape`` theirs."""
    return Pair((ours,), (theirs,), (tuple(shape),), (tuple(own),), group=group)


def fused(ours: str, theirs: Sequence[str], shape: Sequence[int], group: str = "") -> Pair:
    """Ours is theirs, each of ``shape``, one after the other along the rows."""
    whole = (shape[0] * len(theirs), *shape[1:])
    return Pair((ours,), tuple(theirs), (tuple(shape),) * len(theirs), (whole,), group=group)


def divided(
    ours: Sequence[tuple[str, Sequence[int]]],
    theirs: str,
    shape: Sequence[int],
    axis: int = 0,
    group: str = "",
) -> Pair:
    """Theirs is ours, each of its own shape, one after the other along ``axis``."""
    names, own = zip(*((name, tuple(part)) for name, part in ours), strict=True)
    return Pair(names, (theirs,), (tuple(shape),), own, axis, group)


@dataclass(frozen=True)
class Made:
    """A tensor of theirs that follows from the settings and carries no numbers of its own."""

    theirs: str
    value: Callable[[], Tensor]
    required: bool = False
    """Whether files always hold it."""


@dataclass(frozen=True)
class Table:
    """All of a format for one model."""

    pairs: Sequence[Pair]
    made: Sequence[Made] = ()
    dropped: tuple[str, ...] = ()
    """Beginnings of names that are left out of reading: teachers, losses."""


@dataclass(frozen=True)
class Translated:
    """A file of another library in our terms."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    """``model.*`` and ``heads.*``."""
    unread: dict[str, Tensor] = field(default_factory=dict)
    """What the file holds and the model never reads, by their names with parts numbered."""
    labels: tuple[str, ...] = ()


class Format(Protocol):
    """A way in which another library stores models; one module of this package each."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the names are those of this format."""
        ...

    def config(
        self, state: Mapping[str, Tensor], note: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> ModelConfig:
        """The model's settings: from shapes, from the ``config.json`` beside the file, from ``settings``.

        Raises:
            UserError: a setting is needed that no shape says.
        """
        ...

    def table(self, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Table:
        """The pairs for a model.

        ``shapes`` are those of the file (``theirs``) when reading and of our tensors when writing: from them
        come sizes that the settings do not have, such as the number of classes.
        """
        ...


def problems(table: Table, state: Mapping[str, Tensor]) -> list[str]:
    """Everything that keeps a state dict from being read by a table."""
    found, known = [], {made.theirs for made in table.made}
    groups = {pair.group for pair in table.pairs if any(name in state for name in pair.theirs)} | {""}
    for pair in table.pairs:
        known.update(pair.theirs)
        if pair.group not in groups:
            continue
        for name, shape in zip(pair.theirs, pair.shapes, strict=True):
            if name not in state:
                found.append(f"missing {name}")
            else:
                found += _unlike(name, state[name], shape, pair)
    for made in table.made:
        if (
            made.theirs in state
            and not state[made.theirs].is_meta
            and not torch.equal(state[made.theirs].long(), made.value().long())
        ):
            found.append(f"{made.theirs} is not what it always is for this model")
        elif made.required and made.theirs not in state:
            found.append(f"missing {made.theirs}")
    left = [name for name in state if name not in known and not name.startswith(table.dropped)]
    return found + [f"left over {name}" for name in sorted(left)]


def _unlike(name: str, tensor: Tensor, shape: Shape, pair: Pair) -> list[str]:
    """What keeps a tensor from being one of a pair."""
    if tuple(tensor.shape) != shape:
        return [f"{name} is {tuple(tensor.shape)}, expected {shape}"]
    if pair.ours[0].startswith(UNREAD) or tensor.is_floating_point() != pair.counts:
        return []
    if pair.counts:
        return [f"{name} is {tensor.dtype}, expected whole numbers"]
    return [f"{name} is {tensor.dtype}, expected floating numbers (quantised weights are not read)"]


def read(table: Table, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Our tensors, and those that are kept unread; ``problems`` must have found none."""
    found: dict[str, Tensor] = {}
    for pair in table.pairs:
        if all(name in state for name in pair.theirs):
            found |= pair.read(state)
    unread = {name.removeprefix(UNREAD): value for name, value in found.items() if name.startswith(UNREAD)}
    return {name: value for name, value in found.items() if not name.startswith(UNREAD)}, unread


def write(table: Table, tensors: Mapping[str, Tensor], unread: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict; what ours has no place for there is left out (see ``untold``)."""
    have = dict(tensors) | {UNREAD + name: value for name, value in unread.items()}
    found: dict[str, Tensor] = {}
    for pair in table.pairs:
        real = [name for name in pair.ours if not name.startswith(UNREAD)]
        if all(name in have for name in real or pair.ours):  # what is only unread may be missing
            found |= pair.write(have)
    return found | {made.theirs: made.value() for made in table.made}


def untold(table: Table, tensors: Iterable[str]) -> list[str]:
    """Names of ours that the format has no place for."""
    told = {name for pair in table.pairs for name in pair.ours}
    return sorted(set(tensors) - told)
