"""The heads of the family: what turns encoded tokens into logits or vectors.

Letters: n samples, N patches, P tokens of a picture, d width, V answers, classes or ids, m any rows.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.config import ModelConfig
from beitctl.model.embed import BERT_EPS
from beitctl.model.multiway import Block, Encoded

HEAD_EPS = 1e-5
"""Epsilon of the LayerNorms inside heads, PyTorch's default in all released code."""


class Classifier(nn.Module):
    """Class logits of pictures.

    A model without a final norm is read by the mean of its patches, which gets a norm of its own (BEiT,
    BEiT-3); one with a final norm by its class token (ViT), and by the distillation token as well if it has
    one (DeiT).
    """

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.prefix = config.prefix
        self.norm = None if config.final_norm else nn.LayerNorm(config.width, config.norm_eps)
        self.linear = nn.Linear(config.width, classes)
        self.distilled = nn.Linear(config.width, classes) if config.distill_token else None

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, P, d) encoded tokens of pictures to (n, V) logits; DeiT's two predictions are averaged."""
        by_class, by_teacher = self.both(tokens)
        return by_class if by_teacher is None else (by_class + by_teacher) / 2

    def both(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (n, V) of the class token or the mean patch, and of the distillation token."""
        if self.norm is not None:
            by_class: Tensor = self.linear(self.norm(tokens[:, self.prefix :].mean(1)))
        else:
            by_class = self.linear(tokens[:, 0])
        return by_class, None if self.distilled is None else self.distilled(tokens[:, 1])


class ContrastiveHead(nn.Module):
    """One projection per modality and a temperature, which starts at CLIP's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vision = nn.Linear(width, width, bias=False)
        self.language = nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))  # 1-D: FSDP2 cannot shard a 0-D parameter

    def pictures(self, tokens: Tensor) -> Tensor:
        """(n, d) class tokens to unit vectors (n, d), fp32."""
        return F.normalize(self.vision(tokens).float(), dim=-1)

    def texts(self, tokens: Tensor) -> Tensor:
        """(n, d) first text tokens to unit vectors (n, d), fp32."""
        return F.normalize(self.language(tokens).float(), dim=-1)

    def forward(self, pictures: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, d) class tokens of both branches to unit vectors (n, d) in fp32, and the logits' scale."""
        return self.pictures(pictures), self.texts(texts), self.logit_scale.float().exp()


class Pooler(nn.Module):
    """First token to a vector: a norm if there is one (BEiT-3's VQA), linear, tanh (BERT)."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, HEAD_EPS) if norm else nn.Identity()
        self.linear = nn.Linear(width, width)

    def forward(self, token: Tensor) -> Tensor:
        """(n, d) to (n, d)."""
        return torch.tanh(self.linear(self.norm(token)))


class MlpHead(nn.Module):
    """A norm if there is one (BEiT-3's NLVR2), linear, norm, GELU, linear."""

    def __init__(self, width: int, hidden: int, out: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, HEAD_EPS) if norm else nn.Identity()
        self.up = nn.Linear(width, hidden)
        self.inner_norm = nn.LayerNorm(hidden, HEAD_EPS)
        self.out = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width) to (n, V) logits."""
        logits: Tensor = self.out(F.gelu(self.inner_norm(self.up(self.norm(x)))))
        return logits


class BertHead(nn.Module):
    """Token logits with BERT's transform before them: linear, GELU, norm, linear (VLMo)."""

    def __init__(self, width: int, ids: int) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, BERT_EPS)
        self.out = nn.Linear(width, ids)

    def forward(self, x: Tensor) -> Tensor:
        """(m, d) to (m, V) logits."""
        logits: Tensor = self.out(self.norm(F.gelu(self.transform(x))))
        return logits


class Aggregation(nn.Module):
    """BEiT v2's bottleneck: the last class token with the patches of an early block, through extra blocks.

    What the patches must know then has to pass through the class token. The blocks carry the number that they
    have behind the early ones, from which their initial weights and their stochastic depth follow. Source:
    arXiv:2208.06366, section 2.3; thrown away for fine-tuning.
    """

    def __init__(self, config: ModelConfig, early_layers: int, head_layers: int) -> None:
        super().__init__()
        numbers = range(early_layers, early_layers + head_layers)
        self.blocks = nn.ModuleDict({str(number): Block(config, number) for number in numbers})
        self.early_layers = early_layers

    def forward(self, encoded: Encoded) -> Tensor:
        """X [T, d] after the extra blocks and the model's final norm; needs the depth ``early_layers``."""
        packed, model = encoded.packed, encoded.model
        layout, tokens = packed.layout, model.config.picture_tokens
        first = torch.arange(layout.plan.pictures, device=encoded.rows.device) * tokens
        x = encoded.inner[self.early_layers].index_copy(0, first, encoded.last[first])
        biases = None if model.relative is None else model.relative(layout)
        for number, block in self.blocks.items():
            keep = None if packed.keep is None else packed.keep[min(int(number), model.config.layers - 1)]
            x = block(x, layout, keep, biases)
        return model.final(x, layout)
