"""Settings of the model and of the training loop; standard library only, so that the engine needs no more.

The classes are plain dataclasses that pydantic reads from a recipe table: unknown keys are errors there.
"""

from dataclasses import dataclass
from typing import Any, Literal

STRICT: dict[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True, "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Multiway Transformer: every model of the family is a setting of it.

    BEiT-1 arXiv:2106.08254, BEiT v2 arXiv:2208.06366, VLMo arXiv:2111.02358, BEiT-3 arXiv:2208.10442; ViT
    arXiv:2010.11929 and DeiT arXiv:2012.12877 as what they are measured against. docs/models.md has each
    one's settings.
    """

    __pydantic_config__ = STRICT

    layers: int
    """Number of blocks."""
    width: int
    """Width d of the residual stream."""
    heads: int
    """Attention heads; ``width`` must be a multiple."""
    ffn: int
    """Inner width of every expert FFN."""
    image_px: int | tuple[int, int] = 224
    """Side of the square input picture in pixels, or its height and width."""
    patch_px: int = 16
    """Side of a patch in pixels; ``image_px`` must be a multiple."""
    channels: int = 3
    """Channels of the input picture."""
    vocabulary: int = 0
    """Rows of the text embedding; 0 builds a model without a language branch."""
    text_tokens: int = 0
    """Longest text in tokens, special tokens included; at least 2 with a language branch."""
    attention: Literal["shared", "decoupled"] = "shared"
    """``shared``: one set of projections (paper); ``decoupled``: one per modality (released base, large)."""
    fusion_layers: int = 0
    """Top layers with vision-language experts for pairs (BEiT-3's paper: 3; VLMo: 2 or 3; released BEiT-3:
    0)."""
    position: Literal["absolute", "relative-shared", "relative-per-block"] = "absolute"
    """``absolute``: learned positions; ``relative-shared``: one table of attention biases for all blocks
    (BEiT while pretraining); ``relative-per-block``: one for each (BEiT fine-tuned, VLMo)."""
    norm: Literal["pre", "sub"] = "sub"
    """``sub`` adds the two inner LayerNorms of Magneto, before the output projection and before fc2."""
    key_bias: bool = True
    """Whether keys have a bias (BEiT-1, BEiT v2 and VLMo: no)."""
    norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""
    final_norm: bool = True
    """Whether a LayerNorm ends the last block; classifiers of the mean patch have their own instead."""
    layer_scale: float = 0.0
    """Start of the learned scale of both branches of a block, shared by its experts; 0: there is none."""
    mask_token: bool = True
    """Whether patches can be masked."""
    distill_token: bool = False
    """DeiT's second class token."""
    text_norm: bool = False
    """BERT's text embedding: a token-type vector and a LayerNorm of epsilon 1e-12 (VLMo)."""
    token_types: int = 0
    """Learned vectors added to tell texts (0) from pictures (1, NLVR2's second picture 2); VLMo: 2 or 3."""
    text_first: bool = False
    """Whether ``forward`` gives the text of a pair before its picture (VLMo)."""
    pixels: Literal["half", "imagenet", "clip"] = "half"
    """Means and deviations that pictures are normalised with; ``half``: 0.5 and 0.5."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; it grows linearly from 0 in the first."""
    init: Literal["beit", "magneto", "released"] = "magneto"
    """Initialisation, see ``beitctl.model.init``."""

    def __post_init__(self) -> None:
        if not isinstance(self.image_px, int):
            object.__setattr__(self, "image_px", tuple(self.image_px))
        for name in ("layers", "width", "heads", "ffn", "patch_px", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if min(self.size) < 1 or any(side % self.patch_px for side in self.size):
            raise ValueError(f"image_px ({self.image_px}) must be a multiple of patch_px ({self.patch_px})")
        self._check_extras()
        self._check_text()

    def _check_extras(self) -> None:
        if not 0 <= self.fusion_layers <= self.layers:
            raise ValueError(f"fusion_layers ({self.fusion_layers}) must lie in 0..layers ({self.layers})")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path ({self.drop_path}) must be at least 0 and below 1")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps ({self.norm_eps}) must be above 0")
        if self.layer_scale < 0:
            raise ValueError(f"layer_scale ({self.layer_scale}) must not be negative; 0 is none")
        if self.distill_token and self.position != "absolute":
            raise ValueError(f'distill_token needs position = "absolute", found "{self.position}"')
        if self.token_types not in (0, 2, 3):
            raise ValueError(f"token_types ({self.token_types}) must be 0, 2 or 3")

    def _check_text(self) -> None:
        if self.vocabulary < 0 or self.text_tokens < 0:
            raise ValueError("vocabulary and text_tokens must not be negative")
        if self.vocabulary and self.text_tokens < 2:
            raise ValueError(f"text_tokens ({self.text_tokens}) must be at least 2: <s> and </s> take two")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input picture in pixels."""
        return (self.image_px, self.image_px) if isinstance(self.image_px, int) else self.image_px

    @property
    def side_px(self) -> int:
        """Side of the input picture where it must be square: wherever pictures are cropped.

        Raises:
            ValueError: it is not.
        """
        height, width = self.size
        if height != width:
            raise ValueError(f"image_px ({height}, {width}) must be square here: training crops squares")
        return height

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the height and along the width."""
        return self.size[0] // self.patch_px, self.size[1] // self.patch_px

    @property
    def patches(self) -> int:
        """Patches N of a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token, and DeiT's distillation token."""
        return 2 if self.distill_token else 1

    @property
    def picture_tokens(self) -> int:
        """Tokens P of a picture."""
        return self.prefix + self.patches

    @property
    def first_fusion(self) -> int:
        """Index of the first block with a vision-language expert; ``layers`` if there is none."""
        return self.layers - self.fusion_layers


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its schedule and the gradient clip."""

    __pydantic_config__ = STRICT

    peak_lr: float
    """Highest learning rate, reached at the end of the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the learning rate falls after the warm-up (VLMo: linear)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.05
    """Decoupled weight decay; 1-D tensors, class token and vision positions are exempt."""
    clip_norm: float = 0.0
    """Largest global gradient norm; 0 does not clip."""
    layer_decay: float = 1.0
    """Learning-rate factor from one block to the one below it; 1 switches it off."""
    head_factor: float = 1.0
    """Learning-rate factor of the heads but a pooler (VQA of BEiT-3 and VLMo: 20)."""

    def __post_init__(self) -> None:
        if self.peak_lr <= 0:
            raise ValueError(f"peak_lr ({self.peak_lr}) must be positive")
        if not 0 <= self.min_lr <= self.peak_lr:
            raise ValueError(f"min_lr ({self.min_lr}) must lie in 0..peak_lr ({self.peak_lr})")
        _not_negative(self, "warmup_steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas ({self.betas}) must be at least 0 and below 1")
        _not_negative(self, "weight_decay", "clip_norm")
        if self.eps <= 0:
            raise ValueError(f"eps ({self.eps}) must be above 0")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay ({self.layer_decay}) must be above 0 and at most 1")
        if self.head_factor <= 0:
            raise ValueError(f"head_factor ({self.head_factor}) must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: how long, how precise, how often to save and log."""

    __pydantic_config__ = STRICT

    steps: int
    """Optimizer steps."""
    optim: OptimConfig
    """Optimizer and schedule."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type; ``auto`` is bf16 where the hardware multiplies it natively, else fp32."""
    micro_samples: int = 0
    """Most samples in one forward pass on one device; more are accumulated. 0: no limit."""
    compile: Literal["auto", "on", "try", "off"] = "auto"
    """Whether blocks are compiled (``torch.compile``, no graph breaks); ``auto``: on GPUs; ``try``: where the
    compiler fails, the run goes on without it and says so, where the others end it (exit 4)."""
    attention_backend: Literal["auto", "padded", "varlen-flash", "varlen-fa3", "varlen-cudnn"] = "auto"
    """Kernel of attention; ``auto``: ``varlen-flash`` in bf16 on GPUs, else ``padded``. ``varlen-fa3`` and
    ``varlen-cudnn`` are tried on adversarial input before the first step and refused if they err."""
    memory_budget: float = 1.0
    """Share of the activations of a compiled block that is kept for the backward pass; the rest is computed
    again, cheapest first. 1 keeps what the compiler would."""
    recompute: bool = False
    """Full activation checkpointing: a block keeps its input alone and runs again in the backward pass."""
    shard_ranks: int = 0
    """Ranks that share one copy of weights, gradients and optimizer state (FSDP); groups of so many hold
    replicas (HSDP). 0: the ranks of one machine."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the weights, which are then what the run gives; 0: none."""
    seed: int = 0
    """Seed of initial weights, order, crops, masks and stochastic depth."""
    save_every_steps: int = 1000
    """Steps between checkpoints; one is also written at the end and when the run is stopped."""
    save_every_minutes: float = 15.0
    """A checkpoint is also written after this much time."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep."""
    keep_every_hours: float = 24.0
    """One checkpoint of every so many hours is kept besides; 0: none."""
    async_save: bool = True
    """Whether checkpoints are written in the background, from a copy in host memory."""
    max_rollbacks: int = 3
    """Returns to the last checkpoint, past the data since, before a diverging run is given up (exit 6)."""
    on_spike: Literal["warn", "rollback", "off"] = "warn"
    """What follows on a gradient norm far above its usual range (robust z-score over 200 steps)."""
    log_every_steps: int = 10
    """Steps between log records."""
    max_minutes: float = 0.0
    """Stop politely (exit 75) after this much time in one run; 0: no limit."""
    hang_minutes: float = 30.0
    """A process that finishes no step in this time is ended (exit 75) with its stacks on disk; 0: never."""
    max_bad_share: float = 0.001
    """Share of an objective's examples that may be unreadable; one always may."""
    workers: int = 0
    """Data-loading processes per rank; 0 loads in the main process."""
    log_samples: bool = False
    """Whether ``events.jsonl`` names the samples of every step that is logged."""
    profile: tuple[int, int] | None = None
    """First and last step of a window that is profiled: a trace per rank goes to ``profile/``."""

    def __post_init__(self) -> None:
        for name in ("steps", "keep_checkpoints", "log_every_steps", "save_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        _not_negative(self, "hang_minutes", "micro_samples", "workers", "max_minutes", "seed")
        if self.save_every_minutes <= 0:
            raise ValueError(f"save_every_minutes ({self.save_every_minutes}) must be positive")
        self._check_engine()
        if (warmup := self.optim.warmup_steps) > self.steps:
            raise ValueError(f"optim.warmup_steps ({warmup}) must not exceed steps ({self.steps})")

    def _check_engine(self) -> None:
        if not 0 < self.memory_budget <= 1:
            raise ValueError(f"memory_budget ({self.memory_budget}) must be above 0 and at most 1")
        if self.memory_budget < 1 and (self.compile == "off" or self.recompute):
            raise ValueError(
                f"memory_budget ({self.memory_budget}) must be 1 unless blocks are compiled: "
                'compile = "off" and recompute = true exclude it'
            )
        _not_negative(self, "shard_ranks", "max_rollbacks", "keep_every_hours")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay ({self.ema_decay}) must be at least 0 and below 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share ({self.max_bad_share}) must lie in 0..1")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile ({list(self.profile)}) must be [first step, last step], from 1 on")


def _not_negative(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} ({getattr(settings, name)}) must not be negative")
