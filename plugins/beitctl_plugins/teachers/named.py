"""The teachers of the papers by name: CLIP, and DINO with its successor."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from beitctl.api import Plugin
from beitctl.checkpoints.pickled import Entry, opened
from beitctl.errors import DataError, UserError
from beitctl_plugins.teachers import weights as weight_files
from beitctl_plugins.teachers.features import Features, Sight, on_grid
from beitctl_plugins.teachers.timm import final_map
from beitctl_plugins.teachers.weights import State

CLIP = {
    "vit-b/32": "vit_base_patch32_clip_quickgelu_224.openai",
    "vit-b/16": "vit_base_patch16_clip_quickgelu_224.openai",
    "vit-l/14": "vit_large_patch14_clip_quickgelu_224.openai",
    "vit-l/14@336": "vit_large_patch14_clip_quickgelu_336.openai",
}
"""OpenAI's CLIP in timm; ``vit_base_patch16_clip_224.openai`` has these weights, but another activation."""
DINO = {
    "vit-s/16": "vit_small_patch16_224.dino",
    "vit-s/8": "vit_small_patch8_224.dino",
    "vit-b/16": "vit_base_patch16_224.dino",
    "vit-b/8": "vit_base_patch8_224.dino",
    **{
        f"dinov2-vit-{size[0]}/14{tail}": f"vit_{size}_patch14{register}_dinov2.lvd142m"
        for size in ("small", "base", "large", "giant")
        for tail, register in (("", ""), ("-reg", "_reg4"))
    },
}
"""DINO and DINOv2, without and with register tokens, in timm."""
HF = "vision_model."
_HF_NAMES = (
    (r"^visual_projection\.", "head."),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.pre_layrnorm\.", "norm_pre."),
    (r"^vision_model\.post_layernorm\.", "norm."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
)
"""Names of transformers' CLIP and of timm's, besides those that change shape."""
_QKV = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)")
_DINO_HEADS = ("head.", "dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.")


class ClipTeacher(Plugin):
    """OpenAI's CLIP as BEiT v2 reads it: patch tokens after the last norm, times the visual projection."""

    model: Literal["vit-b/32", "vit-b/16", "vit-l/14", "vit-l/14@336"] = "vit-b/16"
    """Which CLIP; BEiT v2's tokenizer learned from ``vit-b/16``."""
    weights: str = "pretrained"
    """``pretrained`` (timm fetches them), ``random``, or a file or folder: OpenAI's state dict, open_clip's,
    timm's, or transformers' ``CLIPModel``."""
    quick_gelu: bool = True
    """The activation x sigmoid(1.702 x), with which OpenAI's weights were trained; most of open_clip's were
    trained with the exact GELU: ``false`` for their files."""
    input_px: int = Field(default=224, ge=32)
    """Side of the picture that the teacher sees, in pixels; ``vit-l/14@336`` was trained at 336. Positions
    are resampled."""

    def open(self, grid: int) -> Any:
        """The frozen features on a grid, as wide as CLIP's common space.

        Raises:
            UserError: ``input_px`` is no multiple of the patch, or the weights need another ``quick_gelu``.
            SetupError: the weights cannot be fetched.
            DataError: the weights do not fit the model, or give features that are not finite.
        """
        if self.weights == "pretrained" and not self.quick_gelu:
            raise UserError(
                "clip: OpenAI's weights need quick_gelu = true; false is for files of weights that were "
                "trained with the exact GELU"
            )
        act = {} if self.quick_gelu else {"act_layer": "gelu"}
        network = weight_files.timm_network(CLIP[self.model], self.weights, self.input_px, self._load, **act)
        name, cfg = f"clip {self.model}", network.pretrained_cfg
        sight = Sight(name, self.input_px, cfg["mean"], cfg["std"])
        return Features(network, partial(_projected, name=name), sight, grid)

    def _load(self, network: Any, file: Path) -> None:
        self._check_note(file, network.blocks[0].attn.num_heads)
        state = clip_names(weight_files.tensors(file))
        weight_files.check_kernel(network, state, file)
        weight_files.load_named(network, weight_files.in_timms_names(state, network), file)

    def _check_note(self, file: Path, heads: int) -> None:
        """Compare what a ``config.json`` of transformers beside the file says with what no tensor says.

        Raises:
            UserError: its activation is another.
            DataError: its number of heads is another.
        """
        note = _vision_note(file)
        said = note.get("hidden_act")
        if said is not None and (said == "quick_gelu") != self.quick_gelu:
            raise UserError(
                f"{file}: the config.json there says hidden_act = {said!r}: set quick_gelu = "
                f"{str(said == 'quick_gelu').lower()}"
            )
        if note.get("num_attention_heads", heads) != heads:
            raise DataError(
                f"{file}: the config.json there says {note['num_attention_heads']} attention heads, "
                f"{self.model} has {heads}; name the file's own model"
            )


