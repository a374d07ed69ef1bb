"""BEiT-1 and BEiT v2 as microsoft/unilm saves them; ``timm.py`` shares what is named alike.

Sources: microsoft/unilm, beit/modeling_pretrain.py, beit/modeling_finetune.py and their namesakes in beit2.
Letters: d width, h, w patches along the sides, P tokens of a picture.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from beitctl.checkpoints.mapping import UNREAD, Made, Pair, Table, same, view
from beitctl.checkpoints.parts import HEAD_WIDTH, linear, norm, patches, rows, shape, square, told_grid
from beitctl.config import ModelConfig
from beitctl.errors import UserError
from beitctl.model.relative import SPECIAL, picture_index, picture_rows, table_rows

Shapes = Mapping[str, torch.Size]
GAMMAS = ("gamma_1", "gamma_2")
"""Names of the two scales of a block."""
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = ".attn.relative_position_bias_table"
INDEX = "relative_position_index"
EXTRA = "heads.aggregation.blocks."
AFTER_EARLY = 3
"""Blocks behind the early ones in both published sizes of BEiT v2: 9 of 12 are early, and 21 of 24."""


class UnilmBeit:
    """Pretraining files (``lm_head``) and fine-tuned ones (``head``)."""

    name = "unilm BEiT"

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the names are those of this format; timm has neither indices nor what pretraining needs."""
        own = {"lm_head.weight", "mask_token", "cls_pt_layers.0.attn.qkv.weight"} & state.keys()
        return is_beit(state) and bool(own or any(name.endswith(INDEX) for name in state))

    def config(
        self, state: Mapping[str, Tensor], note: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> ModelConfig:
        """The model's settings; ``note`` is not read: unilm writes none.

        Raises:
            ValueError: no positions, or they are not those of a square and no setting says what they are.
            UserError: absolute positions, and no setting says the number of heads.
        """
        told = told_by_shapes(state, settings.get("heads"), [settings.get("image_px")])
        return ModelConfig(**told, norm="pre", key_bias=False, norm_eps=1e-6, init="beit")

    def table(self, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Table:
        """The pairs for a model; the indices of the tables follow from the grid."""
        pairs = [*body(config), *classifier(config, shapes), *_aggregation(config, shapes)]
        codes = rows(shapes, "lm_head.weight", "heads.image_codes.weight")
        if codes:
            pairs += linear("heads.image_codes", "lm_head", codes, config.width)
        index = cache(lambda: torch.from_numpy(picture_index(config.grid)))
        tables = [
            name for pair in pairs for name in pair.theirs if name.endswith("relative_position_bias_table")
        ]
        names = [name.replace("relative_position_bias_table", INDEX) for name in tables]
        return Table(pairs, [Made(name, lambda: index().clone()) for name in names])


def is_beit(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a BEiT of unilm or timm: keys have no bias."""
    return is_vit(state) and any(name.endswith(".attn.q_bias") for name in state)


def is_vit(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of any picture encoder of unilm or timm with a class token."""
    return (
        "cls_token" in state
        and "patch_embed.proj.weight" in state
        and any(n.startswith("blocks.") for n in state)
    )


def body(config: ModelConfig, scales: tuple[str, str] = GAMMAS) -> list[Pair]:
    """Pairs of all but the heads."""
    d, count = config.width, config.picture_tokens
    embed = "model.vision_embed"
    pairs = [
        view(f"{embed}.cls_token", "cls_token", (d,), (1, 1, d)),
        *patches(f"{embed}.proj", "patch_embed.proj", d, config.channels, config.patch_px),
    ]
    if config.distill_token:
        pairs.append(view(f"{embed}.distill_token", "dist_token", (d,), (1, 1, d)))
    if config.mask_token:
        pairs.append(view(f"{embed}.mask_token", "mask_token", (d,), (1, 1, d)))
    if config.position == "absolute":
        pairs.append(view(f"{embed}.position", "pos_embed", (count, d), (1, count, d)))
    if config.position == "relative-shared":
        pairs.append(same("model.relative.table", SHARED_TABLE, (table_rows(config), config.heads)))
    for index in range(config.layers):
        pairs += _block(f"model.blocks.{index}", f"blocks.{index}", config, scales)
    if config.final_norm:
        pairs += norm(f"model.norm.{_branch(config)}", "norm", d)
    return pairs


def classifier(config: ModelConfig, shapes: Shapes) -> list[Pair]:
    """Pairs of the classifier, if there is one; a norm of the mean patch without it is kept unread."""
    d = config.width
    classes = rows(shapes, "head.weight", "heads.classifier.linear.weight")
    pairs: list[Pair] = []
    if not config.final_norm and classes:
        pairs += norm("heads.classifier.norm", "fc_norm", d)
    elif not config.final_norm:
        pairs += norm(f"{UNREAD}fc_norm", "fc_norm", d, group="fc_norm")
    if classes:
        pairs += linear("heads.classifier.linear", "head", classes, d)
    if classes and config.distill_token:
        pairs += linear("heads.classifier.distilled", "head_dist", classes, d)
    return pairs


def told_by_shapes(
    state: Mapping[str, Tensor], heads: Any, sizes: Iterable[Any], scales: tuple[str, str] = GAMMAS
) -> dict[str, Any]:
    """Settings that the tensors of a file say.

    Args:
        state: the file.
        heads: their number if anything says it; a table of relative positions does, and goes first.
        sizes: what may be the picture's (height, width) where it is not square.
        scales: names of a block's two scales.

    Raises:
        ValueError: a tensor that says a size is missing; there are no positions, or those of no known grid.
        UserError: the number of heads is not known.
    """
    width, channels, *patch = shape(state, "patch_embed.proj.weight", 4)
    if patch[0] != patch[1] or not patch[0]:
        raise ValueError(f"its patches are {patch[0]} x {patch[1]} pixels; only square ones are read")
    prefix = 2 if "dist_token" in state else 1
    position, table = _positions(state)
    length = shape(state, table, 2)[0] if position != "absolute" else shape(state, table, 3)[1]
    columns = state[table].shape[1] if position != "absolute" else heads
    if columns is None:
        raise UserError(
            "the file does not say how many attention heads the model has: give heads=... "
            f"({max(1, width // HEAD_WIDTH)} is usual for a width of {width}: {HEAD_WIDTH} channels each)"
        )
    layers = 1 + max(_numbers(state, "blocks."), default=-1)
    fc1 = next((name for name in state if name.endswith(".mlp.fc1.weight")), "blocks.0.mlp.fc1.weight")
    published = 0.1 if layers < 24 else 1e-5
    return {
        "layers": layers,
        "width": width,
        "heads": columns,
        "ffn": shape(state, fc1, 2)[0],
        "image_px": _image_px(length, None if position != "absolute" else prefix, patch[0], sizes),
        "patch_px": patch[0],
        "channels": channels,
        "position": position,
        "final_norm": "norm.weight" in state,
        "layer_scale": published if any(name.endswith(scales) for name in state) else 0.0,
        "mask_token": "mask_token" in state,
        "distill_token": prefix == 2,
    }


def _branch(config: ModelConfig) -> str:
    return "shared" if config.attention == "shared" else "vision"


def _block(ours: str, theirs: str, config: ModelConfig, scales: tuple[str, str]) -> list[Pair]:
    d, f = config.width, config.ffn
    attention, ffn = f"{ours}.attention.{_branch(config)}", f"{ours}.ffn.vision"
    pairs = [
        *norm(f"{attention}.norm", f"{theirs}.norm1", d),
        same(f"{attention}.qkv.weight", f"{theirs}.attn.qkv.weight", (3 * d, d)),
        *linear(f"{attention}.out", f"{theirs}.attn.proj", d, d),
        *norm(f"{ffn}.norm", f"{theirs}.norm2", d),
        *linear(f"{ffn}.fc1", f"{theirs}.mlp.fc1", f, d),
        *linear(f"{ffn}.fc2", f"{theirs}.mlp.fc2", d, f),
    ]
    biases = {"qkv.bias": 3 * d} if config.key_bias else {"q_bias": d, "v_bias": d}
    pairs += [same(f"{attention}.{name}", f"{theirs}.attn.{name}", (size,)) for name, size in biases.items()]
    if config.norm == "sub":
        pairs += norm(f"{attention}.inner_norm", f"{theirs}.attn.norm", d)
        pairs += norm(f"{ffn}.inner_norm", f"{theirs}.mlp.norm", f)
    if config.layer_scale:
        pairs.append(same(f"{ours}.attention_scale", f"{theirs}.{scales[0]}", (d,)))
        pairs.append(same(f"{ours}.ffn_scale", f"{theirs}.{scales[1]}", (d,)))
    if config.position == "relative-per-block":
        pairs.append(same(f"{ours}.relative.table", theirs + BLOCK_TABLE, (table_rows(config), config.heads)))
    return pairs


def _aggregation(config: ModelConfig, shapes: Shapes) -> list[Pair]:
    """Pairs of BEiT v2's extra blocks; a file does not say behind which block they begin."""
    numbers = sorted(_numbers(shapes, EXTRA))
    if not numbers:
        early = max(1, config.layers - AFTER_EARLY)
        count = 1 + max(_numbers(shapes, "cls_pt_layers."), default=-1)
        numbers = list(range(early, early + count))
    blocks = [
        _block(f"{EXTRA}{number}", f"cls_pt_layers.{index}", config, GAMMAS)
        for index, number in enumerate(numbers)
    ]
    return [pair for pairs in blocks for pair in pairs]


def _numbers(names: Iterable[str], prefix: str) -> set[int]:
    """Numbers that follow a prefix of names."""
    parts = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
    return {int(part) for part in parts if part.isdecimal()}


def _positions(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """How positions are told, and the tensor whose shape says the grid."""
    if SHARED_TABLE in state:
        return "relative-shared", SHARED_TABLE
    table = next((name for name in state if name.startswith("blocks.") and name.endswith(BLOCK_TABLE)), None)
    if table is not None:
        return "relative-per-block", table
    if "pos_embed" in state:
        return "absolute", "pos_embed"
    raise ValueError("it holds no positions: neither pos_embed nor a relative_position_bias_table")


def _image_px(length: int, prefix: int | None, patch_px: int, sizes: Iterable[Any]) -> int | tuple[int, int]:
    """Size of the picture from the rows of its positions; ``prefix`` counts those before absolute ones."""

    def fits(grid: tuple[int, int]) -> bool:
        return length == (picture_rows(grid) if prefix is None else prefix + grid[0] * grid[1])

    for size in sizes:
        grid = told_grid({"image_px": size}, patch_px)
        if grid is not None and grid[0] != grid[1] and fits(grid):
            return grid[0] * patch_px, grid[1] * patch_px
    side = (square(length - SPECIAL) + 1) // 2 if prefix is None else square(length - prefix)
    if side and fits((side, side)):
        return side * patch_px
    raise ValueError(
        f"its {length} positions are not those of a square grid of patches: give image_px=(height, width), "
        "the size that it was made for"
    )
