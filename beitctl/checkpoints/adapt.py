"""From the weights of one model to those of another with other settings: resolution, positions, norms, text.

The official loaders do this silently and load what fits; here every step is named and everything else
refused.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from beitctl.checkpoints import resize
from beitctl.config import ModelConfig
from beitctl.errors import DataError, UserError
from beitctl.model.relative import SPECIAL, picture_rows, table_rows

FREE = ("drop_path", "init", "pixels", "text_first", "layer_scale", "fusion_layers")
"""Settings that change no tensor, or whose tensors ``grown`` lets a training begin anew."""
CHANGING = (
    "image_px",
    "position",
    "final_norm",
    "mask_token",
    "token_types",
    "vocabulary",
    "text_tokens",
    "text_norm",
)
"""Settings that ``adapted`` can change, within limits."""
SHARED, POSITIONS = "model.relative.table", "model.vision_embed.position"
TABLE = re.compile(r"(model\.|model\.blocks\.\d+\.|heads\.aggregation\.blocks\.\d+\.)relative\.table")
EXTRA = re.compile(r"heads\.aggregation\.blocks\.\d+\.")
"""BEiT v2's blocks that are thrown away: they have positions like those of the body."""


def adapted(
    tensors: Mapping[str, Tensor], source: ModelConfig, target: ModelConfig, *, grown: bool = False
) -> dict[str, Tensor]:
    """Tensors ``model.*`` for other settings; those under ``heads.`` pass, but for positions in blocks.

    * ``image_px``: positions are resampled (``beitctl.checkpoints.resize``).
    * ``position``: a shared table of relative positions is copied into every block.
    * ``final_norm``, ``mask_token``: tensors that the target has not are dropped.
    * ``token_types`` 2 to 3: the third vector is the second's copy, as in VLMo's code.
    * with ``grown``, as a training that begins with these weights: a language branch is added to relative
      tables as zeros, and what is new is left out, to be initialised.

    Raises:
        UserError: other settings differ; lists them.
        DataError: a table of positions has other rows than its settings say.
    """
    _check(source, target, grown)
    _check_rows(tensors, source)
    found = dict(tensors)
    moved = (source.position, target.position) == ("relative-shared", "relative-per-block")
    if moved and SHARED in found:
        table = found.pop(SHARED)
        blocks = [f"model.blocks.{number}." for number in range(source.layers)]
        for block in blocks + sorted({part[0] for part in map(EXTRA.match, tensors) if part}):
            found[f"{block}relative.table"] = table.clone()
    for name, value in list(found.items()):
        if TABLE.fullmatch(name):
            found[name] = _relative(value, source, target)
    if POSITIONS in found:
        found[POSITIONS] = resize.absolute(found[POSITIONS], source.grid, target.grid, source.prefix)
    types = found.get("model.token_type.weight")
    if types is not None and target.token_types > source.token_types:
        found["model.token_type.weight"] = torch.cat([types, types[1:2]])
    for name in list(found):
        gone = name.startswith("model.norm.") and not target.final_norm
        if gone or (name == "model.vision_embed.mask_token" and not target.mask_token):
            del found[name]
    return found


def _relative(table: Tensor, source: ModelConfig, target: ModelConfig) -> Tensor:
    """A table for another grid; rows of a language branch that is new are zeros, as all begin."""
    ends = picture_rows(source.grid)
    pictures = resize.relative(table[:ends], source.grid, target.grid, SPECIAL)
    text = table[ends:]
    if target.vocabulary and not source.vocabulary:
        text = table.new_zeros(table_rows(target) - picture_rows(target.grid), table.shape[1])
    return torch.cat([pictures, text])


def _check_rows(tensors: Mapping[str, Tensor], source: ModelConfig) -> None:
    wanted = {name: table_rows(source) for name in tensors if TABLE.fullmatch(name)}
    for name, rows in (wanted | {POSITIONS: source.picture_tokens}).items():
        if name in tensors and len(tensors[name]) != rows:
            raise DataError(
                f"{name} is {tuple(tensors[name].shape)}, the settings beside it need {rows} rows: the file "
                "is damaged, or its settings were changed; copy or export it again"
            )


def _check(source: ModelConfig, target: ModelConfig, grown: bool) -> None:
    before, after = asdict(source), asdict(target)
    changed = {name for name in before if before[name] != after[name]}
    fixed = sorted(changed - {*FREE, *CHANGING})
    # a training may begin with new scales and experts; those that are there are not thrown away
    kept = {
        "layer_scale": target.layer_scale > 0,
        "fusion_layers": target.fusion_layers >= source.fusion_layers,
    }
    lasting = [name for name, stays in kept.items() if name in changed and not (grown and stays)]
    refused = fixed + lasting + _refused(source, target, changed, grown)
    if refused:
        listed = "; ".join(f"{name}: {before[name]!r} to {after[name]!r}" for name in dict.fromkeys(refused))
        raise UserError(
            f"these settings of the weights cannot be changed ({listed}); what can: image_px, drop_path, "
            "position from relative-shared to relative-per-block, final_norm and mask_token to false, "
            "token_types 2 to 3"
        )


def _refused(source: ModelConfig, target: ModelConfig, changed: set[str], grown: bool) -> list[str]:
    """Settings whose change goes the wrong way."""
    found = []
    if "position" in changed and (source.position, target.position) != (
        "relative-shared",
        "relative-per-block",
    ):
        found.append("position")
    for name in ("final_norm", "mask_token"):
        if name in changed and getattr(target, name) and not grown:
            found.append(name)
    added = grown and not source.token_types
    if "token_types" in changed and (source.token_types, target.token_types) != (2, 3) and not added:
        found.append("token_types")
    joins = grown and not source.vocabulary
    return found + [n for n in ("vocabulary", "text_tokens", "text_norm") if n in changed and not joins]
