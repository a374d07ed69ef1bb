"""Zero-shot retrieval with a model that was only pretrained; imported inside ``run``.

Masked data modelling trains no similarity. What it does train is to predict hidden words of a caption from
a picture, so a pair is scored by how much the picture helps: the mean log-likelihood of the caption's tokens
given the picture, minus that given a picture whose patches are all hidden. Every token is hidden once, in two
passes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from beitctl.api import Example, Tools
from beitctl.checkpoints.native import Stored, fit
from beitctl.engine.learner import PIXELS, normalise
from beitctl.errors import UserError
from beitctl.model.multiway import Multiway, Packed
from beitctl.model.plan import plan_of
from beitctl_plugins.tasks.matching import Matches, recalls
from beitctl_plugins.tasks.preparing import loaded, view_of
from beitctl_plugins.tasks.retrieval import caption_ids, caption_keys

CHUNK = 64
WORDS = (
    "first caption of every picture, by the mean log-likelihood of its words given the picture less that "
    "given a hidden one; an equal caption is a hit too"
)
"""The protocol, for people."""


@torch.no_grad()
def pair_scores(stored: Stored, examples: Sequence[Example], tools: Tools, device: torch.device) -> Tensor:
    """(texts, pictures) scores of the first caption of every example with every picture.

    Raises:
        UserError: the model was not pretrained on text.
    """
    if "heads.text_tokens.weight" not in stored.tensors:
        raise UserError(
            f"{stored.folder}: no head for text tokens; zero-shot retrieval needs a pretrained model"
        )
    model = Multiway(stored.model).to(device).eval()
    fit(stored.tensors, model, "model.", stored.folder)
    head = nn.Linear(stored.model.width, stored.model.vocabulary).to(device)
    fit(stored.tensors, head, "heads.text_tokens.", stored.folder)
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(
        np.stack([view_of(e, rng, tools, (1.0, 1.0), test="squash") for e in examples])
    )
    pixels = normalise(pictures.to(device), PIXELS[stored.model.pixels])
    tokenizer = loaded(tools)
    ids = [caption_ids(example, 0, tools)[0] for example in examples]
    scores = torch.zeros(len(ids), len(ids))
    for row, text in enumerate(ids):
        scores[row] = _likelihood(model, head, pixels, text, tokenizer.mask_id)
        scores[row] -= _likelihood(model, head, pixels[:1], text, tokenizer.mask_id, blind=True)
    return scores


def table_recalls(scores: Tensor, examples: Sequence[Example]) -> dict[str, float]:
    """Recalls of a (texts, pictures) table of scores of first captions; an equal caption is a hit too."""
    matches = Matches.of([caption_keys(example)[:1] for example in examples], duplicates=True)
    return recalls(matches.ranks(lambda asked: scores.T[asked], lambda asked: scores[asked]), matches)


def _likelihood(
    model: Multiway, head: nn.Module, pixels: Tensor, text: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    mask_id: int, blind: bool = False,
) -> Tensor:  # fmt: skip
    """(pictures,) mean log-likelihood of one caption's tokens."""
    total = torch.zeros(len(pixels))
    true = torch.from_numpy(text).to(pixels.device)
    inner = np.arange(1, len(text) - 1)
    for hidden in (inner[::2], inner[1::2]):
        if not len(hidden):
            continue
        seen = true.clone()
        seen[hidden] = mask_id
        for start in range(0, len(pixels), CHUNK):
            part = pixels[start : start + CHUNK]
            plan = plan_of(model.config.picture_tokens, 0, [len(text)] * len(part), [])
            mask = torch.full((len(part), model.config.patches), blind, device=pixels.device)
            packed = Packed(model.layout(plan), part, mask, seen.repeat(len(part)))
            rows = model.encode(packed)[plan.cuts[1] :].view(len(part), len(text), -1)[:, hidden]
            logits = head(rows).log_softmax(-1)
            picked = logits.gather(-1, true[hidden].expand(len(part), -1)[:, :, None]).sum((1, 2))
            total[start : start + CHUNK] += picked.cpu()
    return total / max(1, len(inner))
