"""What ``load_model`` returns for weights with heads: one class per use, chosen by the names of the heads.

Letters: B samples, N patches, P tokens of a picture, S tokens of a text, d width, V classes, answers or ids.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from beitctl.config import ModelConfig
from beitctl.model.dense import Segmenter, default_taps, feature_maps
from beitctl.model.heads import Aggregation, BertHead, Classifier, ContrastiveHead, MlpHead, Pooler
from beitctl.model.multiway import Encoded, Multiway

Shapes = Mapping[str, torch.Size]
"""Shapes of the tensors under ``heads.``, without that prefix."""


class HeadedModel(nn.Module):
    """A Multiway Transformer with heads; ``forward`` gives their output."""

    names: ClassVar[tuple[str, ...]] = ()
    """The heads that it may have."""
    needed: ClassVar[tuple[str, ...]] = ()
    """Those of them that it must have."""

    def __init__(self, config: ModelConfig, shapes: Shapes) -> None:
        super().__init__()
        self.model = Multiway(config)
        self.heads = nn.ModuleDict(self.build(config, shapes))

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        """The heads that the tensors belong to."""
        raise NotImplementedError

    def encoded(
        self, image: Tensor | None, text: Tensor | None, text_pad: Tensor | None, **how: Any
    ) -> tuple[Encoded, Tensor]:
        """Encode, as of ``Multiway.pack``; and the row of the first token of every text."""
        packed, _ = self.model.pack(image, text, how.pop("image_mask", None), text_pad, **how)
        encoded = self.model.encoded(packed, self.depths())
        return encoded, torch.from_numpy(packed.layout.plan.text_starts.copy()).to(self.model.device)

    def depths(self) -> list[int]:
        """Numbers of blocks after which the heads read the rows, besides the last."""
        return []

    def pictures(self, encoded: Encoded, rows: Tensor | None = None) -> Tensor:
        """(B, P, d) tokens of the pictures in ``rows``, by default the last ones."""
        rows = encoded.rows if rows is None else rows
        tokens = self.model.config.picture_tokens
        return rows[: encoded.packed.layout.plan.cuts[1]].view(-1, tokens, rows.shape[1])

    def pooled(self, image: Tensor | None, text: Tensor | None, text_pad: Tensor | None) -> Tensor:
        """(B, d) pooled first token of pictures, texts or pairs."""
        encoded, first = self.encoded(image, text, text_pad)
        by_text = text is not None and (image is None or self.model.config.text_first)
        pooled: Tensor = self.heads["pooler"](
            encoded.rows[first] if by_text else self.pictures(encoded)[:, 0]
        )
        return pooled


class ClassificationModel(HeadedModel):
    """Class logits of pictures."""

    names: ClassVar[tuple[str, ...]] = ("classifier",)
    needed: ClassVar[tuple[str, ...]] = ("classifier",)

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        return {"classifier": Classifier(config, shapes["classifier.linear.weight"][0])}

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to (B, V) logits."""
        encoded, _ = self.encoded(image, None, None)
        logits: Tensor = self.heads["classifier"](self.pictures(encoded))
        return logits


class TextClassificationModel(HeadedModel):
    """Class logits of texts, from their first token."""

    names: ClassVar[tuple[str, ...]] = ("text_classifier",)
    needed: ClassVar[tuple[str, ...]] = ("text_classifier",)

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        return {"text_classifier": nn.Linear(config.width, shapes["text_classifier.weight"][0])}

    def forward(self, text: Tensor, *, text_pad: Tensor | None = None) -> Tensor:
        """Texts (B, S) to (B, V) logits."""
        encoded, first = self.encoded(None, text, text_pad)
        logits: Tensor = self.heads["text_classifier"](encoded.rows[first])
        return logits


