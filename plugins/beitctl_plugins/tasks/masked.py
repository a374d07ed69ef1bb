"""Masked data modelling on pictures, texts and pairs (BEiT-3, arXiv:2208.10442, section 2.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from beitctl.api import CropScale, Example, Item, Plugin, Term, TextTokenizer, Tools
from beitctl.config import ModelConfig
from beitctl.data.batch import Group
from beitctl.data.images import random_crop
from beitctl.data.masking import block_mask, text_mask
from beitctl.engine.losses import masked_cross_entropy
from beitctl.errors import DataError, UserError
from beitctl.model.heads import Aggregation, BertHead
from beitctl.model.multiway import Encoded
from beitctl_plugins.tasks.preparing import caption_of, framed, loaded, longest, view_of, window

IMAGE_HEAD = "image_codes"
TEXT_HEAD = "text_tokens"
BOTTLENECK = "aggregation"
WHOLE_CROP = (0.2, 1.0)
"""Crop of pictures of which nothing is hidden (BEiT v2's)."""
ONLINE_CROP = (0.2, 1.0)
"""Crop of pictures whose codes are computed online, if the task does not say it (BEiT v2's)."""


class Bottleneck(Plugin):
    """BEiT v2's second path: the last class token and the patches of an early block, through extra blocks."""

    early_layers: int = Field(ge=1)
    """Blocks after which the patches leave (BEiT v2: 9 of 12, 21 of 24)."""
    head_layers: int = Field(default=2, ge=1)
    """Extra blocks; they are thrown away after pretraining."""


class MaskedImage(Plugin):
    """Predict the codes of hidden patches of a picture (BEiT; 40 % hidden in blocks)."""

    layout: ClassVar[Literal["image"]] = "image"

    mask_ratio: float = Field(default=0.4, gt=0, le=1)
    """Share of the patches that are hidden."""
    min_block: int = Field(default=16, ge=1)
    """Smallest block of hidden patches, in patches."""
    exact: bool = True
    """Whether single patches make up for blocks that stay short of the share (BEiT v2), or not (BEiT-1)."""
    bottleneck: Bottleneck | None = None
    """A second prediction through the class token, with the same head (BEiT v2)."""
    crop_scale: CropScale | None = None
    """Smallest and largest share of the picture that a view shows, (0.2, 1.0) by default, where codes are
    computed online; a token store has its own, which this must equal if it is set."""
    jitter: float | None = Field(default=None, ge=0, lt=1)
    """Strength of the random brightness, contrast and saturation that model and tokenizer see, 0 by default
    (papers: 0.4), where codes are computed online; a token store has its own, as above."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task for a model of a few blocks and a grid of 4 x 4 patches."""
        small = {**table, "min_block": 4}
        return small | ({"bottleneck": {"early_layers": 1}} if "bottleneck" in table else {})

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("patch")} | ({"class": Term("patch")} if self.bottleneck else {})

    def depths(self, config: ModelConfig) -> Sequence[int]:
        """The early block that the bottleneck reads."""
        return [self.bottleneck.early_layers] if self.bottleneck else []

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {IMAGE_HEAD: nn.Linear(tools.model.width, _codes(self, tools).codes)}
        if self.bottleneck:
            early, layers = self.bottleneck.early_layers, tools.model.layers
            if early > layers:
                raise UserError(
                    f"bottleneck.early_layers ({early}) must not exceed the model's {layers} blocks"
                )
            found[BOTTLENECK] = Aggregation(tools.model, early, self.bottleneck.head_layers)
        return found

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        return _masked_picture(example, draw, tools, self, (self.mask_ratio, self.min_block, self.exact))

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        head, targets = heads[IMAGE_HEAD], group.patch_targets
        found = {"": masked_cross_entropy(encoded.rows[group.patch_rows], targets, head)}
        if self.bottleneck:
            rows = heads[BOTTLENECK](encoded)
            found["class"] = masked_cross_entropy(rows[group.patch_rows], targets, head)
        return found

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Predicted codes (m,) of the hidden patches."""
        return {"patch": heads[IMAGE_HEAD](encoded.rows[group.patch_rows]).argmax(-1)}


class MaskedText(Plugin):
    """Predict hidden tokens of a text (15 %)."""

    layout: ClassVar[Literal["text"]] = "text"

    mask_ratio: float = Field(default=0.15, gt=0, le=1)
    """Share of the tokens that are hidden; special ones never are."""
    head: Literal["linear", "bert"] = "linear"
    """Head on the tokens: one linear layer (BEiT-3), or BERT's with a transform before it (VLMo)."""
    whole_words: bool = False
    """Whether all tokens of a word are hidden together (VLMo)."""

    def terms(self) -> Mapping[str, Term]:
        return {"": Term("text")}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        return {TEXT_HEAD: _text_head(self.head, tools)}

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        tokenizer = loaded(tools)
        if example.token_ids is None and not example.text:
            raise DataError(f"{example.id}: no text")
        known = tokenizer.encode(example.text or "") if example.token_ids is None else example.token_ids
        ids = framed(window(known, tools.model.text_tokens - 2, draw), tokenizer)
        masked, targets = _hidden(ids, self.mask_ratio, self.whole_words, draw, tokenizer)
        return Item(text=masked, text_targets=targets)

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        return {"": masked_cross_entropy(encoded.rows[group.text_rows], group.text_targets, heads[TEXT_HEAD])}

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Predicted ids (m,) of the hidden tokens."""
        return {"text": heads[TEXT_HEAD](encoded.rows[group.text_rows]).argmax(-1)}


class MaskedPair(Plugin):
    """Predict hidden tokens of a caption (50 %) and hidden patches of its picture (40 %) from both."""

    layout: ClassVar[Literal["pair"]] = "pair"

    text_mask_ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of the caption's tokens that are hidden."""
    image_mask_ratio: float = Field(default=0.4, ge=0, le=1)
    """Share of the patches that are hidden; 0 hides none, drops that loss and needs no token store."""
    min_block: int = Field(default=16, ge=1)
    """Smallest block of hidden patches, in patches."""
    image_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss on patches beside the loss on the caption's tokens."""
    head: Literal["linear", "bert"] = "linear"
    """Head on the tokens: one linear layer (BEiT-3), or BERT's with a transform before it (VLMo)."""
    whole_words: bool = False
    """Whether all tokens of a word are hidden together (VLMo)."""
    text_tokens: int = Field(default=0, ge=0)
    """Longest caption in tokens, special tokens included; 0: the model's longest text."""
    crop_scale: CropScale | None = None
    """Smallest and largest share of the picture that a view shows, (0.2, 1.0) by default, where codes are
    computed online; a token store has its own, which this must equal if it is set."""
    jitter: float | None = Field(default=None, ge=0, lt=1)
    """Strength of the random brightness, contrast and saturation that model and tokenizer see, 0 by default
    (papers: 0.4), where codes are computed online; a token store has its own, as above."""

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task for a grid of 4 x 4 patches."""
        return {**table, "min_block": 4, "text_tokens": 0}

    def terms(self) -> Mapping[str, Term]:
        found = {"": Term("text")}
        if self.image_mask_ratio:
            found["image"] = Term("patch", self.image_weight)
        return found

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {TEXT_HEAD: _text_head(self.head, tools)}
        if self.image_mask_ratio:
            found[IMAGE_HEAD] = nn.Linear(tools.model.width, _codes(self, tools).codes)
        return found

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        tokenizer = loaded(tools)
        caption = caption_of(example, draw, tools)
        ids = framed(tokenizer.encode(caption)[: longest(self.text_tokens, tools) - 2], tokenizer)
        masked, targets = _hidden(ids, self.text_mask_ratio, self.whole_words, draw, tokenizer)
        if not self.image_mask_ratio:
            return Item(image=view_of(example, draw, tools, WHOLE_CROP), text=masked, text_targets=targets)
        hidden = (self.image_mask_ratio, self.min_block, True)
        picture = _masked_picture(example, draw, tools, self, hidden)
        return replace(picture, text=masked, text_targets=targets)

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        found = {
            "": masked_cross_entropy(encoded.rows[group.text_rows], group.text_targets, heads[TEXT_HEAD])
        }
        if self.image_mask_ratio:
            found["image"] = masked_cross_entropy(
                encoded.rows[group.patch_rows], group.patch_targets, heads[IMAGE_HEAD]
            )
        return found

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Predicted ids of the hidden tokens and codes of the hidden patches."""
        found = {"text": heads[TEXT_HEAD](encoded.rows[group.text_rows]).argmax(-1)}
        if self.image_mask_ratio:
            found["patch"] = heads[IMAGE_HEAD](encoded.rows[group.patch_rows]).argmax(-1)
        return found


