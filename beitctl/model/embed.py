"""Pixels and ids to tokens.

Letters: n pictures, N patches, P tokens of a picture, d width, rows: text tokens of a packed batch.
"""

import torch
from torch import Tensor, nn

from beitctl.config import ModelConfig

BERT_EPS = 1e-12
"""Epsilon of BERT's LayerNorm after the text embedding."""


class VisionEmbedding(nn.Module):
    """Patches to tokens, with class token, mask token and learned positions as the settings say."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.width
        self.config = config
        self.proj = nn.Linear(config.channels * config.patch_px**2, d)
        self.cls_token = nn.Parameter(torch.empty(d))
        self.distill_token = nn.Parameter(torch.empty(d)) if config.distill_token else None
        self.mask_token = nn.Parameter(torch.empty(d)) if config.mask_token else None
        absolute = config.position == "absolute"
        self.position = nn.Parameter(torch.empty(config.picture_tokens, d)) if absolute else None

    def forward(self, pixels: Tensor, mask: Tensor | None) -> Tensor:
        """(n, C, H, W) normalised pixels and (n, N) bool mask to (n, P, d).

        Raises:
            ValueError: the pictures have another size; patches are masked and there is no mask token.
        """
        n, channels, height, width = pixels.shape
        if (height, width) != self.config.size or channels != self.config.channels:
            raise ValueError(
                f"pictures are {channels} x {height} x {width}, this model reads {self.config.channels} x "
                f"{self.config.size[0]} x {self.config.size[1]}; load_model(..., image_px=...) changes it"
            )
        p = self.config.patch_px
        x = pixels.reshape(n, channels, height // p, p, width // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(n, (height // p) * (width // p), channels * p * p)
        x = self.proj(x.to(self.proj.weight.dtype))
        if mask is not None:
            x = torch.where(mask[:, :, None], self._mask_token().to(x.dtype), x)
        first: list[Tensor] = [token for token in (self.cls_token, self.distill_token) if token is not None]
        x = torch.cat([torch.stack(first).to(x.dtype).expand(n, -1, -1), x], dim=1)
        return x if self.position is None else x + self.position.to(x.dtype)

    def _mask_token(self) -> Tensor:
        if self.mask_token is None:
            raise ValueError("this model has no mask token: set mask_token = true")
        return self.mask_token


class TextEmbedding(nn.Module):
    """Ids to tokens, with learned positions or BERT's norm as the settings say."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        absolute = config.position == "absolute"
        self.position = nn.Embedding(config.text_tokens, config.width) if absolute else None
        self.type_row = nn.Parameter(torch.empty(config.width)) if config.text_norm else None
        self.norm = nn.LayerNorm(config.width, BERT_EPS) if config.text_norm else nn.Identity()

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(rows,) ids and their positions to (rows, d)."""
        tokens: Tensor = self.token(ids)
        if self.type_row is not None:
            tokens = tokens + self.type_row.to(tokens.dtype)
        if self.position is not None:
            tokens = tokens + self.position(positions)
        normed: Tensor = self.norm(tokens)
        return normed


def unpadded(text: Tensor | None, text_pad: Tensor | None) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """Padded texts (B, S) to what a packed batch holds: (B, S) bool of real tokens, their ids, their counts.

    Raises:
        ValueError: another shape or type; a text is padding from end to end.
    """
    if text is None:
        return None, None, []
    if text.ndim != 2 or text.dtype != torch.int64:
        raise ValueError(f"text is {tuple(text.shape)} {text.dtype}; it must be (B, S) int64")
    if text_pad is not None and (text_pad.shape != text.shape or text_pad.dtype != torch.bool):
        raise ValueError(
            f"text_pad is {tuple(text_pad.shape)} {text_pad.dtype}; it must be {tuple(text.shape)} bool"
        )
    real = torch.ones_like(text, dtype=torch.bool) if text_pad is None else ~text_pad
    lengths: list[int] = real.sum(1).tolist()
    if min(lengths, default=1) < 1:
        raise ValueError(f"text {lengths.index(0)} of the batch has no token that is not padding")
    return real, text[real], lengths
