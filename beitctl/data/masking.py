"""What is hidden from the model: blocks of patches, and tokens of a text.

N: patches of a picture. S: tokens of a text.
"""

import math

import numpy as np
from numpy.typing import NDArray

from beitctl.api import TextTokenizer
from beitctl.errors import UserError

TRIES = 10
"""Draws for one block before block-wise masking gives up."""


def block_mask(
    grid_h: int,
    grid_w: int,
    count: int,
    rng: np.random.Generator,
    min_block: int = 16,
    min_aspect: float = 0.3,
    exact: bool = True,
) -> NDArray[np.bool_]:
    """Hide blocks of a grid of patches: (N,) bool, row by row, True where hidden.

    Blocks of random area (at least ``min_block`` patches) and aspect (``min_aspect`` to its inverse) are put
    together until ``count`` patches are hidden. Blocks alone may stay a few patches short; with ``exact``,
    patches drawn uniformly make up for it, as in BEiT v2.

    Raises:
        UserError: ``count`` does not lie in 1..N.

    Source: arXiv:2106.08254, algorithm 1; the correction: arXiv:2208.06366.
    """
    patches = grid_h * grid_w
    if count > patches:
        raise UserError(f"more masked patches ({count}) than patches ({patches}); lower the mask ratio")
    if count < 1:
        raise UserError(f"masked patches ({count}) must be at least 1; raise the mask ratio")
    mask = np.zeros((grid_h, grid_w), dtype=np.bool_)
    hidden = 0
    while hidden < count:
        added = _add_block(mask, count - hidden, rng, min_block, min_aspect)
        if not added:
            break
        hidden += added
    flat = mask.reshape(-1)
    if exact and hidden < count:
        flat[rng.choice(np.flatnonzero(~flat), count - hidden, replace=False)] = True
    return flat


def _add_block(
    mask: NDArray[np.bool_], most: int, rng: np.random.Generator, min_block: int, min_aspect: float
) -> int:
    """Hide one more block, which adds at most ``most`` patches; the number added, 0 if no try fits."""
    grid_h, grid_w = mask.shape
    for _ in range(TRIES):
        area = min_block + (most - min_block) * rng.random()  # between the two, whichever is larger
        aspect = math.exp((2 * rng.random() - 1) * math.log(min_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= grid_h or w >= grid_w:
            continue
        top, left = int(rng.integers(grid_h - h + 1)), int(rng.integers(grid_w - w + 1))
        block = mask[top : top + h, left : left + w]
        added = h * w - int(np.count_nonzero(block))
        if 0 < added <= most:
            block[:] = True
            return added
    return 0


def text_mask(
    ids: NDArray[np.int64],
    ratio: float,
    rng: np.random.Generator,
    tokenizer: TextTokenizer,
    *,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    starts: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hide tokens of a text: the ids to feed (S,), and the ids to predict (S,), -1 where nothing is.

    Tokens are drawn uniformly among the ordinary ones, which are not among the tokenizer's ``special_ids``;
    at least one is, if there is any. Of those, ``mask_share`` become its ``mask_id``, ``random_share`` any
    ordinary id, the rest stay as they are. With ``starts`` (S,), True at the first token of a word, words are
    hidden whole, in random order, until the share is reached; one that would exceed it is passed over.

    Raises:
        UserError: ``ratio`` does not lie in 0..1, or the shares are negative or exceed 1 together.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"share of masked tokens ({ratio}) must be above 0 and at most 1")
    if min(mask_share, random_share) < 0 or mask_share + random_share > 1:
        raise UserError(
            f"mask_share ({mask_share}) and random_share ({random_share}) must add up to at most 1"
        )
    ids = np.asarray(ids, dtype=np.int64)
    never = np.unique([*tokenizer.special_ids, tokenizer.mask_id])
    candidates = np.flatnonzero(~np.isin(ids, never))
    count = _rounded(ratio * len(candidates), len(candidates))
    if starts is None:
        chosen = rng.choice(candidates, count, replace=False)
    else:
        chosen = _whole_words(candidates, starts, count, rng)
    fate = rng.random(len(chosen))
    masked, targets = ids.copy(), np.full_like(ids, -1)
    targets[chosen] = ids[chosen]
    masked[chosen[fate < mask_share]] = tokenizer.mask_id
    swapped = chosen[(fate >= mask_share) & (fate < mask_share + random_share)]
    masked[swapped] = _ordinary(never, tokenizer.size, len(swapped), rng)
    return masked, targets


def _ordinary(never: NDArray[np.int64], size: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random ids below ``size`` that are not among the sorted ones of ``never``, (count,)."""
    inside = never[never < size]
    drawn = rng.integers(max(size - len(inside), 1), size=count)  # the number of an id among the ordinary
    return drawn + np.searchsorted(inside - np.arange(len(inside)), drawn, side="right")


def _whole_words(
    candidates: NDArray[np.intp], starts: NDArray[np.bool_], count: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Places of all tokens of random words, at most ``count`` of them but at least one word."""
    words = np.split(candidates, np.flatnonzero(starts[candidates])) if len(candidates) else []
    chosen: list[NDArray[np.intp]] = []
    for index in rng.permutation(len(words)):
        word = words[index]
        if len(word) and (sum(map(len, chosen)) + len(word) <= count or not chosen):
            chosen.append(word)
    return np.sort(np.concatenate(chosen)) if chosen else candidates[:0]


def _rounded(expected: float, most: int) -> int:
    """Nearest whole number, at least 1 where ``most`` allows it."""
    return min(max(round(expected), 1), most)
