"""Captions by beam search with a key-value cache, as BEiT-3's released decoder finds them.

A model that was fine-tuned on masked words says the next word at a mask token: every step reads the last
word and a mask behind it. Words stay in the cache, the mask does not. A picture sees no text, so it is read
once for all its beams. Source: BEiT-3's released captioning code, unilm 768a3c8.

Letters: B pictures, K beams, P tokens of a picture, t cached words, H heads, d width, V ids.
"""

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from beitctl.model.attention import attend
from beitctl.model.multiway import Attention, Block, Multiway
from beitctl.model.plan import plan_of

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
    """Longest caption with start and end and, as the released code counts, the mask before its
    end: three more than it has words."""
    beam_size: int = 3
    length_penalty: float = 0.6
    """A caption's log-likelihood is divided by its length to this power."""
    pad_id: int | None = None
    """Left out of captions like the other special ids, should the model say it."""

    def __post_init__(self) -> None:
        if self.beam_size < 1 or self.max_tokens < 3:
            raise ValueError(
                f"beam_size ({self.beam_size}) must be at least 1, max_tokens ({self.max_tokens}) at least 3"
            )

    def plain(self, words: list[int]) -> list[int]:
        """Words without the special ids among them, which the released code drops when it makes them text."""
        special = (self.start_id, self.end_id, self.mask_id, self.pad_id)
        return [word for word in words if word not in special]