def _hidden(
    ids: "np.ndarray[Any, Any]",
    ratio: float,
    whole: bool,
    draw: np.random.Generator,
    tokenizer: TextTokenizer,
) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """Ids to feed, and ids to predict."""
    starts = np.array(tokenizer.starts(ids.tolist())) if whole else None
    return text_mask(ids, ratio, draw, tokenizer, starts=starts)


def _text_head(kind: str, tools: Tools) -> nn.Module:
    if kind == "bert":
        return BertHead(tools.model.width, tools.model.vocabulary)
    return nn.Linear(tools.model.width, tools.model.vocabulary)


def _codes(task: MaskedImage | MaskedPair, tools: Tools) -> Any:
    """The token store, or what is known of the tokenizer that computes codes online.

    Raises:
        UserError: there is neither, or it was made for another patch grid or draws other views.
    """
    found, height, width = tools.tokens or tools.online, *tools.model.grid
    if found is None:
        raise UserError(
            'this task predicts image codes: set tokens, for example to "@tokenize-images", or '
            'image_tokenizer, for example to "@train-tokenizer.image"'
        )
    if (found.grid, found.grid) != (height, width):
        what = "the token store" if tools.tokens else "the image tokenizer"
        raise UserError(
            f"{what} has {found.grid} x {found.grid} codes a picture, the model "
            f"{height} x {width} patches; make image_px / patch_px of both equal"
        )
    for name, wanted in (("crop_scale", task.crop_scale), ("jitter", task.jitter)):
        there = getattr(found, name, wanted)
        if wanted is not None and there != wanted:
            raise UserError(
                f"the task says {name} = {wanted}, the token store was made with {name} = {there}; make both "
                "equal, or leave it out of the task"
            )
    return found


