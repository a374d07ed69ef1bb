"""VLMo as microsoft/unilm saves it: its pretraining stages, and models for VQA, NLVR2 and retrieval.

Attention is shared; every block has an expert for texts and one for pictures, the top blocks one for pairs.
One table holds the relative positions of all blocks side by side.
Source: microsoft/unilm 768a3c8, vlmo/vlmo/modules. Letters: d width, h, w patches along the sides.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beitctl.checkpoints.mapping import UNREAD, Made, Pair, Table, divided, same, view
from beitctl.checkpoints.parts import HEAD_WIDTH, linear, norm, patches, rows, shape, square, told_grid
from beitctl.config import ModelConfig
from beitctl.errors import UserError
from beitctl.model import relative

BLOCKS = "transformer.blocks."
TABLE = "relative_position_bias_table"
TEXTS = 196
"""Longest text that the tables of all released files know; their second stage trained on such texts."""
BASE_PLUS = 544
"""Width of VLMo base plus, the one released model with absolute positions."""
LAYER_SCALE = 0.1
"""Start of the scales of all released models that have them."""
TYPES = "text_embeddings.token_type_embeddings.weight"
BERT_TYPES = 2
"""Rows of BERT's table of types, of which only the first is ever read."""
POSITIONS = "text_embeddings.position_embeddings.weight"
INDICES = ("relative_position_index", "text_relative_position_index", "text_imag_relative_position_index")
POOLED = {"matching": "itm_score.", "answers": "vqa_classifier.", "reasoning": "nlvr2_classifier."}
"""Heads that read the pooler's output, and how their names begin in the file."""