class DinoTeacher(Plugin):
    """DINO or DINOv2: patch tokens after the last norm, class and register tokens dropped."""

    model: Literal[*DINO] = "vit-b/16"  # type: ignore[valid-type]
    """Which DINO; BEiT v2's second tokenizer learned from ``vit-b/16``."""
    weights: str = "pretrained"
    """``pretrained`` (timm fetches them), ``random``, or a file: the official backbone, a checkpoint of the
    official training (its teacher is read), or timm's."""
    input_px: int = Field(default=224, ge=32)
    """Side of the picture that the teacher sees, in pixels; positions are resampled."""

    def open(self, grid: int) -> Any:
        """The frozen features on a grid.

        Raises:
            UserError: ``input_px`` is no multiple of the patch.
            SetupError: the weights cannot be fetched.
            DataError: the weights do not fit the model, or give features that are not finite.
        """
        network = weight_files.timm_network(DINO[self.model], self.weights, self.input_px, _load_dino)
        name, cfg = f"dino {self.model}", network.pretrained_cfg
        sight = Sight(name, self.input_px, cfg["mean"], cfg["std"])
        return Features(network, partial(final_map, name=name), sight, grid)


def _projected(network: Any, pixels: Tensor, name: str) -> Tensor:
    """BEiT v2's target (arXiv:2208.06366, section 2.1): norm, then projection, of every patch token."""
    tokens = network.head(network.forward_features(pixels))
    grid = network.patch_embed.dynamic_feat_size(tuple(pixels.shape[-2:]))
    return on_grid(tokens, network.num_prefix_tokens, name, grid)


def clip_names(state: State) -> State:
    """A CLIP's state dict under OpenAI's names or timm's; text towers are left out.

    Args:
        state: OpenAI's or open_clip's, whole or only its ``visual``; transformers' ``CLIPModel`` or
            ``CLIPVisionModelWithProjection``; timm's.
    """
    if f"{HF}embeddings.class_embedding" in state:
        return _from_transformers(state)
    if "class_embedding" in state and "conv1.weight" in state:
        return {f"visual.{name}": tensor for name, tensor in state.items()}
    return state


def _from_transformers(state: State) -> State:
    """Transformers' CLIP under timm's names."""
    found: State = {}
    for name, tensor in state.items():
        if match := _QKV.fullmatch(name):
            names = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            if all(part in state for part in names):
                found[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = torch.cat([state[part] for part in names])
            continue
        new = name
        for pattern, ours in _HF_NAMES:
            new = re.sub(pattern, ours, new)
        if new != name:
            found[new] = tensor
    found["cls_token"] = state[f"{HF}embeddings.class_embedding"].reshape(1, 1, -1)
    if f"{HF}embeddings.position_embedding.weight" in state:
        found["pos_embed"] = state[f"{HF}embeddings.position_embedding.weight"][None]
    if "head.weight" in found:
        found["head.bias"] = found["head.weight"].new_zeros(len(found["head.weight"]))
    return found


def _vision_note(file: Path) -> dict[str, Any]:
    """The settings of transformers' vision tower beside a file; empty if there are none."""
    path = (file if file.is_dir() else file.parent) / "config.json"
    try:
        note = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    note = note if isinstance(note, dict) else {}
    inner = note.get("vision_config", note)
    return inner if isinstance(inner, dict) else {}


def _load_dino(network: Any, file: Path) -> None:
    state = _dino_tensors(file)
    weight_files.check_kernel(network, state, file)
    weight_files.load_named(network, weight_files.in_timms_names(state, network), file)


def _dino_tensors(file: Path) -> State:
    """The backbone in a file of DINO's code: alone, or in the teacher of a training checkpoint.

    Raises:
        DataError: it holds no tensors.
    """
    try:
        state = weight_files.tensors(file)
    except DataError:
        state = _trained_teacher(file)
        if not state:
            raise
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    inside = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
    state = inside or state
    return {name: tensor for name, tensor in state.items() if not name.startswith(_DINO_HEADS)}


def _trained_teacher(file: Path) -> State:
    """The tensors under ``teacher`` in a checkpoint of DINO's training; empty if there are none."""
    try:
        with opened(file) as checkpoint:
            tree = checkpoint.tree
            inner = tree.get("teacher") if isinstance(tree, dict) else None
            items = inner.items() if isinstance(inner, dict) else ()
            return {k: checkpoint.tensor(v, k).float() for k, v in items if isinstance(v, Entry)}
    except (DataError, OSError):
        return {}