@dataclass
class _Sentence:
    """The best caption of a picture so far."""

    words: list[int] = field(default_factory=list)
    score: float = float("-inf")
    done: bool = False

    def offer(self, words: list[int], total: float, search: Search) -> None:
        """Take a caption that ended, with the sum of its words' log-likelihoods, if it is the best."""
        score = total / float((len(words) + 2) ** search.length_penalty)  # its start and the mask count
        if score > self.score:
            self.words, self.score = words, score

    def settled(self, best: float, search: Search) -> bool:
        """Whether no running caption can become better; ``best`` is the largest sum among them."""
        return self.score >= best / float((search.max_tokens - 1) ** search.length_penalty)


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
        For every picture the ids of its words, without special ones, and its score: the sum of the
        log-likelihoods of its words and of what ends it, divided by a power of its length.

    Raises:
        ValueError: the model reads no text, no texts as long, has relative positions, which no released
            captioning model has, or gives NaN; ``pixels`` are no such pictures.
    """
    _check(model, pixels, search)
    beams, count = search.beam_size, len(pixels)
    if not count:
        return []
    cache = _Cache(model, pixels, beams)
    found = [_Sentence() for _ in range(count)]
    running: list[list[int]] = [[] for _ in range(count * beams)]
    totals = torch.full((count, beams), NEVER, device=pixels.device)
    totals[:, 0] = 0
    last = torch.full((count * beams,), search.start_id, device=pixels.device)
    for length in range(2, search.max_tokens):
        logits = head(cache.step(last, search.mask_id, length - 2)).float()
        sums = totals[:, :, None] + logits.log_softmax(-1).view(count, beams, -1)
        best, place = (
            part.tolist() for part in sums.flatten(1).topk(min(CANDIDATES * beams, sums[0].numel()))
        )
        if any(math.isnan(row[0]) for row in best):  # NaN is the largest to topk
            raise ValueError(f"the model gives NaN for word {length - 1} of a caption")
        chosen = _advance(found, running, best, place, sums.shape[-1], length, search)
        if all(sentence.done for sentence in found):
            break
        origin, words, scores = (list(part) for part in zip(*chosen, strict=True))
        running = [[*running[beam], word] for beam, word in zip(origin, words, strict=True)]
        cache.reorder(torch.tensor(origin, device=pixels.device))
        last = torch.tensor(words, device=pixels.device)
        totals = torch.tensor(scores, device=pixels.device).view(count, beams)
    return [(search.plain(sentence.words), sentence.score) for sentence in found]


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
        first = number * search.beam_size
        own: list[tuple[int, int, float]] = []
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


def _check(model: Multiway, pixels: Tensor, search: Search) -> None:
    config = model.config
    if not config.vocabulary:
        raise ValueError("captions need a language branch: this model's vocabulary is 0")
    if config.position != "absolute":
        raise ValueError(f'captions need position = "absolute", this model has "{config.position}"')
    if search.max_tokens > config.text_tokens:
        raise ValueError(
            f"max_tokens ({search.max_tokens}) exceeds the model's {config.text_tokens} text tokens"
        )
    outside = [n for n in (search.start_id, search.mask_id) if not 0 <= n < config.vocabulary]
    if outside:
        raise ValueError(f"id {outside[0]} is not in 0..{config.vocabulary - 1}, the model's vocabulary")
    if pixels.ndim != 4 or not pixels.is_floating_point():
        raise ValueError(
            f"pixels are {tuple(pixels.shape)} {pixels.dtype}; they must be (B, C, H, W) normalised floats"
        )


class _Cache:
    """Keys and values of pictures, once for all their beams, and of the words of every beam."""

    def __init__(self, model: Multiway, pixels: Tensor, beams: int) -> None:
        self.model, self.beams, self.size = model, beams, model.config.width // model.config.heads
        self.blocks = [cast("Block", block) for block in model.blocks]
        self.pictures: list[tuple[Tensor, Tensor]] = []
        """Of every block: keys and values (B, H, P, d/H)."""
        self.words: list[tuple[Tensor, Tensor]] = []
        """Of every block: keys and values (B, K, H, t, d/H)."""
        x = model.vision_embed(pixels, None)
        if model.token_type is not None:
            x = x + model.token_type.weight[1]
        self.dtype = x.dtype
        count, tokens, _ = x.shape
        layout = model.layout(plan_of(tokens, count, [], []))
        x = x.flatten(0, 1)
        for block in self.blocks:
            qkv = self._project(block, "vision", x)
            x = self._through(block, "vision", x, attend(qkv, layout, block.heads))
            _, k, v = qkv.view(count, tokens, 3, block.heads, -1).permute(2, 0, 3, 1, 4)
            self.pictures.append((k.contiguous(), v.contiguous()))
            nothing = k.new_zeros(count, beams, block.heads, 0, k.shape[-1])
            self.words.append((nothing, nothing))

    def step(self, word: Tensor, mask_id: int, position: int) -> Tensor:
        """Rows (B K, d) at a mask token behind a word (B K,), which stays in the cache; the mask does not."""
        model = self.model
        assert model.text_embed is not None
        ids = torch.stack([word, torch.full_like(word, mask_id)], 1)
        at = torch.arange(position, position + 2, device=word.device).expand_as(ids)
        x = model.text_embed(ids.flatten(), at.flatten())
        if model.token_type is not None:
            x = x + model.token_type.weight[0]
        x = x.to(self.dtype)
        for number, block in enumerate(self.blocks):
            qkv = self._project(block, "language", x).view(-1, self.beams, 2, 3, block.heads, self.size)
            q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
            context = self._attended(number, q, k, v).transpose(2, 3).reshape(x.shape)
            x = self._through(block, "language", x, context)
        rows: Tensor = x[1::2]
        if not model.config.final_norm:
            return rows
        normed: Tensor = model.norm["shared" if "shared" in model.norm else "language"](rows)
        return normed

    def _attended(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Contexts of two new tokens (B, K, H, 2, d/H), whose first is added to the cache of a block."""
        known = [torch.cat([old, new], dim=3) for old, new in zip(self.words[number], (k, v), strict=True)]
        self.words[number] = (known[0][:, :, :, :-1], known[1][:, :, :, :-1])
        seen_k, seen_v = self.pictures[number]
        q = q * self.size**-0.5
        to_words = q @ known[0].transpose(-1, -2)
        to_words[:, :, :, 0, -1] = float("-inf")  # the word does not see the mask behind it
        logits = torch.cat([torch.einsum("bkhqd,bhpd->bkhqp", q, seen_k), to_words], dim=-1)
        weights, tokens = logits.softmax(-1), seen_k.shape[2]
        of_picture = torch.einsum("bkhqp,bhpd->bkhqd", weights[..., :tokens], seen_v)
        context: Tensor = of_picture + weights[..., tokens:] @ known[1]
        return context

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

    def _project(self, block: Block, modality: str, x: Tensor) -> Tensor:
        """Queries, keys and values (rows, 3d) of rows (rows, d)."""
        branch = self._part(block, modality)
        return branch.project(branch.norm(x))

    def _through(self, block: Block, modality: str, x: Tensor, context: Tensor) -> Tensor:
        """Rows (rows, d) behind a block, given the contexts (rows, d) of its attention."""
        x = x + _scaled(self._part(block, modality).merge(context), block.attention_scale)
        out = block.ffn["fusion" if "fusion" in block.ffn else modality](x)
        return x + _scaled(out, block.ffn_scale)


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch if scale is None else branch * scale.to(branch.dtype)
