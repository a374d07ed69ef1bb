"""Items to one packed batch: rows, targets and counts of every objective.

Letters as in ``beitctl.model.plan``: P tokens of a picture, N patches, T rows of the packed buffer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from beitctl.config import ModelConfig
from beitctl.model.plan import BatchPlan, plan_of, with_fillers

if TYPE_CHECKING:
    from beitctl.api import Item

LAYOUTS = ("image", "text", "pair", "dual", "two-pairs")


@dataclass(frozen=True)
class Group:
    """The rows of the packed buffer that belong to one objective, and what they should predict."""

    picture_rows: Tensor
    """(n, P) rows of every picture, class token first; of ``two-pairs`` (2n, P), the second pictures last."""
    text_first: Tensor
    """(n,) row of the first token of every text; of ``two-pairs`` (2n,)."""
    patch_rows: Tensor
    """(m,) rows of the predicted patches."""
    patch_targets: Tensor
    """(m,) their codes."""
    text_rows: Tensor
    """(m',) rows of the predicted text tokens."""
    text_targets: Tensor
    """(m',) their ids."""
    labels: Tensor
    """(n,) class indices, -1 without."""
    chance: Tensor
    """(n, k) numbers in 0..1 for what the loss draws."""
    code_places: Tensor
    """(m,) where the codes of the predicted patches stand among those of all ``Batch.code_views``, flattened;
    empty if ``patch_targets`` are the codes."""
    extra: tuple[Mapping[str, Tensor], ...] = ()
    """``Item.extra`` of every item."""
    step: int = 0
    """Training step of the batch, from 0, for losses that change with it."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of predictions by unit."""
        return {
            "patch": len(self.patch_targets),
            "text": len(self.text_targets),
            "sample": len(self.labels),
        }


@dataclass(frozen=True)
class Batch:
    """One forward pass worth of data."""

    plan: BatchPlan
    pixels: Tensor
    """(pictures, 3, H, W) uint8."""
    image_mask: Tensor | None
    """(pictures, N) bool; None if the model has no mask token."""
    ids: Tensor
    """(text rows,) int64."""
    groups: Mapping[str, Group]
    keep: Tensor | None
    """(layers, 2, S) float32, or None without stochastic depth."""
    samples: tuple[str, ...] = ()
    """``objective/id`` of every sample, in order."""
    problems: tuple[tuple[str, str], ...] = ()
    """Examples that could not be read, as ``objective/id``, and why; substitutes stand in their place."""
    code_views: Tensor | None = None
    """(v, 3, h, h) uint8: what the image tokenizer reads where codes are computed in the training step."""
    picture_types: Tensor | None = None
    """(pictures,) 2 for second pictures and 1 for others (VLMo); None where there are no second ones."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory, from which copies to a GPU overlap with its work."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        def move(value: Any) -> Any:
            if isinstance(value, tuple) and value and isinstance(value[0], Mapping):
                return tuple({key: change(tensor) for key, tensor in one.items()} for one in value)
            return change(value) if isinstance(value, Tensor) else value

        groups = {
            name: Group(**{key: move(item) for key, item in vars(group).items()})
            for name, group in self.groups.items()
        }
        return replace(
            self, **{key: move(item) for key, item in vars(self).items() if key != "groups"}, groups=groups
        )


@dataclass(frozen=True)
class Portion:
    """The items of one objective in a batch, all of one layout."""

    name: str
    layout: str
    items: "Sequence[Item]"
    keep: np.ndarray[Any, Any] | None = None
    """(items, layers, 2) float32."""
    causal_text: bool = False
    """Whether text in pairs sees its picture and earlier text alone."""

    def twice(self) -> "Portion":
        """Of ``two-pairs``: as pairs, those of the second pictures behind those of the first."""
        second = [replace(item, image=item.second, second=None) for item in self.items]
        keep = None if self.keep is None else np.concatenate([self.keep, self.keep])
        return replace(self, layout="pair", items=[*self.items, *second], keep=keep)


def collate(portions: Sequence[Portion], config: ModelConfig, multiple: int = 1, step: int = 0) -> Batch:
    """Pack the items of all objectives into one batch.

    Args:
        portions: the items, by objective.
        config: shape of the model.
        multiple: what both text segments have a multiple of rows of, by fillers; 1: there are none.
        step: training step that the batch belongs to, from 0.
    """
    if len({p.causal_text for p in portions if p.layout in ("pair", "two-pairs")}) > 1:
        raise ValueError("captioning and other pairs cannot share a batch: they differ in what text sees")
    seen = [p.twice() if p.layout == "two-pairs" else p for p in portions]
    order = {layout: [p for p in seen if p.layout == layout] for layout in LAYOUTS}
    alone = order["image"] + order["dual"]
    texts = order["text"] + order["dual"]
    plan = replace(
        plan_of(
            config.picture_tokens,
            sum(len(p.items) for p in alone),
            [len(_text(item)) for p in order["pair"] for item in p.items],
            [len(_text(item)) for p in texts for item in p.items],
        ),
        causal_text=any(p.causal_text for p in seen),
    )
    if multiple > 1 and config.vocabulary:
        plan = with_fillers(plan, multiple)
    pictured = alone + order["pair"]
    written = order["pair"] + texts
    firsts = (_offsets(pictured), _offsets(written))
    code_views, places = _code_views(portions, config.patches)
    groups = {}
    for portion, shown in zip(portions, seen, strict=True):
        made = _group(portion, shown, plan, firsts, config.prefix, places[portion.name])
        groups[portion.name] = replace(made, step=step)
    return Batch(
        plan=plan,
        pixels=_stack([item.image for p in pictured for item in p.items], (3, *config.size), np.uint8),
        image_mask=_stack(
            [_mask(item, config.patches) for p in pictured for item in p.items], (config.patches,), np.bool_
        )
        if config.mask_token
        else None,
        ids=_ids(order["pair"], texts, plan),
        groups=groups,
        keep=_keep([*alone, *order["pair"]], texts, plan),
        code_views=code_views,
        picture_types=_picture_types(portions, pictured),
    )


def _picture_types(portions: Sequence[Portion], pictured: Sequence[Portion]) -> Tensor | None:
    """2 for second pictures, 1 for others, in the order of the pixels; None if there are no second ones."""
    twice = {p.name for p in portions if p.layout == "two-pairs"}
    if not twice:
        return None
    found = []
    for portion in pictured:
        half = len(portion.items) // 2 if portion.name in twice else 0
        found += [1] * (len(portion.items) - half) + [2] * half
    return torch.tensor(found, dtype=torch.int64)


def _code_views(portions: Sequence[Portion], patches: int) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What the image tokenizer reads for a batch, and by objective where its codes will stand in the result.

    Raises:
        ValueError: only some items of an objective have a view for it.
    """
    views: list[Any] = []
    places = {}
    for portion in portions:
        mine = [item.code_view for item in portion.items if item.code_view is not None]
        if mine and len(mine) < len(portion.items):
            raise ValueError(f"{portion.name}: {len(mine)} of {len(portion.items)} items have a code_view")
        starts = (len(views) + np.arange(len(mine))) * patches
        places[portion.name], _ = _targets([item.patch_targets for item in portion.items], starts)
        views += mine
    return torch.from_numpy(np.stack(views)) if views else None, places


def _offsets(portions: Sequence[Portion]) -> dict[str, int]:
    """Number of sequences of a kind that stand before each portion."""
    found, total = {}, 0
    for portion in portions:
        found[portion.name] = total
        total += len(portion.items)
    return found


def _group(
    portion: Portion, seen: Portion, plan: BatchPlan, firsts: tuple[dict[str, int], dict[str, int]],
    prefix: int, code_places: Tensor,
) -> Group:  # fmt: skip
    """What belongs to a portion, whose sequences are those of ``seen``."""
    items, pictures, texts = portion.items, firsts[0].get(portion.name), firsts[1].get(portion.name)
    picture_rows = np.zeros((0, plan.picture_tokens), np.int64)
    starts = np.zeros(0, np.int64)
    if pictures is not None:
        picture_rows = plan.image_rows(pictures, len(seen.items))
    if texts is not None:
        starts = plan.text_starts[texts : texts + len(seen.items)]
    patch_rows, patch_targets = _targets(
        [i.patch_targets for i in seen.items], picture_rows[:, prefix : prefix + 1].ravel()
    )
    text_rows, text_targets = _targets([i.text_targets for i in seen.items], starts)
    extra = tuple({key: torch.from_numpy(value) for key, value in item.extra.items()} for item in items)
    return Group(
        picture_rows=torch.from_numpy(picture_rows),
        text_first=torch.from_numpy(starts.copy()),
        patch_rows=patch_rows,
        patch_targets=patch_targets,
        text_rows=text_rows,
        text_targets=text_targets,
        labels=torch.tensor([item.label for item in items], dtype=torch.int64),
        chance=torch.tensor([item.chance for item in items], dtype=torch.float32),
        code_places=code_places,
        extra=extra,
    )


def _targets(targets: Sequence[Any], starts: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    """Rows and values of all targets that are not -1, given the row of each item's first target."""
    rows, values = [], []
    for start, target in zip(starts, targets, strict=False):
        if target is None:
            continue
        chosen = np.flatnonzero(target >= 0)
        rows.append(start + chosen)
        values.append(target[chosen])
    return _flat(rows), _flat(values)


def _flat(parts: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))


def _stack(arrays: Sequence[Any], shape: tuple[int, ...], kind: Any) -> Tensor:
    return torch.from_numpy(np.stack(arrays) if arrays else np.zeros((0, *shape), kind))


def _mask(item: "Item", patches: int) -> Any:
    return np.zeros(patches, np.bool_) if item.image_mask is None else item.image_mask


def _text(item: "Item") -> Any:
    return np.zeros(0, np.int64) if item.text is None else item.text


def _ids(pairs: Sequence[Portion], texts: Sequence[Portion], plan: BatchPlan) -> Tensor:
    """Ids of the rows of C and D, 0 at fillers."""
    behind_pairs, behind_texts = (np.zeros(rows, np.int64) for rows in plan.fillers or (0, 0))
    of_pairs, alone = ([_text(item) for p in portions for item in p.items] for portions in (pairs, texts))
    return _flat([*of_pairs, behind_pairs, *alone, behind_texts])


def _keep(pictured: Sequence[Portion], texts: Sequence[Portion], plan: BatchPlan) -> Tensor | None:
    """Scales of all sequences in the order of the plan; the text of a ``dual`` item shares its picture's."""
    parts = [[p.keep for p in portions if p.keep is not None] for portions in (pictured, texts)]
    if not parts[0] + parts[1]:
        return None
    first = (parts[0] + parts[1])[0]
    filler = [np.ones((1, *first.shape[1:]), first.dtype)] * (plan.fillers is not None)
    found = np.concatenate([*parts[0], *filler, *parts[1], *filler])
    return torch.from_numpy(np.ascontiguousarray(found.transpose(1, 2, 0)))