def _masked_picture(
    example: Example, draw: np.random.Generator, tools: Tools, task: MaskedImage | MaskedPair,
    hidden: tuple[float, int, bool],
) -> Item:  # fmt: skip
    """A view of a picture with some patches hidden, and their codes as targets.

    Codes online: the tokenizer sees the same part of the picture in the same colours, at its own size, as in
    the official code; they become targets in the training step.
    """
    known, tokens, pictures = _codes(task, tools), tools.tokens, tools.pictures
    if example.image is None:
        raise DataError(f"{example.id}: no picture")
    crop, codes = (None, 0) if tokens is None else tokens.view(example.id, int(draw.integers(tokens.views)))
    picture = pictures.open(example.image, example.id)
    if crop is None:
        scale, jitter = task.crop_scale or ONLINE_CROP, task.jitter or 0.0
        crop = random_crop(picture.width, picture.height, draw, scale=scale, jitter=jitter)
    (height, width), (ratio, min_block, exact) = tools.model.grid, hidden
    count = max(1, round(ratio * height * width))
    mask = block_mask(height, width, count, draw, min_block=min_block, exact=exact)
    image, view = pictures.crop(picture, crop, tools.model.side_px), None
    if tokens is None:
        same = known.image_px == tools.model.side_px
        view = image if same else pictures.crop(picture, crop, known.image_px)
    return Item(image=image, image_mask=mask, patch_targets=np.where(mask, codes, -1), code_view=view)
