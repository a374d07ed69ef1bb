"""The Multiway Transformer: one model, of which ViT, BEiT-1, BEiT v2, VLMo and BEiT-3 are settings.

A block is self-attention and an expert FFN per modality, both pre-norm, with the two inner LayerNorms of
Magneto when ``norm = "sub"``. All of it works on rows: X [T, d] laid out by ``beitctl.model.plan``. The split
between the modalities comes with every call; no module remembers it.

Sources: BEiT, arXiv:2106.08254; BEiT v2, arXiv:2208.06366; VLMo, arXiv:2111.02358; BEiT-3, arXiv:2208.10442;
Magneto (sub-LN), arXiv:2210.06423.
Letters: B batch, T rows, d width, f FFN width, P tokens of a picture, N patches, S sequences.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.attention import Layout, attend, attend_in_order, from_sequences, to_sequences
from beitctl.model.embed import TextEmbedding, VisionEmbedding, unpadded
from beitctl.model.plan import BatchPlan, plan_of
from beitctl.model.relative import RelativeBias

Span = tuple[str, int, int]
"""Name of an expert and the rows [start, end) that it reads."""


class Attention(nn.Module):
    """The row-wise half of self-attention: norm, projections in and out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.norm = nn.LayerNorm(d, config.norm_eps)
        self.qkv = nn.Linear(d, 3 * d, bias=config.key_bias)
        if not config.key_bias:
            self.q_bias = nn.Parameter(torch.empty(d))
            self.v_bias = nn.Parameter(torch.empty(d))
        self.key_bias = config.key_bias
        self.inner_norm = nn.LayerNorm(d, config.norm_eps) if config.norm == "sub" else nn.Identity()
        self.out = nn.Linear(d, d)

    def project(self, x: Tensor) -> Tensor:
        """(T, d) normed to queries, keys and values side by side, (T, 3d)."""
        if self.key_bias:
            qkv: Tensor = self.qkv(x)
            return qkv
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias)

    def merge(self, context: Tensor) -> Tensor:
        """(T, d) contexts of all heads to (T, d)."""
        merged: Tensor = self.out(self.inner_norm(context))
        return merged


class FeedForward(nn.Module):
    """One expert: norm, fc1, GELU, inner norm, fc2; (T, d) to (T, d)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.ffn)
        self.inner_norm = nn.LayerNorm(config.ffn, config.norm_eps) if config.norm == "sub" else nn.Identity()
        self.fc2 = nn.Linear(config.ffn, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.inner_norm(F.gelu(self.fc1(self.norm(x)))))
        return out


class Block(nn.Module):
    """Attention over whole sequences, then the FFN of each row's modality."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        modalities = ["vision", "language"] if config.vocabulary else ["vision"]
        fusion = bool(config.vocabulary) and index >= config.first_fusion
        branches = ["shared"] if config.attention == "shared" else modalities
        self.attention = nn.ModuleDict({name: Attention(config) for name in branches})
        self.ffn = nn.ModuleDict({name: FeedForward(config) for name in modalities + ["fusion"] * fusion})
        self.relative = RelativeBias(config) if config.position == "relative-per-block" else None
        scaled = config.layer_scale > 0
        self.attention_scale = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.ffn_scale = nn.Parameter(torch.empty(config.width)) if scaled else None
        self.heads = config.heads
        self.mixed = bool(config.vocabulary)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        keep: Tensor | None = None,
        biases: list[Tensor] | None = None,
        fused: bool = False,
    ) -> Tensor:
        """Map X [T, d] to X [T, d].

        Args:
            x: rows of a packed batch.
            layout: where their sequences lie.
            keep: (2, S) scale of the two branches of every sequence.
            biases: biases (H, M, M) of the attention logits that all blocks share, one for each grid.
            fused: whether all sequences go through the vision-language expert, not pairs alone.
        """
        out = self._attended(x, layout, biases if self.relative is None else self.relative(layout))
        x = x + _scaled(out, self.attention_scale, keep, 0, layout)
        spans = ffn_spans(layout, self.ffn, fused)
        out = _cat([self.ffn[name](part) for (name, _, _), part in zip(spans, _split(x, spans), strict=True)])
        return x + _scaled(out, self.ffn_scale, keep, 1, layout)

    def _attended(self, x: Tensor, layout: Layout, biases: list[Tensor] | None) -> Tensor:
        """The branch of attention, (T, d) to (T, d).

        One set of projections may read rows in any order: then rows are put into the order of sequences where
        the norm writes them and back where they are added, both of which pass over them anyway.
        """
        if "shared" in self.attention and layout.backend != "padded":
            shared = self._attention("shared")
            ordered = shared.project(to_sequences(shared.norm(x), layout))
            return from_sequences(shared.merge(attend_in_order(ordered, layout, self.heads)), layout)
        spans = [
            (self._attention(name), x[a:b], a, b) for name, a, b in attention_spans(layout, self.attention)
        ]
        qkv = _cat([branch.project(branch.norm(rows)) for branch, rows, _, _ in spans])
        context = attend(qkv, layout, self.heads, biases)
        return _cat([branch.merge(context[a:b]) for branch, _, a, b in spans])

    def _attention(self, name: str) -> Attention:
        return cast("Attention", self.attention[name])


