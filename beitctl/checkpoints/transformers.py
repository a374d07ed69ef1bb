"""transformers' ``BeitModel``, and its classes for masked images, classification and segmentation.

Two spellings are read. Files of ``save_pretrained`` and all files on the Hub have the names that the library
began with (``encoder.layer.0.attention.attention.query``); older ones also hold index buffers. Since 5.23 the
modules in memory have others (``layers.0.attention.q_proj``), which ``save_pretrained`` puts back: a file of
``torch.save(model.state_dict())`` has those. What is written has the names of the files, without the buffers.

Square pictures only. transformers (5.23) does not run other grids with learned positions, and takes their
table of relative positions for one of width x height: there is no output that ours could agree with.

Source: transformers 5.23.0, ``models/beit/modeling_beit.py`` and ``conversion_mapping.py``.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from beitctl.checkpoints.mapping import UNREAD, Made, Pair, Table, fused, same, view
from beitctl.checkpoints.parts import HEAD_WIDTH, linear, norm, patches, rows, shape, square
from beitctl.checkpoints.segmenter import classes_of, segmenter
from beitctl.config import ModelConfig
from beitctl.errors import UserError
from beitctl.model.relative import SPECIAL, picture_index, table_rows

EPS = 1e-12
"""Epsilon of the LayerNorms where no ``config.json`` says it: transformers' default; unilm has 1e-6."""
DEEP = 24
"""Layers from which LayerScale begins at 1e-5, below at 0.1."""
PROJECTION = "embeddings.patch_embeddings.projection"
TABLE = ".relative_position_bias_table"
INDEX = ".relative_position_index"


@dataclass(frozen=True)
class Spelling:
    """Names of the body that differ between files and modules."""

    blocks: str
    query: str
    key: str
    value: str
    out: str
    up: str
    down: str
    bias: str
    """Table of relative positions of a block."""
    shared: str
    """The one for all blocks, beside ``blocks``."""


FILES = Spelling(
    blocks="encoder.layer",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    bias="attention.attention.relative_position_bias",
    shared="encoder.relative_position_bias",
)
MODULES = Spelling(
    blocks="layers",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    up="mlp.fc1",
    down="mlp.fc2",
    bias="relative_position_bias",
    shared="shared_position_bias",
)


@dataclass(frozen=True)
class Names:
    """How one state dict spells the body."""

    prefix: Literal["beit.", ""]
    """``beit.`` where a head stands beside the body."""
    spelling: Spelling

    def body(self, name: str) -> str:
        return self.prefix + name

    def block(self, index: int, name: str) -> str:
        return f"{self.prefix}{self.spelling.blocks}.{index}.{name}"

    def numbers(self, names: Collection[str]) -> set[int]:
        """Numbers of the blocks."""
        start = re.compile(re.escape(f"{self.prefix}{self.spelling.blocks}.") + r"(\d+)\.")
        return {int(found[1]) for found in map(start.match, names) if found}


def _spelled(names: Collection[str]) -> Names | None:
    """How a state dict of transformers spells BEiT; None if it is not one.

    Queries have a bias and keys have none: that tells BEiT from transformers' ViT, DINOv2 and others.
    """
    for spelling in (FILES, MODULES):
        for prefix in ("beit.", ""):
            found = Names(prefix, spelling)
            blocks = found.numbers(names)
            query = any(found.block(block, f"{spelling.query}.bias") in names for block in blocks)
            key = any(found.block(block, f"{spelling.key}.bias") in names for block in blocks)
            if query and not key and found.body(f"{PROJECTION}.weight") in names:
                return found
    return None


