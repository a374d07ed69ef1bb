"""Pictures for the reports of stages; imported inside ``run``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beitctl.api import Job
from beitctl.data.batch import Portion, collate
from beitctl.data.loader import Stream, prepared
from beitctl.engine.dist import Ranks
from beitctl.engine.learner import MultiwayLearner
from beitctl.report import figures

SHOWN = 8


@torch.no_grad()
def reconstructions(
    learner: MultiwayLearner, held: Mapping[str, Stream], job: Job, ranks: Ranks, tokens: Path | None
) -> None:
    """Original, masked, and what the predicted codes stand for; captions with hidden words filled in.

    Only a token store knows patches that stand for its codes; without one there are no pictures.
    """
    learner.eval()
    patches = _patches(tokens)
    config = learner.model.config
    items = {name: [item for _, item in prepared(stream, 0, SHOWN)] for name, stream in held.items()}
    portions = [Portion(name, stream.task.layout, items[name]) for name, stream in held.items()]
    said = learner.outputs(collate(portions, config).to(ranks.device))
    for name, stream in held.items():
        if not isinstance(said[name], dict):
            continue
        guesses = {unit: ids.cpu().numpy() for unit, ids in said[name].items()}
        if patches is not None and len(guesses.get("patch", ())):
            _pictures(name, items[name], guesses["patch"], patches, job)
        if len(guesses.get("text", ())):
            _texts(items[name], guesses["text"], stream, name, job)


def _pictures(
    name: str, items: Sequence[Any], codes: "np.ndarray[Any, Any]", patches: "np.ndarray[Any, Any]", job: Job
) -> None:
    rows = [_picture_row(item, part, patches) for item, part in zip(items, _split(items, codes), strict=True)]
    job.log.figure(
        f"masked-{name}",
        figures.gallery(rows, ("original", "what the model sees", "what it predicts", "right codes")),
        f"Hidden patches, objective '{name}'",
        "The model sees the second column and predicts a code for every hidden patch. The third column draws "
        "for each predicted code the training patch that stands for it; the fourth does the same for the "
        "right codes, and is the best that can be reached.",
    )


def _patches(tokens: Path | None) -> "np.ndarray[Any, Any] | None":
    if tokens is None:
        return None
    for file in (tokens / "tokens" / "patches.npy", tokens / "patches.npy"):
        if file.is_file():
            found: np.ndarray[Any, Any] = np.load(file, allow_pickle=False)
            return found
    return None


def _split(items: Sequence[Any], predicted: "np.ndarray[Any, Any]") -> list["np.ndarray[Any, Any]"]:
    """Predictions of a whole batch, item by item."""
    sizes = [int((item.patch_targets >= 0).sum()) for item in items]
    return np.split(predicted, np.cumsum(sizes)[:-1])


def _picture_row(
    item: Any, predicted: "np.ndarray[Any, Any]", patches: "np.ndarray[Any, Any]"
) -> figures.Row:
    mask = item.patch_targets >= 0
    codes = np.full(len(mask), -1)
    codes[mask] = predicted
    original = item.image.transpose(1, 2, 0)
    hidden = _fill(original, mask, np.full_like(patches[:1], 128), np.where(mask, 0, -1))
    guessed = _fill(original, mask, patches, codes)
    right = _fill(original, mask, patches, item.patch_targets)
    hits = int((codes[mask] == item.patch_targets[mask]).sum())
    return figures.Row(
        [
            figures.Tile(original),
            figures.Tile(hidden),
            figures.Tile(guessed, f"{hits} of {int(mask.sum())} right"),
            figures.Tile(right),
        ]
    )


def _fill(
    original: "np.ndarray[Any, Any]",
    mask: "np.ndarray[Any, Any]",
    patches: "np.ndarray[Any, Any]",
    codes: Any,
) -> "np.ndarray[Any, Any]":
    """Draw the patch of each code over the hidden places of a picture (H, W, 3)."""
    grid = int(len(mask) ** 0.5)
    side = original.shape[0] // grid
    picture = original.copy()
    for place in np.flatnonzero(mask):
        y, x = divmod(int(place), grid)
        patch = patches[codes[place]].transpose(1, 2, 0)
        rows = np.linspace(0, patch.shape[0] - 1, side).round().astype(int)
        picture[y * side : (y + 1) * side, x * side : (x + 1) * side] = patch[rows][:, rows]
    return picture


def _texts(items: Sequence[Any], words: "np.ndarray[Any, Any]", stream: Stream, name: str, job: Job) -> None:
    tokenizer: Any = stream.tools.tokenizer
    if not hasattr(tokenizer, "pieces"):
        return
    lines, start = [], 0
    for item in items:
        hidden = np.flatnonzero(item.text_targets >= 0)
        filled = item.text.copy()
        filled[hidden] = words[start : start + len(hidden)]
        start += len(hidden)
        seen, said = tokenizer.pieces(item.text), tokenizer.pieces(filled)
        true = np.where(item.text_targets >= 0, item.text_targets, item.text)
        marked = [f"[{said[i]}]" if i in set(hidden) else said[i] for i in range(len(said))]
        seen = ["____" if i in set(hidden) else seen[i] for i in range(len(seen))]
        lines.append([_joined(seen), _joined(marked), tokenizer.decode(true)])
    job.log.table(
        f"texts-{name}",
        f"Hidden words, objective '{name}'",
        ("seen", "predicted in [brackets]", "true"),
        lines,
    )


def _joined(pieces: Sequence[str]) -> str:
    return "".join(pieces).replace("▁", " ").replace("<s>", "").replace("</s>", "").strip()[:300]