def attention_spans(layout: Layout, branches: nn.ModuleDict) -> list[Span]:
    """Rows of each set of projections; with one set, all of them."""
    _, nv, _, total = layout.cuts
    if "shared" in branches:
        return [("shared", 0, total)]
    return [span for span in (("vision", 0, nv), ("language", nv, total)) if span[0] in branches]


def ffn_spans(layout: Layout, experts: nn.ModuleDict, fused: bool = False) -> list[Span]:
    """Rows of each expert. Every expert is named, with an empty span if need be: FSDP needs its gradients."""
    b0, nv, b1, total = layout.cuts
    if "fusion" in experts:
        b0, b1 = (0, total) if fused else (b0, b1)
        return [("vision", 0, b0), ("fusion", b0, b1), ("language", b1, total)]
    if "language" in experts:
        return [("vision", 0, nv), ("language", nv, total)]
    return [("vision", 0, total)]


def _split(x: Tensor, spans: list[Span]) -> list[Tensor]:
    """Rows of every span, which cover all; unlike of slices, the backward pass is one copy."""
    return [x] if len(spans) == 1 else list(torch.split(x, [b - a for _, a, b in spans]))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scaled(branch: Tensor, scale: Tensor | None, keep: Tensor | None, which: int, layout: Layout) -> Tensor:
    """LayerScale, and stochastic depth: the branch of every sequence is scaled."""
    if scale is not None:
        branch = branch * scale.to(branch.dtype)
    if keep is None:
        return branch
    return branch * keep[which].to(branch.dtype)[layout.row_sequence, None]


@dataclass(frozen=True)
class Packed:
    """The input of one forward pass."""

    layout: Layout
    pixels: Tensor
    """(images + pairs, C, H, W) normalised."""
    image_mask: Tensor | None = None
    """(images + pairs, N) bool, True where the mask token stands."""
    ids: Tensor | None = None
    """(rows of C and D,) int64."""
    keep: Tensor | None = None
    """(layers, 2, S) scale of every branch of every sequence: stochastic depth."""
    picture_types: Tensor | None = None
    """(images + pairs,) row of ``token_types`` of every picture; 1 without."""


@dataclass(frozen=True)
class Encoded:
    """What the model makes of a packed batch: what tasks and heads read."""

    model: "Multiway"
    packed: Packed
    rows: Tensor
    """X [T, d] after the last block and the final norm, if there is one."""
    last: Tensor
    """X [T, d] after the last block, before the final norm."""
    inner: Mapping[int, Tensor] = field(default_factory=dict)
    """X [T, d] after that many blocks, for the depths that were asked for."""

    def fused(self) -> Tensor:
        """X [T, d] when every sequence leaves for the vision-language experts where they begin (VLMo's ITC).

        Needs the depth ``config.first_fusion``.
        """
        first = self.model.config.first_fusion
        x = self.model.through(self.inner[first], self.packed, range(first, self.model.config.layers), True)
        return self.model.final(x, self.packed.layout)