class UnilmVlmo:
    """VLMo as microsoft/unilm stores it."""

    name = "unilm VLMo"

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether blocks under ``transformer.`` have an expert for texts."""
        return bool(_numbers(state, "mlp_text"))

    def config(
        self, state: Mapping[str, Tensor], note: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> ModelConfig:
        """The model in the sizes of the tensors.

        The table of relative positions does not say which of its rows are of pictures: texts are taken to
        have at most 196 tokens, as in all released files, unless ``text_tokens`` of ``settings`` fits.

        Raises:
            UserError: positions are absolute, and ``settings`` do not give the number of heads.
            ValueError: a tensor that says a size is missing, or positions fit no grid.
        """
        vocabulary, width = shape(state, "text_embeddings.word_embeddings.weight", 2)
        _, channels, patch_px, _ = shape(state, "transformer.patch_embed.proj.weight", 4)
        layers = 1 + max(_numbers(state, ""))
        absolute = "transformer.pos_embed" in state
        if absolute:
            heads = _heads(width, settings)
            grid, texts = _absolute(state, patch_px, settings)
        else:
            heads = _divide(shape(state, TABLE, 2)[1], layers)
            grid, texts = _relative(state, patch_px, settings)
        fused = _numbers(state, "(norm2|mlp)_vl")
        height, across = (side * patch_px for side in grid)
        return ModelConfig(
            layers=layers,
            width=width,
            heads=heads,
            ffn=shape(state, f"{BLOCKS}0.mlp_text.fc1.weight", 2)[0],
            image_px=height if height == across else (height, across),
            patch_px=patch_px,
            channels=channels,
            vocabulary=vocabulary,
            text_tokens=texts,
            attention="shared",
            fusion_layers=layers - min(fused, default=layers),
            position="absolute" if absolute else "relative-per-block",
            norm="pre",
            key_bias=False,
            norm_eps=1e-6,
            layer_scale=LAYER_SCALE if f"{BLOCKS}0.gamma_1" in state else 0.0,
            mask_token="transformer.mask_token" in state,
            text_norm=True,
            token_types=shape(state, "token_type_embeddings.weight", 2)[0],
            text_first=True,
            init="beit",
        )

    def table(self, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Table:
        """The pairs of the body, those of every head as an optional part, and indices that files may hold."""
        pairs = [*_embeddings(config, shapes), *_positions(config, shapes)]
        for block in range(config.layers):
            pairs += _block(config, block)
        pairs += [*norm("model.norm.shared", "transformer.norm", config.width)]
        pairs += [*_contrastive(config), *_pooled(config, shapes), *_words(config)]
        return Table([*pairs, *_kept(shapes)], _indices(config, shapes))


def _numbers(names: Iterable[str], part: str) -> set[int]:
    """Numbers of the blocks that have a part of this name."""
    pattern = re.compile(rf"{re.escape(BLOCKS)}(\d+)\.{part}")
    return {int(found[1]) for found in map(pattern.match, names) if found}


def _heads(width: int, settings: Mapping[str, Any]) -> int:
    usual = "16 in VLMo base plus" if width == BASE_PLUS else f"{max(1, width // HEAD_WIDTH)} is usual"
    if not settings.get("heads"):
        raise UserError(
            "the file does not say how many attention heads the model has: its positions are absolute. "
            f"Give heads=... ({usual} for a width of {width})"
        )
    return int(settings["heads"])


def _divide(columns: int, layers: int) -> int:
    if columns % layers:
        raise ValueError(f"{TABLE} has {columns} columns, which {layers} blocks cannot share evenly")
    return columns // layers


def _absolute(
    state: Mapping[str, Tensor], patch_px: int, settings: Mapping[str, Any]
) -> tuple[tuple[int, int], int]:
    """Grid of the pictures and longest text of a model with absolute positions."""
    found = shape(state, "transformer.pos_embed", 3)[1] - 1
    told, side = told_grid(settings, patch_px), square(found)
    if told and not side and told[0] * told[1] == found:
        return told, shape(state, POSITIONS, 2)[0]
    if not side:
        raise ValueError(
            f"transformer.pos_embed is for {found} patches, which are no square; "
            f"image_px=(height, width) must say their grid, with patches of {patch_px} px"
        )
    return (side, side), shape(state, POSITIONS, 2)[0]


def _relative(
    state: Mapping[str, Tensor], patch_px: int, settings: Mapping[str, Any]
) -> tuple[tuple[int, int], int]:
    """Grid of the pictures and longest text that the rows of a table are for."""
    total = shape(state, TABLE, 2)[0]
    told = told_grid(settings, patch_px)
    for texts in (settings.get("text_tokens"), TEXTS):
        if not texts:
            continue
        left = total - relative.CROSS - 2 * texts
        if told and relative.picture_rows(told) == left:
            return told, texts
        side = square(left - relative.SPECIAL)
        if side % 2:
            return ((side + 1) // 2, (side + 1) // 2), texts
    left = max(0, total - relative.CROSS - 2 * TEXTS)
    raise ValueError(
        f"{TABLE} has {total} rows: with texts of {TEXTS} tokens as in all released files, {left} are left "
        f"for pictures, where h x w patches need (2h-1)(2w-1) + {relative.SPECIAL}; text_tokens=... must say "
        "the longest text that it is for, or image_px=(height, width) a grid that is not square"
    )


def _embeddings(config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Iterator[Pair]:
    d, words = config.width, "text_embeddings"
    conv = "transformer.patch_embed.proj"
    yield from patches("model.vision_embed.proj", conv, d, config.channels, config.patch_px)
    for token in ("cls_token", "mask_token")[: 1 + config.mask_token]:
        yield view(f"model.vision_embed.{token}", f"transformer.{token}", (d,), (1, 1, d))
    yield same("model.text_embed.token.weight", f"{words}.word_embeddings.weight", (config.vocabulary, d))
    yield from norm("model.text_embed.norm", f"{words}.LayerNorm", d)
    others = shapes.get(UNREAD + TYPES, (BERT_TYPES * d - d,))[0] // d
    types = rows(shapes, TYPES) or 1 + others
    parts = [("model.text_embed.type_row", (d,)), (UNREAD + TYPES, ((types - 1) * d,))]
    yield divided(parts[:types], TYPES, (types, d))
    yield same("model.token_type.weight", "token_type_embeddings.weight", (config.token_types, d))


def _positions(config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Iterator[Pair]:
    d = config.width
    if config.position == "absolute":
        own = (config.picture_tokens, d)
        yield view("model.vision_embed.position", "transformer.pos_embed", own, (1, *own))
        yield same("model.text_embed.position.weight", POSITIONS, (config.text_tokens, d))
        return
    ends = relative.table_rows(config)
    parts = [(f"model.blocks.{i}.relative.table", (ends, config.heads)) for i in range(config.layers)]
    yield divided(parts, TABLE, (ends, config.layers * config.heads), axis=1)
    yield same(UNREAD + POSITIONS, POSITIONS, (rows(shapes, POSITIONS), d), "text positions")


def _block(config: ModelConfig, index: int) -> Iterator[Pair]:
    d, ours, theirs = config.width, f"model.blocks.{index}", f"{BLOCKS}{index}"
    yield from norm(f"{ours}.attention.shared.norm", f"{theirs}.norm1", d)
    yield same(f"{ours}.attention.shared.qkv.weight", f"{theirs}.attn.qkv.weight", (3 * d, d))
    for name in ("q_bias", "v_bias"):
        yield same(f"{ours}.attention.shared.{name}", f"{theirs}.attn.{name}", (d,))
    yield from linear(f"{ours}.attention.shared.out", f"{theirs}.attn.proj", d, d)
    if config.layer_scale:
        yield same(f"{ours}.attention_scale", f"{theirs}.gamma_1", (d,))
        yield same(f"{ours}.ffn_scale", f"{theirs}.gamma_2", (d,))
    experts = {"language": "text", "vision": "imag", "fusion": "vl"}
    for name, letters in experts.items():
        if name != "fusion" or index >= config.first_fusion:
            yield from norm(f"{ours}.ffn.{name}.norm", f"{theirs}.norm2_{letters}", d)
            yield from linear(f"{ours}.ffn.{name}.fc1", f"{theirs}.mlp_{letters}.fc1", config.ffn, d)
            yield from linear(f"{ours}.ffn.{name}.fc2", f"{theirs}.mlp_{letters}.fc2", d, config.ffn)


def _contrastive(config: ModelConfig) -> Iterator[Pair]:
    d = config.width
    for ours, theirs, scale in (
        ("contrastive", "itc", "logit_scale"),
        ("contrastive_fused", "itc_vl", "logit_vl_scale"),
    ):
        yield same(f"heads.{ours}.vision.weight", f"{theirs}_image_proj.fc.weight", (d, d), ours)
        yield same(f"heads.{ours}.language.weight", f"{theirs}_text_proj.fc.weight", (d, d), ours)
        yield view(f"heads.{ours}.logit_scale", scale, (1,), (), ours)


def _pooled(config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Iterator[Pair]:
    """The pooler, which all files of the official code hold, and the heads that read it."""
    d = config.width
    beginnings = (*POOLED.values(), *(f"heads.{head}." for head in POOLED))
    read = any(name.startswith(beginnings) for name in shapes)
    yield from linear("heads.pooler.linear", "pooler.dense", d, d, group="" if read else "pooler")
    yield from linear("heads.matching", "itm_score.fc", 2, d, "matching")
    for head, width in (("answers", d), ("reasoning", 2 * d)):
        theirs = POOLED[head]
        out = rows(shapes, f"{theirs}3.weight", f"{theirs}3.bias", f"heads.{head}.out.weight")
        yield from linear(f"heads.{head}.up", f"{theirs}0", 2 * d, width, head)
        yield from norm(f"heads.{head}.inner_norm", f"{theirs}1", 2 * d, head)
        yield from linear(f"heads.{head}.out", f"{theirs}3", out, 2 * d, head)


def _words(config: ModelConfig) -> Iterator[Pair]:
    """BERT's head of masked words; its bias lies beside the last layer."""
    d, ids = config.width, config.vocabulary
    yield from linear("heads.text_tokens.transform", "mlm_score.transform.dense", d, d, "words")
    yield from norm("heads.text_tokens.norm", "mlm_score.transform.LayerNorm", d, "words")
    yield same("heads.text_tokens.out.weight", "mlm_score.decoder.weight", (ids, d), "words")
    yield same("heads.text_tokens.out.bias", "mlm_score.bias", (ids,), "words")


