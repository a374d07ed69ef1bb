"""BEiT v2's image tokenizer VQ-KD as microsoft/unilm saves it.

Encoder and decoder are fine-tuning ViTs of that code, read patch by patch. Training files also hold the
teacher, which is not read. Source: microsoft/unilm 768a3c8, beit2/modeling_vqkd.py and norm_ema_quantizer.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from beitctl.checkpoints import mapping
from beitctl.checkpoints.mapping import UNREAD, Pair, Table, same, view
from beitctl.checkpoints.parts import HEAD_WIDTH, linear, norm, shape, square
from beitctl.checkpoints.unilm_beit import body
from beitctl.config import ModelConfig
from beitctl.errors import UserError
from beitctl.model.codebook import Codebook
from beitctl.model.vqkd import VQKDModel, decoder_config

NAME = "unilm VQ-KD"
DROPPED = ("loss", "teacher", "scaling")
"""Beginnings of names that the official loader leaves out too."""
AVERAGES = ("quantize.cluster_size", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
"""Moving averages that no part of either code reads."""
HALVES = ("encoder", "decoder")


@dataclass(frozen=True, kw_only=True)
class VQKDSizes:
    """Everything that makes the shape of a tokenizer."""

    encoder: ModelConfig
    decoder_layers: int
    features: int
    """Width of the teacher's features."""
    codes: int
    code_width: int

    def model(self) -> VQKDModel:
        """A tokenizer of these sizes, with values of no meaning."""
        codebook = Codebook(self.codes, self.code_width)
        return VQKDModel(self.encoder, self.decoder_layers, self.features, codebook)


def is_vqkd(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of this format."""
    return {"encode_task_layer.0.weight", "quantize.embedding.weight"} <= state.keys()


def sizes_of(state: Mapping[str, Tensor], heads: int | None = None) -> VQKDSizes:
    """Sizes that the tensors of a file say.

    Args:
        state: the file.
        heads: attention heads; by default 64 channels each, as in all released files.

    Raises:
        UserError: the number of heads does not divide the width.
        ValueError: a tensor that says a size is missing, or the patches do not fill a square.
    """
    width, _, patch_px, _ = shape(state, "encoder.patch_embed.proj.weight", 4)
    patches = shape(state, "encoder.pos_embed", 3)[1] - 1
    side = square(patches)
    if not side:
        raise ValueError(f"encoder.pos_embed is for {patches} patches, which are no square")
    codes, code_width = shape(state, "quantize.embedding.weight", 2)
    encoder = ModelConfig(
        layers=_layers(state, "encoder"),
        width=width,
        heads=_heads(width, heads),
        ffn=shape(state, "encoder.blocks.0.mlp.fc1.weight", 2)[0],
        image_px=side * patch_px,
        patch_px=patch_px,
        norm="pre",
        key_bias=False,
        norm_eps=1e-6,
        mask_token=False,
        init="beit",
    )
    return VQKDSizes(
        encoder=encoder,
        decoder_layers=_layers(state, "decoder"),
        features=shape(state, "decode_task_layer.2.weight", 2)[0],
        codes=codes,
        code_width=code_width,
    )


def read_vqkd(
    state: Mapping[str, Tensor], heads: int | None = None
) -> tuple[VQKDSizes, dict[str, Tensor], dict[str, Tensor]]:
    """Sizes, the state dict of ``VQKDModel``, and the tensors that it does not read.

    A file's features lack no mean: it is zero. ``heads`` are those of ``sizes_of``.

    Raises:
        UserError: the number of heads does not divide the width.
        ValueError: tensors are missing, left over or of other shapes; lists them.
    """
    sizes = sizes_of(state, heads)
    table = vqkd_table(sizes)
    found = mapping.problems(table, state)
    if found:
        more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
        raise ValueError("; ".join(found[:20]) + more)
    tensors, unread = mapping.read(table, state)
    tensors["codebook.ready"] = tensors["codebook.ready"].long()
    return sizes, tensors | {"feature_mean": tensors["codebook.vectors"].new_zeros(sizes.features)}, unread


def write_vqkd(
    sizes: VQKDSizes, tensors: Mapping[str, Tensor], unread: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The official state dict of a tokenizer, which the official loader takes without a missing name.

    Args:
        sizes: its sizes.
        tensors: state dict of its ``VQKDModel``.
        unread: what ``read_vqkd`` kept; without it the averages are as the official code makes them at first.

    Raises:
        ValueError: its features lack the teacher's mean (``centre = true``), which the format cannot say.
    """
    if tensors["feature_mean"].any():
        raise ValueError(
            "its features are without the teacher's mean (centre = true), which the format cannot say"
        )
    kept = {name: tensors["codebook.vectors"].new_zeros(sizes.codes) for name in AVERAGES[:2]}
    kept |= {AVERAGES[2]: tensors["codebook.vectors"].clone()} | dict(unread or {})
    ready = tensors["codebook.ready"].float()
    return mapping.write(vqkd_table(sizes), {**tensors, "codebook.ready": ready}, kept)


def vqkd_table(sizes: VQKDSizes) -> Table:
    """All pairs of a file."""
    decoder = decoder_config(sizes.encoder, sizes.decoder_layers, sizes.code_width)
    pairs: list[Pair] = []
    for half, config in zip(HALVES, (sizes.encoder, decoder), strict=True):
        pairs += _half(half, config)
    width, codes = sizes.encoder.width, (sizes.codes, sizes.code_width)
    for ours, theirs, out in (
        ("to_code", "encode_task_layer", sizes.code_width),
        ("to_feature", "decode_task_layer", sizes.features),
    ):
        pairs += [*linear(f"{ours}.0", f"{theirs}.0", width, width)]
        pairs += [*linear(f"{ours}.2", f"{theirs}.2", out, width)]
    pairs.append(same("codebook.vectors", "quantize.embedding.weight", codes))
    pairs.append(view("codebook.ready", "quantize.embedding.initted", (), (1,)))
    for name in AVERAGES:
        pairs.append(same(UNREAD + name, name, codes if name.endswith("embed_avg") else codes[:1]))
    return Table(pairs, dropped=DROPPED)


def _half(half: str, config: ModelConfig) -> Iterator[Pair]:
    """One ViT: its final norm goes by the name that the norm of the mean patch has in a classifier."""
    pairs = [
        *body(replace(config, final_norm=False)),
        *norm("model.norm.shared", "fc_norm", config.width),
    ]
    for pair in pairs:
        ours = tuple(f"{half}.{name.removeprefix('model.')}" for name in pair.ours)
        yield replace(pair, ours=ours, theirs=tuple(f"{half}.{name}" for name in pair.theirs))


def _layers(state: Mapping[str, Tensor], half: str) -> int:
    """One more than the highest number of a block; gaps are then missing tensors."""
    start = f"{half}.blocks."
    numbers = [name.removeprefix(start).partition(".")[0] for name in state if name.startswith(start)]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _heads(width: int, heads: int | None) -> int:
    if heads is None and width % HEAD_WIDTH:
        raise UserError(
            "the file does not say how many attention heads the tokenizer has, and its width "
            f"{width} is no multiple of {HEAD_WIDTH}, a head's channels in released files: give heads=..."
        )
    heads = width // HEAD_WIDTH if heads is None else heads
    if heads < 1 or width % heads:
        raise UserError(f"heads ({heads}) must divide the width {width} of the tokenizer")
    return heads
