"""The mixed batch of the benchmarks: pictures, texts and pairs with real lengths, and a learner for it.

Needs torch and numpy alone, so that ``benchmarks.gpu`` runs wherever these are.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from beitctl.config import ModelConfig, OptimConfig, TrainConfig
from beitctl.data.batch import Batch, Group, Portion, collate
from beitctl.engine.compiling import preparation
from beitctl.engine.dist import Ranks
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.losses import masked_cross_entropy, weighted
from beitctl.engine.shard import sharded
from beitctl.model.init import initial
from beitctl.model.multiway import Encoded, Multiway

CODES, VOCABULARY, TEXT_TOKENS = 8192, 64010, 128
"""Of BEiT-3."""
IMAGE_SHARE, TEXT_SHARE, PAIR_SHARE = 0.4, 0.15, 0.5
"""Hidden patches of pictures, tokens of texts, tokens of texts with a picture."""
CLIP = 3.0
"""Largest gradient norm, as in the recipes."""
SPECIAL = 4
"""Ids below this one are special; the first and the last token of a text are, and never hidden."""
CAPTION_TOKENS = (
    3, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7,
    7, 8, 8, 8, 8, 8, 9, 9, 9, 9, 9, 10, 10, 10, 10, 11, 11, 11, 12, 12, 12, 13, 13, 14, 15, 16, 18,
    20, 23, 32, 51, 98,
)  # fmt: skip
"""Tokens of the captions of the embedded data set, special ones included, where it cannot be read: 64
quantiles under a SentencePiece model of 8,000 pieces that was trained on it."""
PROSE_TOKENS = (
    23, 28, 32, 38, 42, 47, 53, 60, 68, 75, 81, 87, 94, 101, 107, 111, 115, 118, 123, 127, *[128] * 44,
)  # fmt: skip
"""The same of its prose, in windows of at most 128 tokens."""
SIZES = {
    "tiny": {"layers": 4, "width": 192, "heads": 3, "ffn": 768, "patch_px": 16},
    "base": {"layers": 12, "width": 768, "heads": 12, "ffn": 3072, "patch_px": 16},
    "large": {"layers": 24, "width": 1024, "heads": 16, "ffn": 4096, "patch_px": 16},
    "giant": {"layers": 40, "width": 1408, "heads": 16, "ffn": 6144, "patch_px": 14},
}
"""Base, large and giant of BEiT-3; ``tiny`` is as narrow and flat as a laptop wants it."""


def model_of(size: str, attention: str = "decoupled", **changes: Any) -> ModelConfig:
    """BEiT-3 in one of ``SIZES``: the released, decoupled form, or the paper's with three fusion layers."""
    settings: dict[str, Any] = {
        "vocabulary": VOCABULARY,
        "text_tokens": TEXT_TOKENS,
        "attention": attention,
        "fusion_layers": 3 if attention == "shared" else 0,
    }
    return ModelConfig(**{**SIZES[size], **settings, **changes})


@dataclass(frozen=True)
class Term:
    """What a loss is averaged over."""

    unit: str
    weight: float = 1.0


