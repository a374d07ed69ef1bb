"""Captions by beam search with a key-value cache, as BEiT-3's released decoder finds them.

A model that was fine-tuned on masked words says the next word at a mask token: every step reads the last word
and a mask behind it. Words stay in the cache, the mask does not. Source: BEiT-3's released captioning code.

Letters: B pictures, K beams, P tokens of a picture, t cached words, H heads, d width, V ids.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from beitctl.model.multiway import Attention, Block, Multiway

CANDIDATES = 3
"""Best continuations that are looked at, for each beam."""
NEVER = -1e9
"""Score of the beams that do not exist yet."""


@dataclass(frozen=True)
class Search:
    """How captions are searched for."""

    start_id: int
    end_id: int
    mask_id: int
    max_tokens: int
    """Longest caption with its start, and with one token more for its end."""
    beam_size: int = 3
    length_penalty: float = 0.6
    """A caption's log-likelihood is divided by its length to this power."""

    def __post_init__(self) -> None:
        if self.beam_size < 1 or self.max_tokens < 3:
            raise ValueError(
                f"beam_size ({self.beam_size}) must be at least 1, max_tokens ({self.max_tokens}) at least 3"
            )


@dataclass
class _Sentence:
    """The best caption of a picture so far."""

    words: list[int] = field(default_factory=list)
    score: float = float("-inf")
    done: bool = False

    def offer(self, words: list[int], total: float, search: Search) -> None:
        """Take a caption that ended, with the sum of its words' log-likelihoods, if it is the best."""
        score = total / (len(words) + 2) ** search.length_penalty  # its start and the mask count
        if score > self.score:
            self.words, self.score = words, score

    def settled(self, best: float, search: Search) -> bool:
        """Whether no running caption can become better; ``best`` is the largest sum among them."""
        return self.score >= best / (search.max_tokens - 1) ** search.length_penalty


@torch.no_grad()
def captions(
    model: Multiway, head: nn.Module, pixels: Tensor, search: Search
) -> list[tuple[list[int], float]]:
    """The best caption of every picture.

    Args:
        model: whole and in eval mode.
        head: (rows, d) to (rows, V) logits.
        pixels: (B, C, H, W) normalised.
        search: special ids, lengths, beams.

    Returns:
        For every picture the ids of its words, without special ones, and its score.

    Raises:
        ValueError: the model reads no text, texts as long, or has relative positions, which no released
            captioning model has.
    """
    _check(model, search)
    beams, count = search.beam_size, len(pixels)
    cache = _Cache(model, pixels, beams)
    found = [_Sentence() for _ in range(count)]
    running: list[list[int]] = [[] for _ in range(count * beams)]
    totals = torch.full((count, beams), NEVER, device=pixels.device)
    totals[:, 0] = 0
    last = torch.full((count * beams,), search.start_id, device=pixels.device)
    for length in range(2, search.max_tokens):
        logits = head(cache.step(last, search.mask_id, length - 2)).float()
        sums = totals[:, :, None] + logits.log_softmax(-1).view(count, beams, -1)
        best, place = sums.flatten(1).topk(min(CANDIDATES * beams, sums[0].numel()))
        chosen = _advance(found, running, best.tolist(), place.tolist(), sums.shape[-1], length, search)
        if all(sentence.done for sentence in found):
            break
        origin, words, scores = (list(part) for part in zip(*chosen, strict=True))
        running = [[*running[beam], word] for beam, word in zip(origin, words, strict=True)]
        cache.reorder(torch.tensor(origin, device=pixels.device))
        last = torch.tensor(words, device=pixels.device)
        totals = torch.tensor(scores, device=pixels.device).view(count, beams)
    return [(sentence.words, sentence.score) for sentence in found]


def _advance(
    found: list[_Sentence], running: list[list[int]], best: list[list[float]], place: list[list[int]],
    size: int, length: int, search: Search,
) -> list[tuple[int, int, float]]:  # fmt: skip
    """End captions, and choose those that run on: (beam that is continued, word, sum), K for every picture.

    Args:
        found: what is known of every picture; changed.
        running: words of every beam so far.
        best: sums of the best continuations of every picture, falling.
        place: where they stand among (K, V).
        size: number of ids V.
        length: tokens of the running captions with start and mask.
        search: special ids, lengths, beams.
    """
    chosen: list[tuple[int, int, float]] = []
    full = length + 1 == search.max_tokens
    for number, sentence in enumerate(found):
        first, own = number * search.beam_size, []
        sentence.done = sentence.done or sentence.settled(best[number][0], search)
        for total, at in zip(best[number], place[number], strict=True):
            if sentence.done or len(own) == search.beam_size:
                break
            beam, word = first + at // size, at % size
            if word == search.end_id or full:
                sentence.offer(running[beam], total, search)
            else:
                own.append((beam, word, total))
        sentence.done = sentence.done or full
        chosen += own + [(first, search.end_id, NEVER)] * (search.beam_size - len(own))
    return chosen