def _kept(shapes: Mapping[str, torch.Size]) -> Iterator[Pair]:
    """Indices, which follow from the sizes and are in some files: kept as they are."""
    for name in (*INDICES, "text_embeddings.position_ids"):
        yield same(UNREAD + name, name, shapes.get(name, ()), name)


def _indices(config: ModelConfig, shapes: Mapping[str, torch.Size]) -> list[Made]:
    """What the indices of a file must be: a table in another order would be read wrongly."""
    makers = (_picture_index, _text_index, _pair_index)
    return [
        Made(name, partial(maker, config, rows(shapes, name)))
        for name, maker in zip(INDICES, makers, strict=True)
        if name in shapes
    ]


def _picture_index(config: ModelConfig, _: int) -> Tensor:
    return torch.from_numpy(relative.picture_index(config.grid))


def _text_index(config: ModelConfig, tokens: int) -> Tensor:
    return torch.from_numpy(relative.text_index(tokens, config))


def _pair_index(config: ModelConfig, tokens: int) -> Tensor:
    """Texts stand before their pictures; of floating numbers, as the official code makes it."""
    first = config.picture_tokens
    index = relative.pair_index(max(0, tokens - first), config)
    order = np.r_[first : len(index), :first]
    return torch.from_numpy(index[np.ix_(order, order)]).float()