@dataclass(frozen=True)
class Masked:
    """The three masked objectives of BEiT-3 as far as a step is concerned; ``layout`` says which."""

    layout: str
    codes: int = CODES

    def terms(self) -> Mapping[str, Term]:
        """Losses by short name."""
        if self.layout == "pair":
            return {"": Term("text"), "image": Term("patch")}
        return {"": Term("text" if self.layout == "text" else "patch")}

    def heads(self, tools: Any) -> dict[str, nn.Module]:
        """Linear layers to codes and to ids, shared by name."""
        width, vocabulary = tools.model.width, tools.model.vocabulary
        found: dict[str, nn.Module] = {}
        if self.layout != "text":
            found["image_codes"] = nn.Linear(width, self.codes)
        if self.layout != "image":
            found["text_tokens"] = nn.Linear(width, vocabulary)
        return found

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Sums of cross-entropies at the hidden places alone."""
        found = {}
        if self.layout != "image":
            rows = encoded.rows[group.text_rows]
            found[""] = masked_cross_entropy(rows, group.text_targets, heads["text_tokens"])
        if self.layout != "text":
            rows = encoded.rows[group.patch_rows]
            name = "image" if self.layout == "pair" else ""
            found[name] = masked_cross_entropy(rows, group.patch_targets, heads["image_codes"])
        return found


def settings(**changes: Any) -> TrainConfig:
    """Settings of a run that does not save, log or stop before a benchmark is over."""
    never: dict[str, Any] = {
        "save_every_steps": 10**6, "save_every_minutes": 1e6, "log_every_steps": 10**6, "hang_minutes": 0.0,
    }  # fmt: skip
    adam = OptimConfig(peak_lr=1e-4, betas=(0.9, 0.98), clip_norm=CLIP)
    return TrainConfig(**{"steps": 10**6, "optim": adam, **never, **changes})


def learner_of(
    config: ModelConfig, layouts: Sequence[str] = ("image", "text", "pair"), codes: int = CODES
) -> MultiwayLearner:
    """A model with its heads, as the stage pretrain builds it."""
    objectives = [Objective(layout, Masked(layout, codes)) for layout in layouts]  # type: ignore[arg-type]
    tools: Any = dict.fromkeys(layouts, SimpleNamespace(model=config))
    return MultiwayLearner(Multiway(config), objectives, tools)


def prepared(build: Callable[[], nn.Module], ranks: Ranks, config: TrainConfig, initial: Any) -> Any:
    """A learner as a run has it: attention kernel, compiled blocks, sharding; with its weights."""
    told = preparation(config, ranks, lambda code, text, fix: print(f"{code}: {text}", file=sys.stderr))
    return sharded(build, ranks, config.precision, initial, prepare=told)


def counted(config: ModelConfig, codes: int = CODES) -> MultiwayLearner:
    """A learner without numbers, whose operations can be counted."""
    with torch.device("meta"):
        return learner_of(config, codes=codes)


def starts(config: ModelConfig) -> Any:
    """Initial value of every parameter, as a function of name and shape."""
    return lambda name, shape: initial(name, shape, config, 0)


@dataclass(frozen=True)
class Mix:
    """What a batch consists of: pictures, and the tokens of its texts and of those of its pairs."""

    images: int
    texts: tuple[int, ...]
    pairs: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Pictures, texts and pairs."""
        return self.images + len(self.texts) + len(self.pairs)


def mix_of(samples: int, captions: Sequence[int], prose: Sequence[int], seed: int = 0) -> Mix:
    """So many pictures, texts and pairs, with lengths drawn from the known ones."""
    rng = np.random.default_rng(seed)

    def drawn(known: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(n) for n in rng.choice(np.array(known), samples, replace=samples > len(known)))

    return Mix(samples, drawn(prose), drawn(captions))


def batch_of(mix: Mix, config: ModelConfig, *, codes: int = CODES, multiple: int = 1, seed: int = 0) -> Batch:
    """A packed batch of noise in which the usual shares are hidden; ``multiple`` as of ``collate``."""
    rng = np.random.default_rng(seed)

    def item(picture: bool, tokens: int, share: float) -> Any:
        found: dict[str, Any] = dict.fromkeys(
            ("image", "image_mask", "patch_targets", "text", "text_targets", "code_view")
        )
        found["extra"] = {}
        if picture:
            hidden = _hidden(config.patches, IMAGE_SHARE, rng)
            found["image"] = rng.integers(0, 256, (config.channels, *config.size), dtype=np.uint8)
            found["image_mask"] = hidden
            found["patch_targets"] = np.where(hidden, rng.integers(0, codes, config.patches), -1)
        if tokens:
            ids = rng.integers(SPECIAL, config.vocabulary - 1, tokens)
            hidden = np.concatenate([[False], _hidden(tokens - 2, share, rng), [False]])
            found["text"] = np.where(hidden, config.vocabulary - 1, ids)
            found["text_targets"] = np.where(hidden, ids, -1)
        return SimpleNamespace(**found, label=-1, chance=())

    portions = [Portion("image", "image", [item(True, 0, 0) for _ in range(mix.images)])]
    if config.vocabulary:
        portions += [
            Portion("text", "text", [item(False, n, TEXT_SHARE) for n in mix.texts]),
            Portion("pair", "pair", [item(True, n, PAIR_SHARE) for n in mix.pairs]),
        ]
    return collate(portions, config, multiple)


def _hidden(places: int, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(places,) bool, exactly so many hidden, at least one."""
    found = np.zeros(places, np.bool_)
    found[rng.permutation(places)[: max(1, round(share * places))]] = True
    return found


def loss_of(learner: Any, batch: Batch) -> Tensor:
    """The loss of a step as the training loop computes it."""
    return weighted(learner(batch), learner.weights, learner.counts(batch))


def moved(value: Any, device: torch.device, half: bool = False) -> Any:
    """Nested mappings and tuples of tensors on a device; with ``half``, floating numbers in bf16."""
    if isinstance(value, Mapping):
        return {name: moved(part, device, half) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(part, device, half) for part in value)
    value = value.to(device)
    return value.to(torch.bfloat16) if half and value.is_floating_point() else value