class Multiway(nn.Module):
    """The one model."""

    attention_backend = "padded"
    """Kernel of attention, one of ``attention.BACKENDS``; the engine sets it, as it sets the device."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_embed = VisionEmbedding(config)
        self.text_embed = TextEmbedding(config) if config.vocabulary else None
        self.token_type = nn.Embedding(config.token_types, config.width) if config.token_types else None
        self.relative = RelativeBias(config) if config.position == "relative-shared" else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        modalities = ["vision", "language"] if config.vocabulary else ["vision"]
        branches = ["shared"] if config.attention == "shared" else modalities
        if not config.final_norm:
            branches = []
        self.norm = nn.ModuleDict({name: nn.LayerNorm(config.width, config.norm_eps) for name in branches})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision_embed.cls_token.device

    def layout(self, plan: BatchPlan) -> Layout:
        """The index tensors of a plan for this model, on its device."""
        return Layout.of(plan, self.config, self.device, self.attention_backend)

    def embed(self, packed: Packed) -> Tensor:
        """Tokens of both modalities, X [T, d]."""
        x: Tensor = self.vision_embed(packed.pixels, packed.image_mask)
        if self.token_type is not None:
            types = packed.picture_types
            types = torch.ones(len(x), dtype=torch.int64, device=x.device) if types is None else types
            x = x + self.token_type(types)[:, None]
        x = x.flatten(0, 1)
        if self.text_embed is None:
            return x
        ids = packed.ids if packed.ids is not None else packed.layout.text_positions[:0]
        text: Tensor = self.text_embed(ids, packed.layout.text_positions)
        if self.token_type is not None:
            text = text + self.token_type(torch.zeros_like(ids))
        return torch.cat([x, text.to(x.dtype)])

    def through(
        self, x: Tensor, packed: Packed, blocks: Iterable[int], fused: bool = False,
        inner: dict[int, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Map X [T, d] through some blocks; ``inner`` gets the rows after each of its depths."""
        biases = None if self.relative is None else self.relative(packed.layout)
        for index in blocks:
            keep = None if packed.keep is None else packed.keep[index]
            x = self.blocks[index](x, packed.layout, keep, biases, fused)
            if inner is not None and index + 1 in inner:
                inner[index + 1] = x
        return x

    def final(self, x: Tensor, layout: Layout) -> Tensor:
        """The final norm of X [T, d], or X itself if there is none."""
        if not self.config.final_norm:
            return x
        spans = attention_spans(layout, self.norm)
        return _cat(
            [self.norm[name](part) for (name, _, _), part in zip(spans, _split(x, spans), strict=True)]
        )

    def encoded(self, packed: Packed, depths: Iterable[int] = ()) -> Encoded:
        """Encode a packed batch; the rows after ``depths`` blocks are kept besides the last."""
        x = self.embed(packed)
        inner = dict.fromkeys(depths, x)
        last = self.through(x, packed, range(self.config.layers), inner=inner)
        return Encoded(self, packed, self.final(last, packed.layout), last, inner)

    def encode(self, packed: Packed, depth: int | None = None) -> Tensor:
        """X [T, d] after the final norm, or with ``depth`` the output of that many blocks without it."""
        if depth is None:
            return self.encoded(packed).rows
        return self.through(self.embed(packed), packed, range(self.config.layers)[:depth])

    def patches(self, images: Tensor, depth: int | None = None) -> Tensor:
        """Patch tokens of (B, C, H, W), the class token dropped: (B, N, d); ``depth`` as of ``encode``."""
        tokens = self.config.picture_tokens
        layout = self.layout(plan_of(tokens, len(images), [], []))
        return self.encode(Packed(layout, images), depth).view(len(images), tokens, -1)[
            :, self.config.prefix :
        ]

    def pack(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        image_mask: Tensor | None = None,
        text_pad: Tensor | None = None,
        *,
        dual: bool = False,
        causal_text: bool = False,
        second: bool = False,
    ) -> tuple[Packed, Tensor | None]:
        """Padded tensors, as of ``forward``, to a packed batch, and (B, S) bool of the text's real tokens.

        With both, every picture and its text become one sequence; with ``dual`` two. ``causal_text``: text
        sees its picture and earlier text alone (captioning). ``second``: the pictures are NLVR2's second
        ones.

        Raises:
            ValueError: nothing is given, or text to a model without a language branch.
        """
        if image is None and text is None:
            raise ValueError("give image, text or both")
        if text is not None and self.text_embed is None:
            raise ValueError("this model has no language branch: its vocabulary is 0")
        self._check(image, image_mask)
        real, ids, lengths = unpadded(text, text_pad)
        count = 0 if image is None else len(image)
        joint = image is not None and text is not None and not dual
        if joint and count != len(lengths):
            raise ValueError(f"{count} pictures and {len(lengths)} texts do not make pairs")
        if max(lengths, default=0) > self.config.text_tokens:
            raise ValueError(f"a text has {max(lengths)} tokens, this model reads {self.config.text_tokens}")
        plan = BatchPlan(
            self.config.picture_tokens,
            0 if joint else count,
            tuple(lengths) if joint else (),
            () if joint else tuple(lengths),
            causal_text,
        )
        if image is None:
            empty = (0, self.config.channels, *self.config.size)
            image, image_mask = self.vision_embed.cls_token.new_zeros(empty), None
        types = torch.full((len(image),), 2, device=image.device) if second else None
        return Packed(self.layout(plan), image, image_mask, ids, picture_types=types), real

    def _check(self, image: Tensor | None, mask: Tensor | None) -> None:
        """Refuse pictures and masks that would be broadcast or cast without a word."""
        if image is not None and (image.ndim != 4 or not image.is_floating_point()):
            raise ValueError(
                f"image is {tuple(image.shape)} {image.dtype}; it must be (B, C, H, W) normalised floats"
            )
        wanted = None if image is None else (len(image), self.config.patches)
        if mask is not None and wanted and (tuple(mask.shape) != wanted or mask.dtype != torch.bool):
            raise ValueError(f"image_mask is {tuple(mask.shape)} {mask.dtype}; it must be {wanted} bool")

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *,
        image_mask: Tensor | None = None,
        text_pad: Tensor | None = None,
    ) -> Tensor:
        """Encode pictures, texts or pairs.

        Args:
            image: (B, 3, H, W) normalised.
            text: (B, S) int64.
            image_mask: (B, N) bool, True where the mask token replaces the patch.
            text_pad: (B, S) bool, True at padding; every text keeps at least one token.

        Returns:
            (B, P, d) for pictures, (B, S, d) for texts, (B, P + S, d) for pairs; zeros at padding.

        Raises:
            ValueError: sizes or lengths that the model does not read.
        """
        packed, real = self.pack(image, text, image_mask, text_pad)
        return self.unpack(self.encode(packed), packed, real)

    def unpack(self, rows: Tensor, packed: Packed, real: Tensor | None) -> Tensor:
        """Rows of what ``pack`` made, padded again, as ``forward`` gives them."""
        nv, count = packed.layout.plan.cuts[1], len(packed.pixels)
        seen = rows[:nv].view(count, self.config.picture_tokens, rows.shape[1])
        if real is None:
            return seen
        read = rows.new_zeros(*real.shape, rows.shape[1])
        read[real] = rows[nv:]
        if not count:
            return read
        return torch.cat([read, seen] if self.config.text_first else [seen, read], dim=1)
