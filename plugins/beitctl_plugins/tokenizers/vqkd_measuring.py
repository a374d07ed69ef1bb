"""What is measured and drawn of a trained VQ-KD tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beitctl.api import Log
from beitctl.data.loader import Stream
from beitctl.errors import DataError
from beitctl.report import codes as seeing
from beitctl_plugins.tokenizers.vqkd_learner import Views
from beitctl_plugins.tokenizers.vqkd_tokenizer import VQKDTokenizer

BATCH = 64
MEASURED = 4096
"""Pictures that the codebook's use is measured on, evenly spread over the sources."""
COMPARED = 512
"""Pictures of which the reconstruction is compared with the teacher."""

Window = tuple[int, "np.ndarray[Any, Any]"]
"""A step, and (K,) uses of every code since the window before."""


@dataclass
class _Seen:
    """What a tokenizer makes of some pictures, batch by batch."""

    views: list[Any] = field(default_factory=list)
    codes: list[Any] = field(default_factory=list)
    near: list[Any] = field(default_factory=list)
    cosine: list[Any] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)


Labelled = tuple[Views, list["str | None"]]


def fixed_views(streams: Sequence[Stream], most: int = MEASURED) -> Iterator[Labelled]:
    """Central views of at most ``most`` pictures, evenly spread, in batches, with the pictures' labels.

    Pictures that cannot be read are left out: training has counted them.
    """
    total = sum(len(stream.examples) for stream in streams)
    every = max(1.0, total / most)
    for stream in streams:
        tools = replace(stream.tools, train=False)
        rows: list[Any] = []
        labels: list[str | None] = []
        for number in range(int(len(stream.examples) / every)):
            try:
                example = stream.examples[int(number * every)]
                rows.append(stream.task.prepare(example, np.random.default_rng(0), tools))
                labels.append(example.label)
            except DataError:
                continue
            if len(rows) == BATCH:
                yield _views(rows), labels
                rows, labels = [], []
        if rows:
            yield _views(rows), labels


def _views(rows: Sequence[Any]) -> Views:
    small, large = (torch.from_numpy(np.stack(views)) for views in zip(*rows, strict=True))
    return Views(small, large, torch.arange(len(rows)))


def measure(
    tokenizer: VQKDTokenizer, streams: Sequence[Stream], teacher: Any, log: Log, windows: Sequence[Window]
) -> dict[str, Any]:
    """Use of the codebook, likeness to the teacher and what codes mean, over central views of pictures."""
    device, seen = next(iter(teacher.buffers())).device, _Seen()
    tokenizer.model.to(device)
    compared = 0
    for views, labels in fixed_views(streams):
        small = views.small.to(device)
        codes, near = tokenizer.closest(small)
        seen.views.append(views.small.numpy())
        seen.codes.append(codes.cpu().numpy())
        seen.near.append(near.cpu().numpy())
        seen.labels += labels
        if compared < COMPARED:
            seen.cosine.append(_likeness(tokenizer, teacher, small, views.large.to(device)))
            compared += len(small)
    names = sorted({label for label in seen.labels if label is not None})
    numbers = np.array([names.index(label) if label is not None else -1 for label in seen.labels])
    found = seeing.tell(
        log, views=np.concatenate(seen.views), codes=np.concatenate(seen.codes),
        near=np.concatenate(seen.near), size=tokenizer.codes, cosine=np.concatenate(seen.cosine),
        labels=numbers if names else None, names=names, windows=windows,
    )  # fmt: skip
    return {"codebook_size": tokenizer.codes, **found}


def _likeness(tokenizer: VQKDTokenizer, teacher: Any, small: Tensor, large: Tensor) -> Any:
    """Cosine (B, grid, grid) between reconstructed and true features."""
    cosine = tokenizer.similarity(small, teacher(large.float() / 255).float())
    return cosine.view(-1, tokenizer.grid, tokenizer.grid).cpu().numpy()