def _check(model: Multiway, search: Search) -> None:
    config = model.config
    if not config.vocabulary:
        raise ValueError("captions need a language branch: this model's vocabulary is 0")
    if config.position != "absolute":
        raise ValueError(f'captions need position = "absolute", this model has "{config.position}"')
    if search.max_tokens > config.text_tokens:
        raise ValueError(
            f"max_tokens ({search.max_tokens}) exceeds the model's {config.text_tokens} text tokens"
        )


class _Cache:
    """Keys and values of pictures, once for all their beams, and of the words of every beam."""

    def __init__(self, model: Multiway, pixels: Tensor, beams: int) -> None:
        self.model, self.beams = model, beams
        self.blocks = [cast("Block", block) for block in model.blocks]
        self.pictures: list[tuple[Tensor, Tensor]] = []
        """Of every block: keys and values (B, 1, H, P, d/H)."""
        self.words: list[tuple[Tensor, Tensor]] = []
        """Of every block: keys and values (B, K, H, t, d/H)."""
        x = model.vision_embed(pixels, None)
        if model.token_type is not None:
            x = x + model.token_type.weight[1].to(x.dtype)
        for block in self.blocks:
            q, k, v = self._project(block, "vision", x)
            weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
            x = self._through(block, "vision", x, weights @ v)
            self.pictures.append((k[:, None], v[:, None]))
        empty = self.pictures[0][0].new_zeros
        for k, _ in self.pictures:
            nothing = empty(len(k), beams, k.shape[2], 0, k.shape[4])
            self.words.append((nothing, nothing))

    def step(self, word: Tensor, mask_id: int, position: int) -> Tensor:
        """Rows (B K, d) at a mask token behind a word (B K,), which stays in the cache; the mask does not."""
        model = self.model
        assert model.text_embed is not None
        ids = torch.stack([word, torch.full_like(word, mask_id)], 1)
        at = torch.arange(position, position + 2, device=word.device).expand_as(ids)
        x = model.text_embed(ids.flatten(), at.flatten())
        if model.token_type is not None:
            x = x + model.token_type.weight[0].to(x.dtype)
        count = len(word) // self.beams
        x = x.view(len(word), 2, -1)
        for number, block in enumerate(self.blocks):
            parts = [part.unflatten(0, (count, self.beams)) for part in self._project(block, "language", x)]
            context = self._attended(number, parts[0], parts[1], parts[2])
            x = self._through(block, "language", x, context.flatten(0, 1))
        rows = x[:, 1]
        if not model.config.final_norm:
            return rows
        normed: Tensor = model.norm["shared" if "shared" in model.norm else "language"](rows)
        return normed

    def _attended(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Contexts of two new tokens (B, K, H, 2, d/H), whose first is added to the cache of a block."""
        known = [torch.cat([old, new], dim=3) for old, new in zip(self.words[number], (k, v), strict=True)]
        self.words[number] = (known[0][:, :, :, :-1], known[1][:, :, :, :-1])
        seen_k, seen_v = self.pictures[number]
        q = q * q.shape[-1] ** -0.5
        to_words = q @ known[0].transpose(-1, -2)
        to_words[:, :, :, 0, -1] = float("-inf")  # the word does not see the mask behind it
        logits = torch.cat([q @ seen_k.transpose(-1, -2), to_words], dim=-1)
        to_picture, to_words = logits.softmax(-1).split([seen_k.shape[3], known[0].shape[3]], dim=-1)
        return to_picture @ seen_v + to_words @ known[1]

    def reorder(self, origin: Tensor) -> None:
        """Let every beam go on from another; ``origin`` (B K,) numbers beams over all pictures."""
        self.words = [
            (
                k.flatten(0, 1).index_select(0, origin).view_as(k),
                v.flatten(0, 1).index_select(0, origin).view_as(v),
            )
            for k, v in self.words
        ]

    @staticmethod
    def _part(block: Block, modality: str) -> Attention:
        return cast("Attention", block.attention["shared" if "shared" in block.attention else modality])

    def _project(self, block: Block, modality: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (n, H, S, d/H) of tokens (n, S, d)."""
        branch = self._part(block, modality)
        qkv = branch.project(branch.norm(x)).unflatten(-1, (3, block.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _through(self, block: Block, modality: str, x: Tensor, context: Tensor) -> Tensor:
        """Tokens (n, S, d) behind a block, given the contexts (n, H, S, d/H) of its attention."""
        merged = self._part(block, modality).merge(context.transpose(1, 2).flatten(2))
        x = x + _scaled(merged, block.attention_scale)
        out = block.ffn["fusion" if "fusion" in block.ffn else modality](x)
        return x + _scaled(out, block.ffn_scale)


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch if scale is None else branch * scale.to(branch.dtype)
