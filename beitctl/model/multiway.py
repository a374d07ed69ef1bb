"""The Multiway Transformer: one model, of which BEiT-3 (paper and released) are settings.

A block is self-attention and an expert FFN per modality, both pre-norm, with the two inner LayerNorms of
Magneto when ``norm = "sub"``. All of it works on rows: X [T, d] laid out by ``beitctl.model.plan``. The split
between the modalities comes with every call; no module remembers it.

Sources: BEiT-3, arXiv:2208.10442; VLMo, arXiv:2111.02358; Magneto (sub-LN), arXiv:2210.06423.
Letters: B batch, T rows, d width, f FFN width, P tokens of a picture, N patches, S sequences.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.attention import Layout, attend
from beitctl.model.plan import plan_of

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
        """(T, d) to queries, keys and values side by side, (T, 3d)."""
        x = self.norm(x)
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
        fusion = bool(config.vocabulary) and index >= config.layers - config.fusion_layers
        branches = ["shared"] if config.attention == "shared" else modalities
        self.attention = nn.ModuleDict({name: Attention(config) for name in branches})
        self.ffn = nn.ModuleDict({name: FeedForward(config) for name in modalities + ["fusion"] * fusion})
        self.heads = config.heads

    def forward(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """Map X [T, d] to X [T, d]; ``keep`` (2, S) scales the two branches of every sequence."""
        spans = attention_spans(layout, self.attention)
        qkv = _cat([self._attention(name).project(x[a:b]) for name, a, b in spans])
        context = attend(qkv, layout, self.heads)
        out = _cat([self._attention(name).merge(context[a:b]) for name, a, b in spans])
        x = x + _scaled(out, keep, 0, layout)
        out = _cat([self.ffn[name](x[a:b]) for name, a, b in ffn_spans(layout, self.ffn)])
        return x + _scaled(out, keep, 1, layout)

    def _attention(self, name: str) -> Attention:
        return cast("Attention", self.attention[name])


def attention_spans(layout: Layout, branches: nn.ModuleDict) -> list[Span]:
    """Rows of each set of projections; with one set, all of them."""
    _, nv, _, total = layout.plan.cuts
    if "shared" in branches:
        return [("shared", 0, total)]
    return [span for span in (("vision", 0, nv), ("language", nv, total)) if span[0] in branches]


def ffn_spans(layout: Layout, experts: nn.ModuleDict) -> list[Span]:
    """Rows of each expert. Every expert is named, with an empty span if need be: FSDP needs its gradients."""
    b0, nv, b1, total = layout.plan.cuts
    if "fusion" in experts:
        return [("vision", 0, b0), ("fusion", b0, b1), ("language", b1, total)]
    if "language" in experts:
        return [("vision", 0, nv), ("language", nv, total)]
    return [("vision", 0, total)]


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _scaled(branch: Tensor, keep: Tensor | None, which: int, layout: Layout) -> Tensor:
    """Stochastic depth: scale the branch of every sequence."""
    if keep is None:
        return branch
    return branch * keep[which].to(branch.dtype)[layout.row_sequence, None]


class VisionEmbedding(nn.Module):
    """Patches to tokens, with class token, mask token and learned positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.patch_px = config.patch_px
        self.proj = nn.Linear(config.channels * config.patch_px**2, d)
        self.cls_token = nn.Parameter(torch.empty(d))
        self.mask_token = nn.Parameter(torch.empty(d))
        self.position = nn.Parameter(torch.empty(1 + config.patches, d))

    def forward(self, pixels: Tensor, mask: Tensor | None) -> Tensor:
        """(n, C, H, W) normalised pixels and (n, N) bool mask to (n, P, d)."""
        n, channels, height, width = pixels.shape
        p = self.patch_px
        x = pixels.reshape(n, channels, height // p, p, width // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(n, (height // p) * (width // p), channels * p * p)
        x = self.proj(x.to(self.proj.weight.dtype))
        if mask is not None:
            x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        cls = self.cls_token.to(x.dtype).expand(n, 1, -1)
        return torch.cat([cls, x], dim=1) + self.position.to(x.dtype)


class TextEmbedding(nn.Module):
    """Ids to tokens, with learned positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.text_tokens, config.width)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(rows,) ids and their positions to (rows, d)."""
        tokens: Tensor = self.token(ids) + self.position(positions)
        return tokens


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


class Multiway(nn.Module):
    """The one model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_embed = VisionEmbedding(config)
        self.text_embed = TextEmbedding(config) if config.vocabulary else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        branches = ["shared"] if config.attention == "shared" else ["vision", "language"]
        self.norm = nn.ModuleDict({name: nn.LayerNorm(config.width, config.norm_eps) for name in branches})

    def embed(self, packed: Packed) -> Tensor:
        """Tokens of both modalities, X [T, d]."""
        x: Tensor = self.vision_embed(packed.pixels, packed.image_mask).flatten(0, 1)
        if self.text_embed is None:
            return x
        ids = packed.ids if packed.ids is not None else packed.layout.text_positions[:0]
        return torch.cat([x, self.text_embed(ids, packed.layout.text_positions)])

    def encode(self, packed: Packed, depth: int | None = None) -> Tensor:
        """Encode a packed batch: X [T, d] after the final norm, in the rows of its plan.

        With ``depth``, the output of that many blocks instead, without the final norm.
        """
        x = self.embed(packed)
        for index, block in enumerate(self.blocks[:depth]):
            x = block(x, packed.layout, None if packed.keep is None else packed.keep[index])
        if depth is not None:
            return x
        spans = attention_spans(packed.layout, self.norm)
        return _cat([self.norm[name](x[a:b]) for name, a, b in spans])

    def patches(self, images: Tensor, depth: int | None = None) -> Tensor:
        """Patch tokens of (B, C, H, W), the class token dropped: (B, N, d); ``depth`` as of ``encode``."""
        tokens = self.config.patches + 1
        layout = Layout.of(plan_of(tokens, len(images), [], []), images.device)
        return self.encode(Packed(layout, images), depth).view(len(images), tokens, -1)[:, 1:]

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
        """
        if image is None and text is None:
            raise ValueError("give image, text or both")
        if text is not None and self.text_embed is None:
            raise ValueError("this model has no language branch: its vocabulary is 0")
        token = self.config.patches + 1
        real, ids, lengths = unpadded(text, text_pad)
        images = 0 if image is None or text is not None else len(image)
        pairs, texts = (lengths, []) if image is not None else ([], lengths)
        device = self.vision_embed.position.device
        layout = Layout.of(plan_of(token, images, pairs, texts), device)
        if image is None:
            side = self.config.image_px
            image = self.vision_embed.position.new_zeros(0, self.config.channels, side, side)
            image_mask = None
        rows = self.encode(Packed(layout, image, image_mask, ids))
        nv = layout.plan.cuts[1]
        seen = rows[:nv].view(len(image), token, self.config.width)
        if real is None:
            return seen
        read = rows.new_zeros(*real.shape, rows.shape[1])
        read[real] = rows[nv:]
        return read if not len(image) else torch.cat([seen, read], dim=1)


def unpadded(text: Tensor | None, text_pad: Tensor | None) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """Padded texts (B, S) to what a packed batch holds: (B, S) bool of real tokens, their ids, their counts.

    Raises:
        ValueError: a text is padding from end to end.
    """
    if text is None:
        return None, None, []
    real = torch.ones_like(text, dtype=torch.bool) if text_pad is None else ~text_pad
    lengths: list[int] = real.sum(1).tolist()
    if min(lengths, default=1) < 1:
        raise ValueError(f"text {lengths.index(0)} of the batch has no token that is not padding")
    return real, text[real], lengths
