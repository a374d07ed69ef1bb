"""The files of unilm's BEiT-3: bodies, and models for every task that was released.

A is the vision branch, B the language branch; each has projections, experts and norms of its own, nothing is
shared. Source: microsoft/unilm 768a3c8, beit3/modeling_finetune.py, and torchscale 4d1e0e8.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from beitctl.checkpoints.mapping import UNREAD, Pair, Table, divided, fused, same, view
from beitctl.checkpoints.parts import HEAD_WIDTH, linear, norm, patches, rows, shape, square, told_grid
from beitctl.config import ModelConfig
from beitctl.errors import UserError

BODY = "beit3."
LAYERS = "beit3.encoder.layers."
NORM = "beit3.encoder.layer_norm."
POSITIONS = "beit3.encoder.embed_positions."
BRANCHES = {"A": "vision", "B": "language"}
LEADING = 2
"""Rows of both position tables that are never read: torchscale counts positions from 2, as fairseq does."""


class UnilmBeit3:
    """BEiT-3 as microsoft/unilm stores it: a body under ``beit3.`` and the head of one task beside it."""

    name = "unilm BEiT-3"

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether there is an encoder under ``beit3.``."""
        return any(name.startswith("beit3.encoder.") for name in state)

    def config(
        self, state: Mapping[str, Tensor], note: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> ModelConfig:
        """The released, decoupled form in the sizes of the tensors.

        Classification and VQA models read the rows before the final norm, which their files may hold or not.

        Raises:
            UserError: neither ``note`` nor ``settings`` gives the number of heads.
            ValueError: a tensor that says a size is missing, or the patches do not fill a square.
        """
        vocabulary, width = shape(state, "beit3.text_embed.weight", 2)
        _, channels, patch_px, _ = shape(state, "beit3.vision_embed.proj.weight", 4)
        seen = shape(state, f"{POSITIONS}A.weight", 2)[0] - LEADING - 1
        inner = [name for name in state if name.startswith(LAYERS) and name.endswith(".fc1.weight")]
        return ModelConfig(
            layers=len({name.split(".")[3] for name in state if name.startswith(LAYERS)}),
            width=width,
            heads=_heads(width, note, settings),
            ffn=shape(state, min(inner, default=f"{LAYERS}0.ffn.A.fc1.weight"), 2)[0],
            image_px=_image_px(seen, patch_px, settings),
            patch_px=patch_px,
            channels=channels,
            vocabulary=vocabulary,
            text_tokens=shape(state, f"{POSITIONS}B.weight", 2)[0] - LEADING,
            attention="decoupled",
            norm="sub",
            norm_eps=1e-5,
            final_norm=_ends_with_norm(state),
            init="released",
        )

    def table(self, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Table:
        """The pairs of the body, and those of every head as an optional part."""
        pairs = [*_embeddings(config), *_final_norm(config)]
        for block in range(config.layers):
            for letter in BRANCHES:
                pairs += _branch(config, block, letter)
        return Table([*pairs, *_task_heads(config, shapes)])


def _heads(width: int, note: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    heads = note.get("heads", settings.get("heads"))
    if heads is None:
        raise UserError(
            f"a {UnilmBeit3.name} file does not say the number of attention heads: give heads=, "
            f"for its width {width} usually heads={max(1, width // HEAD_WIDTH)} ({HEAD_WIDTH} channels each)"
        )
    return int(heads)


def _image_px(count: int, patch_px: int, settings: Mapping[str, Any]) -> int | tuple[int, int]:
    """Size of the pictures that so many positions are for: a square, else the size that the settings say."""
    told, side = told_grid(settings, patch_px), square(count)
    if side < 1 and told is not None and told[0] * told[1] == count:
        return told[0] * patch_px, told[1] * patch_px
    if side < 1:
        raise ValueError(
            f"its vision positions are for {count} patches, which make no square: "
            f"give image_px=(height, width) of the pictures it was made for, with patches of {patch_px} px"
        )
    return side * patch_px


def _ends_with_norm(state: Mapping[str, Tensor]) -> bool:
    """Whether the final norm is read: not by classifiers and VQA, by a bare body if it is there."""
    if any(name.startswith(("fc_norm.", "pooler.")) for name in state):
        return False
    headed = any(not name.startswith(BODY) for name in state)
    return headed or any(name.startswith(NORM) for name in state)


def _embeddings(config: ModelConfig) -> Iterator[Pair]:
    d, ours, theirs = config.width, "model.vision_embed", "beit3.vision_embed"
    yield from patches(f"{ours}.proj", f"{theirs}.proj", d, config.channels, config.patch_px)
    for token in ("cls_token", "mask_token"):
        yield view(f"{ours}.{token}", f"{theirs}.{token}", (d,), (1, 1, d))
    yield same("model.text_embed.token.weight", "beit3.text_embed.weight", (config.vocabulary, d))
    yield _positions("model.vision_embed.position", "A", config.picture_tokens, d)
    yield _positions("model.text_embed.position.weight", "B", config.text_tokens, d)


def _positions(ours: str, letter: str, count: int, width: int) -> Pair:
    theirs = f"{POSITIONS}{letter}.weight"
    parts = [(f"{UNREAD}{theirs}", (LEADING, width)), (ours, (count, width))]
    return divided(parts, theirs, (LEADING + count, width))


def _branch(config: ModelConfig, block: int, letter: str) -> Iterator[Pair]:
    """One modality's half of a block."""
    d, layer, branch = config.width, f"{LAYERS}{block}", BRANCHES[letter]
    attention, expert = f"model.blocks.{block}.attention.{branch}", f"model.blocks.{block}.ffn.{branch}"
    projections = [f"{layer}.self_attn.{part}_proj.{letter}" for part in "qkv"]
    yield fused(f"{attention}.qkv.weight", [f"{name}.weight" for name in projections], (d, d))
    yield fused(f"{attention}.qkv.bias", [f"{name}.bias" for name in projections], (d,))
    yield from norm(f"{attention}.norm", f"{layer}.self_attn_layer_norm.{letter}", d)
    yield from norm(f"{attention}.inner_norm", f"{layer}.self_attn.inner_attn_ln.{letter}", d)
    yield from linear(f"{attention}.out", f"{layer}.self_attn.out_proj.{letter}", d, d)
    yield from norm(f"{expert}.norm", f"{layer}.final_layer_norm.{letter}", d)
    yield from norm(f"{expert}.inner_norm", f"{layer}.ffn.{letter}.ffn_layernorm", config.ffn)
    yield from linear(f"{expert}.fc1", f"{layer}.ffn.{letter}.fc1", config.ffn, d)
    yield from linear(f"{expert}.fc2", f"{layer}.ffn.{letter}.fc2", d, config.ffn)


def _final_norm(config: ModelConfig) -> Iterator[Pair]:
    for letter, branch in BRANCHES.items():
        if config.final_norm:
            yield from norm(f"model.norm.{branch}", f"{NORM}{letter}", config.width)
        else:
            yield from norm(f"{UNREAD}{NORM}{letter}", f"{NORM}{letter}", config.width, "final norm")


def _task_heads(config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Iterator[Pair]:
    """Every head that a file may hold; the last layer's rows come from the tensors."""
    d = config.width
    classes = rows(shapes, "head.weight", "head.bias", "heads.classifier.linear.weight")
    yield from norm("heads.classifier.norm", "fc_norm", d, "classifier")
    yield from linear("heads.classifier.linear", "head", classes, d, "classifier")
    answers = rows(shapes, "head.3.weight", "head.3.bias", "heads.answers.out.weight")
    yield from norm("heads.pooler.norm", "pooler.norm", d, "answers")
    yield from linear("heads.pooler.linear", "pooler.dense", d, d, "answers")
    yield from linear("heads.answers.up", "head.0", 2 * d, d, "answers")
    yield from norm("heads.answers.inner_norm", "head.1", 2 * d, "answers")
    yield from linear("heads.answers.out", "head.3", answers, 2 * d, "answers")
    truths = rows(shapes, "head.dense2.weight", "head.dense2.bias", "heads.reasoning.out.weight")
    yield from norm("heads.reasoning.norm", "head.norm1", 4 * d, "reasoning")
    yield from linear("heads.reasoning.up", "head.dense1", 2 * d, 4 * d, "reasoning")
    yield from norm("heads.reasoning.inner_norm", "head.norm2", 2 * d, "reasoning")
    yield from linear("heads.reasoning.out", "head.dense2", truths, 2 * d, "reasoning")
    for branch in BRANCHES.values():
        yield same(f"heads.contrastive.{branch}.weight", f"{branch}_head.weight", (d, d), "contrastive")
    yield view("heads.contrastive.logit_scale", "logit_scale", (1,), (), "contrastive")
    codes = rows(shapes, "mim_head.weight", "mim_head.bias", "heads.image_codes.weight")
    yield from linear("heads.image_codes", "mim_head", codes, d, "image")
    yield from linear(f"heads.{_words(shapes)}", "mlm_head", config.vocabulary, d, "words")


def _words(shapes: Mapping[str, torch.Size]) -> str:
    """What ``mlm_head`` is: the only head of a captioning model, or one of a pretraining model's."""
    others = {"mim_head.weight", "vision_head.weight", "heads.text_tokens.weight"}
    return "captions" if others.isdisjoint(shapes) else "text_tokens"