class SegmentationModel(HeadedModel):
    """Class logits of every pixel; ``taps`` are the blocks after which its four maps are taken."""

    names: ClassVar[tuple[str, ...]] = ("segmenter",)
    needed: ClassVar[tuple[str, ...]] = ("segmenter",)

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        self.taps = default_taps(config.layers)
        classes = shapes["segmenter.decode_head.classifier.weight"][0]
        other = "segmenter.auxiliary_head.classifier.weight" in shapes
        return {"segmenter": Segmenter(config, classes, auxiliary=other)}

    def depths(self) -> list[int]:
        return sorted(set(self.taps))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised, of h x w patches, to (B, V, 4 h, 4 w) logits."""
        encoded, _ = self.encoded(image, None, None)
        rows = torch.arange(len(encoded.rows), device=self.model.device).view(len(image), -1)
        logits: Tensor = self.heads["segmenter"](feature_maps(encoded, rows, self.taps))
        return logits


class RetrievalModel(HeadedModel):
    """Unit vectors of pictures and texts that can be compared by their dot product."""

    names: ClassVar[tuple[str, ...]] = ("contrastive", "pooler")
    needed: ClassVar[tuple[str, ...]] = ("contrastive",)

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        return {"contrastive": ContrastiveHead(config.width)} | _pooler(config, shapes)

    def embed_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to L2-normalised vectors (B, d)."""
        encoded, _ = self.encoded(image, None, None)
        return self._contrastive().pictures(self.pictures(encoded)[:, 0])

    def embed_text(self, text: Tensor, text_pad: Tensor | None = None) -> Tensor:
        """(B, S) ids and their padding to L2-normalised vectors (B, d)."""
        encoded, first = self.encoded(None, text, text_pad)
        return self._contrastive().texts(encoded.rows[first])

    def forward(
        self, image: Tensor, text: Tensor, *, text_pad: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of pictures and of texts, (B, d) each, and the scale of their logits."""
        scale = self._contrastive().logit_scale.float().exp()
        return self.embed_image(image), self.embed_text(text, text_pad), scale

    def _contrastive(self) -> ContrastiveHead:
        head = self.heads["contrastive"]
        assert isinstance(head, ContrastiveHead)
        return head


class AnswerModel(HeadedModel):
    """Answer logits of a picture and a question, from the first token of both (VQAv2)."""

    names: ClassVar[tuple[str, ...]] = ("pooler", "answers")
    needed: ClassVar[tuple[str, ...]] = ("pooler", "answers")

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        up, out = shapes["answers.up.weight"], shapes["answers.out.weight"]
        return {"answers": MlpHead(up[1], up[0], out[0])} | _pooler(config, shapes)

    def forward(self, image: Tensor, text: Tensor, *, text_pad: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W) and questions (B, S) to (B, V) logits."""
        _need_both(image, text)
        logits: Tensor = self.heads["answers"](self.pooled(image, text, text_pad))
        return logits


class ReasoningModel(HeadedModel):
    """False or true of a sentence about two pictures (NLVR2).

    Each picture is encoded with the sentence; the head reads both. BEiT-3 takes the first tokens of picture
    and text, VLMo their pooled first token.
    """

    names: ClassVar[tuple[str, ...]] = ("pooler", "reasoning")
    needed: ClassVar[tuple[str, ...]] = ("reasoning",)

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        up, out = shapes["reasoning.up.weight"], shapes["reasoning.out.weight"]
        norm = "reasoning.norm.weight" in shapes
        return {"reasoning": MlpHead(up[1], up[0], out[0], norm)} | _pooler(config, shapes)

    def forward(
        self, image: Tensor, text: Tensor, *, image2: Tensor, text_pad: Tensor | None = None
    ) -> Tensor:
        """Two pictures (B, 3, H, W) each and sentences (B, S) to (B, 2) logits: false, true."""
        both = torch.cat(
            [self._read(image, text, text_pad, 1), self._read(image2, text, text_pad, 2)], dim=-1
        )
        logits: Tensor = self.heads["reasoning"](both)
        return logits

    def _read(self, image: Tensor, text: Tensor, text_pad: Tensor | None, which: int) -> Tensor:
        packed, _ = self.model.pack(image, text, None, text_pad, second=which == 2)
        encoded = self.model.encoded(packed)
        first = encoded.rows[torch.from_numpy(packed.layout.plan.text_starts.copy()).to(self.model.device)]
        if "pooler" in self.heads:
            pooled: Tensor = self.heads["pooler"](first)
            return pooled
        return torch.cat([self.pictures(encoded)[:, 0], first], dim=-1)


class CaptioningModel(HeadedModel):
    """Logits of the next words of captions: text sees its picture and what stands before it."""

    names: ClassVar[tuple[str, ...]] = ("captions",)
    needed: ClassVar[tuple[str, ...]] = ("captions",)

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        return {"captions": nn.Linear(config.width, shapes["captions.weight"][0])}

    def forward(self, image: Tensor, text: Tensor, *, text_pad: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W) and captions (B, S) to (B, S, V) logits; zeros at padding."""
        _need_both(image, text)
        packed, real = self.model.pack(image, text, None, text_pad, causal_text=True)
        logits: Tensor = self.heads["captions"](self.model.encode(packed)[packed.layout.plan.cuts[1] :])
        return _spread(logits, real)


class PooledModel(HeadedModel):
    """One vector for pictures, texts or pairs, made from their first token: a body and its pooler."""

    names: ClassVar[tuple[str, ...]] = ("pooler",)
    needed: ClassVar[tuple[str, ...]] = ("pooler",)

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        return _pooler(config, shapes)

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None, *, text_pad: Tensor | None = None
    ) -> Tensor:
        """Pictures (B, 3, H, W), texts (B, S) or pairs of them to (B, d)."""
        return self.pooled(image, text, text_pad)


class MaskedModel(HeadedModel):
    """What hidden patches and hidden words are: the heads of pretraining.

    ``forward`` gives a dictionary with what the model has: ``image`` (B, N, V) for the patches, ``class``
    the same through BEiT v2's bottleneck, ``text`` (B, S, V) for the words, zeros at padding.
    """

    names: ClassVar[tuple[str, ...]] = ("image_codes", "text_tokens", "aggregation", "pooler")

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        heads = _text_head(config, shapes) | _pooler(config, shapes)
        heads |= _image_head(config, shapes)
        numbers = {int(name.split(".")[2]) for name in shapes if name.startswith("aggregation.blocks.")}
        if numbers:
            heads["aggregation"] = Aggregation(config, min(numbers), len(numbers))
        return heads

    def depths(self) -> list[int]:
        found = [head for head in self.heads.values() if isinstance(head, Aggregation)]
        return [head.early_layers for head in found]

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        *,
        image_mask: Tensor | None = None,
        text_pad: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Logits by what they predict; arguments as of ``Multiway.forward``."""
        packed, real = self.model.pack(image, text, image_mask, text_pad)
        encoded = self.model.encoded(packed, self.depths())
        found = {}
        if image is not None and "image_codes" in self.heads:
            head, first = self.heads["image_codes"], self.model.config.prefix
            found["image"] = head(self.pictures(encoded)[:, first:])
            if "aggregation" in self.heads:
                found["class"] = head(self.pictures(encoded, self.heads["aggregation"](encoded))[:, first:])
        if "text_tokens" in self.heads and real is not None:
            logits = self.heads["text_tokens"](encoded.rows[packed.layout.plan.cuts[1] :])
            found["text"] = _spread(logits, real)
        return found


class MatchingModel(RetrievalModel):
    """VLMo as it is pretrained: ``forward`` says of pairs whether they match and what their words are.

    A dictionary with what the file has: ``match`` (B, 2) logits, ``text`` (B, S, V) logits, zeros at padding;
    ``image`` (B, N, V) logits of the patches if codes were learnt as well.
    """

    names: ClassVar[tuple[str, ...]] = (
        "contrastive",
        "contrastive_fused",
        "pooler",
        "matching",
        "text_tokens",
        "image_codes",
    )
    needed: ClassVar[tuple[str, ...]] = ()

    def build(self, config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
        heads = _text_head(config, shapes) | _pooler(config, shapes)
        for name in ("contrastive", "contrastive_fused"):
            if f"{name}.vision.weight" in shapes:
                heads[name] = ContrastiveHead(config.width)
        if "matching.weight" in shapes:
            heads["matching"] = nn.Linear(config.width, shapes["matching.weight"][0])
        return heads | _image_head(config, shapes)

    def depths(self) -> list[int]:
        return [self.model.config.first_fusion] if "contrastive_fused" in self.heads else []

    def embed_fused(
        self, image: Tensor | None = None, text: Tensor | None = None, text_pad: Tensor | None = None
    ) -> Tensor:
        """Pictures or texts to unit vectors (B, d) through the vision-language experts on top."""
        head = self.heads["contrastive_fused"]
        assert isinstance(head, ContrastiveHead)
        encoded, first = self.encoded(image, text, text_pad)
        if text is None:
            return head.pictures(self.pictures(encoded, encoded.fused())[:, 0])
        return head.texts(encoded.fused()[first])

    def forward(  # type: ignore[override]
        self, image: Tensor, text: Tensor, *, text_pad: Tensor | None = None
    ) -> dict[str, Tensor]:
        _need_both(image, text)
        packed, real = self.model.pack(image, text, None, text_pad)
        plan = packed.layout.plan
        rows, found = self.model.encode(packed), {}
        if "matching" in self.heads:
            first = torch.from_numpy(plan.text_starts.copy()).to(rows.device)
            found["match"] = self.heads["matching"](self.heads["pooler"](rows[first]))
        if "text_tokens" in self.heads:
            found["text"] = _spread(self.heads["text_tokens"](rows[plan.cuts[1] :]), real)
        if "image_codes" in self.heads:
            tokens = rows[: plan.cuts[1]].view(len(image), -1, rows.shape[1])
            found["image"] = self.heads["image_codes"](tokens[:, self.model.config.prefix :])
        return found


MODELS: tuple[type[HeadedModel], ...] = (
    ClassificationModel,
    SegmentationModel,
    TextClassificationModel,
    RetrievalModel,
    AnswerModel,
    ReasoningModel,
    CaptioningModel,
    PooledModel,
    MaskedModel,
    MatchingModel,
)


def model_with(config: ModelConfig, shapes: Shapes) -> HeadedModel | None:
    """The model whose heads the tensors belong to; None if no class has such heads."""
    heads = {name.partition(".")[0] for name in shapes}
    if "matching" in heads and "pooler" not in heads:
        return None  # what it reads is missing
    for kind in MODELS:
        if heads and set(kind.needed) <= heads <= set(kind.names):
            return kind(config, shapes)
    return None


def _need_both(image: Tensor | None, text: Tensor | None) -> None:
    if image is None or text is None:
        raise ValueError("this model reads pairs: give image and text")


def _pooler(config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
    if "pooler.linear.weight" not in shapes:
        return {}
    return {"pooler": Pooler(config.width, norm="pooler.norm.weight" in shapes)}


def _image_head(config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
    if "image_codes.weight" not in shapes:
        return {}
    return {"image_codes": nn.Linear(config.width, shapes["image_codes.weight"][0])}


def _text_head(config: ModelConfig, shapes: Shapes) -> dict[str, nn.Module]:
    if "text_tokens.weight" in shapes:
        return {"text_tokens": nn.Linear(config.width, shapes["text_tokens.weight"][0])}
    if "text_tokens.out.weight" in shapes:
        return {"text_tokens": BertHead(config.width, shapes["text_tokens.out.weight"][0])}
    return {}


def _spread(logits: Tensor, real: Tensor | None) -> Tensor:
    """(tokens, V) logits of all texts to (B, S, V), zeros at padding."""
    assert real is not None
    found = logits.new_zeros(*real.shape, logits.shape[-1])
    found[real] = logits
    return found
