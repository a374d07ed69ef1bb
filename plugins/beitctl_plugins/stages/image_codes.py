"""Codes of pictures for a stage: from a store that fits, or from a tokenizer inside the training step.

Imported by stages inside ``run``, because it imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beitctl.api import Examples, ImageTokenizer, Item, OnlineCodes, Task
from beitctl.checkpoints import native
from beitctl.data.order import generator
from beitctl.data.store import TokenStore, picture_hash
from beitctl.errors import ChangedError, DataError, UserError
from beitctl_plugins.stages.tokenizing import encoded

SAMPLE = 32
"""Pictures of each source that are compared with the fingerprints in a store before training."""
CHUNK = 64


class Online:
    """A frozen image tokenizer that computes codes inside the training step, on the device of the model.

    It is no part of what is trained, sharded or saved.
    """

    def __init__(self, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.tokenizer: ImageTokenizer = tokenizer
        self.device, self.dtype = device, dtype
        self.sizes = OnlineCodes(tokenizer.codes, tokenizer.grid, tokenizer.image_px)
        tokenizer.model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        """(n, 3, px, px) uint8 to codes (n, N); the tokenizer chooses them in fp32."""
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype != torch.float32):
            return self.tokenizer.encode(views)

    def filled(self, items: Sequence[Item]) -> list[Item]:
        """Items with the codes of their hidden patches as targets, without the tokenizer's views."""
        found: list[Item] = []
        for start in range(0, len(items), CHUNK):
            part = items[start : start + CHUNK]
            views = [item.code_view for item in part if item.code_view is not None]
            codes = iter(self(torch.from_numpy(np.stack(views))).cpu().numpy() if views else ())
            found += [item if item.code_view is None else _filled(item, next(codes)) for item in part]
        return found


def _filled(item: Item, codes: "np.ndarray[Any, Any]") -> Item:
    asked = item.patch_targets
    targets = None if asked is None else np.where(asked >= 0, codes, -1)
    return replace(item, patch_targets=targets, code_view=None)


def open_tokenizer(path: Path, settings: Mapping[str, Any], name: str) -> Any:
    """The image tokenizer at a path; ``name`` is the field that says so.

    Raises:
        DataError: there is none, or it cannot be read.
        UserError: it reads text, or a setting is unknown.
    """
    strange = sorted(set(settings) - {"heads"})
    if strange:
        raise UserError(f"{name}_settings: unknown {', '.join(strange)}; known: heads")
    found = native.load_tokenizer(path, **settings)
    if not all(hasattr(found, part) for part in ("grid", "codes", "image_px")):
        raise UserError(f"{name}: {path} is no image tokenizer; train one with kind vqkd, or name another")
    return found


def predicts_codes(task: Task) -> bool:
    """Whether a task predicts patches, so that it needs their codes."""
    return any(term.unit == "patch" for term in task.terms().values())


def check_tokenizer(store: TokenStore, tokenizer: ImageTokenizer, name: str) -> None:
    """Refuse a store that another tokenizer made.

    Raises:
        DataError: their fingerprints differ.
    """
    if store.tokenizer != tokenizer.fingerprint:
        raise DataError(
            f"{store.folder}: made with tokenizer = {store.tokenizer!r}, but {name} is "
            f"{tokenizer.fingerprint!r}; run tokenize-images again with that one"
        )


def check_pictures(store: TokenStore, examples: Examples, seed: int) -> None:
    """Compare a seeded sample of a source with the fingerprints of a store.

    Pictures that the store does not know, or that cannot be read, are left to the loader.

    Raises:
        DataError: one has changed.
    """
    draw = generator(seed, "fingerprints")
    for index in draw.choice(len(examples), min(SAMPLE, len(examples)), replace=False):
        try:
            example = examples[int(index)]
            data, _ = encoded(example)
        except ChangedError:
            raise
        except DataError:
            continue
        if example.id in store and picture_hash(data) != store.picture(example.id):
            raise DataError(
                f"{example.id}: not the picture that its codes in {store.folder} were made of; run "
                "tokenize-images again, or use the pictures of that run"
            )