class TransformersBeit:
    """The format ``transformers BEiT``."""

    name = "transformers BEiT"

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the names are those of one of the classes, or of their body with a foreign head."""
        return _spelled(state) is not None

    def config(
        self, state: Mapping[str, Tensor], note: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> ModelConfig:
        """Sizes from shapes; heads from a table or ``config.json``, which also gives the epsilon.

        Raises:
            UserError: the number of heads is in neither and no setting either.
            ValueError: not a model of this family, or the tensors are not what ``config.json`` says.
        """
        names = _spelled(state)
        assert names is not None
        note = note if "model_type" in note else {}  # timm's has none
        for name, only in (("model_type", "beit"), ("hidden_act", "gelu")):
            if note.get(name, only) != only:
                raise ValueError(f"the config.json beside it says {name} {note[name]!r}; BEiT has {only!r}")
        width, channels, patch, across = shape(state, names.body(f"{PROJECTION}.weight"), 4)
        if patch != across:
            raise ValueError(f"its patches are {patch} x {across} px; they must be square")
        position, table = _positions(state, names)
        side = _side(position, table[0] if position != "absolute" else table[1])
        masked, normed = "lm_head.weight" in state, names.body("layernorm.weight") in state
        if masked and normed and names.prefix:
            raise ValueError(
                "it ends in two LayerNorms (use_mean_pooling = false with a head for masked images), "
                "beitctl's models end in one"
            )
        blocks = names.numbers(state)
        heads = table[1] if position != "absolute" else _heads(width, note, settings)
        ffn = shape(state, names.block(min(blocks), f"{names.spelling.up}.weight"), 2)[0]
        said = {
            "hidden_size": width,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": heads,
            "intermediate_size": ffn,
            "patch_size": patch,
            "num_channels": channels,
            "use_mean_pooling": masked or not normed,
            "image_size": side * patch,
        }
        _check_note(note, said)
        return ModelConfig(
            layers=len(blocks),
            width=width,
            heads=heads,
            ffn=ffn,
            image_px=side * patch,
            patch_px=patch,
            channels=channels,
            position=position,
            norm="pre",
            key_bias=False,
            norm_eps=_number(float, note, "layer_norm_eps", EPS),
            final_norm=masked or normed,
            layer_scale=_layer_scale(state, names, len(blocks)),
            mask_token=names.body("embeddings.mask_token") in state,
            init="beit",
        )

    def table(self, config: ModelConfig, shapes: Mapping[str, torch.Size]) -> Table:
        """The pairs for a model; from ours the names of files follow.

        Raises:
            ValueError: the pictures are not square.
        """
        if config.grid[0] != config.grid[1]:
            raise ValueError(
                f"transformers reads no BEiT for pictures of {config.size[0]} x {config.size[1]} px: "
                "image_px must be square"
            )
        headed = any(name.startswith("heads.") for name in shapes)
        names = _spelled(shapes) or Names("beit." if headed else "", FILES)
        pairs = _embeddings(config, names)
        for block in range(config.layers):
            pairs += _block(config, names, block)
        pairs += _ends(config, names, shapes)
        indices = [names.body(names.spelling.shared)]
        indices += [names.block(block, names.spelling.bias) for block in range(config.layers)]
        made = [
            Made(name + INDEX, lambda: torch.from_numpy(picture_index(config.grid)))
            for name in indices
            if name + INDEX in shapes
        ]
        return Table(pairs, made)


def _embeddings(config: ModelConfig, names: Names) -> list[Pair]:
    d, ours = config.width, "model.vision_embed"
    pairs = [
        *patches(f"{ours}.proj", names.body(PROJECTION), d, config.channels, config.patch_px),
        view(f"{ours}.cls_token", names.body("embeddings.cls_token"), (d,), (1, 1, d)),
    ]
    if config.mask_token:
        pairs.append(view(f"{ours}.mask_token", names.body("embeddings.mask_token"), (d,), (1, 1, d)))
    if config.position == "absolute":
        own = (config.picture_tokens, d)
        pairs.append(view(f"{ours}.position", names.body("embeddings.position_embeddings"), own, (1, *own)))
    if config.position == "relative-shared":
        own = (table_rows(config), config.heads)
        pairs.append(same("model.relative.table", names.body(names.spelling.shared + TABLE), own))
    return pairs


def _block(config: ModelConfig, names: Names, block: int) -> list[Pair]:
    d, f, spelling = config.width, config.ffn, names.spelling
    ours = f"model.blocks.{block}"
    attention, ffn = f"{ours}.attention.shared", f"{ours}.ffn.vision"

    def theirs(name: str) -> str:
        return names.block(block, name)

    queries = [theirs(f"{name}.weight") for name in (spelling.query, spelling.key, spelling.value)]
    pairs = [
        *norm(f"{attention}.norm", theirs("layernorm_before"), d),
        fused(f"{attention}.qkv.weight", queries, (d, d)),
        same(f"{attention}.q_bias", theirs(f"{spelling.query}.bias"), (d,)),
        same(f"{attention}.v_bias", theirs(f"{spelling.value}.bias"), (d,)),
        *linear(f"{attention}.out", theirs(spelling.out), d, d),
        *norm(f"{ffn}.norm", theirs("layernorm_after"), d),
        *linear(f"{ffn}.fc1", theirs(spelling.up), f, d),
        *linear(f"{ffn}.fc2", theirs(spelling.down), d, f),
    ]
    if config.layer_scale > 0:
        pairs.append(same(f"{ours}.attention_scale", theirs("lambda_1"), (d,)))
        pairs.append(same(f"{ours}.ffn_scale", theirs("lambda_2"), (d,)))
    if config.position == "relative-per-block":
        own = (table_rows(config), config.heads)
        pairs.append(same(f"{ours}.relative.table", theirs(spelling.bias + TABLE), own))
    return pairs


def _ends(config: ModelConfig, names: Names, shapes: Mapping[str, torch.Size]) -> list[Pair]:
    """The final norm and the head."""
    d = config.width
    pairs: list[Pair] = []
    codes = rows(shapes, "lm_head.weight", "heads.image_codes.weight")
    classes = rows(shapes, "classifier.weight", "heads.classifier.linear.weight")
    if config.final_norm:
        pairs += norm("model.norm.shared", "layernorm" if codes else names.body("layernorm"), d)
    if codes:
        pairs += linear("heads.image_codes", "lm_head", codes, d)
    if classes:
        pairs += linear("heads.classifier.linear", "classifier", classes, d)
    if kinds := classes_of(shapes):
        return [*pairs, *segmenter(shapes, d, kinds, modules=names.spelling is MODULES)]
    if not config.final_norm:
        pooler = names.body("pooler.layernorm")
        if classes:
            pairs += norm("heads.classifier.norm", pooler, d)
        else:  # a body whose mean patch nobody reads; BeitModel(add_pooling_layer=False) has none
            pairs += norm(f"{UNREAD}pooler.layernorm", pooler, d, group="pooler")
    return pairs


def _positions(
    state: Mapping[str, Tensor], names: Names
) -> tuple[Literal["absolute", "relative-shared", "relative-per-block"], torch.Size]:
    """How positions are told, and the shape of a tensor that tells them."""
    learned = names.body("embeddings.position_embeddings")
    shared = names.body(names.spelling.shared + TABLE)
    tables = [names.block(block, names.spelling.bias + TABLE) for block in sorted(names.numbers(state))]
    own = [name for name in tables if name in state]
    found = [name for name in (learned, shared, *own[:1]) if name in state]
    if len(found) != 1:
        held = f"holds {' and '.join(found)}" if found else "holds no positions"
        raise ValueError(
            f"it {held}; beitctl's models have one of these: position_embeddings "
            "(use_absolute_position_embeddings), a table of relative positions for all blocks "
            "(use_shared_relative_position_bias), or one for each (use_relative_position_bias)"
        )
    if found[0] == learned:
        return "absolute", shape(state, learned, 3)
    return "relative-shared" if found[0] == shared else "relative-per-block", shape(state, found[0], 2)


def _side(position: str, length: int) -> int:
    """Patches along each side of the square that a number of rows belongs to.

    Raises:
        ValueError: there is none.
    """
    side = square(length - 1)
    if position != "absolute":
        offsets = square(length - SPECIAL)
        side = (offsets + 1) // 2 if offsets % 2 else 0
    if not side:
        raise ValueError(
            f"its positions ({length} rows) are not those of square pictures, and transformers takes "
            "others for positions of another grid; beitctl reads square ones from it"
        )
    return side


def _heads(width: int, note: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    if "num_attention_heads" not in note and "heads" not in settings:
        raise UserError(
            f"a {TransformersBeit.name} file with absolute positions does not store the number of attention "
            "heads, and no config.json of transformers is beside it: give heads=, usually "
            f"heads={max(1, width // HEAD_WIDTH)} for the width {width} of this file"
        )
    heads: int = _number(int, note, "num_attention_heads", settings.get("heads"))
    return heads


def _number(kind: type[int | float], note: Mapping[str, Any], name: str, default: Any) -> Any:
    found = note.get(name, default)
    try:
        return kind(found)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} is {found!r} in config.json or the settings, expected a number") from error


def _layer_scale(state: Mapping[str, Tensor], names: Names, layers: int) -> float:
    scaled = any(names.block(block, "lambda_1") in state for block in names.numbers(state))
    return (0.1 if layers < DEEP else 1e-5) if scaled else 0.0


def _check_note(note: Mapping[str, Any], found: Mapping[str, int]) -> None:
    """Compare sizes of the tensors with what ``config.json`` says.

    Raises:
        ValueError: they differ, so that one of the two files belongs to another model.
    """
    differ = []
    for name, value in found.items():
        said = note.get(name, value)
        if name == "image_size":  # pixels that fill no patch are cut off
            most = value + found["patch_size"]
            sides = said if isinstance(said, list) else [said, said]
            fits = all(isinstance(side, int) and value <= side < most for side in sides)
        else:
            fits = said in (value, [value, value])
        if not fits:
            differ.append(f"{name} {said!r}, the tensors {value!r}")
    if differ:
        raise ValueError(f"config.json says {'; '.join(differ)}: is it that of another model?")
