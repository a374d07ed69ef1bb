"""VQ-KD as a plugin: training against a teacher, and the frozen tokenizer that comes out of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor

from beitctl.api import Job, Plugin, Source, TeacherField
from beitctl.checkpoints.native import fit
from beitctl.config import ModelConfig, TrainConfig
from beitctl.data.loader import Place, Stream
from beitctl.engine import dist
from beitctl.engine.compiling import preparation
from beitctl.engine.loop import train
from beitctl.engine.session import Session
from beitctl.engine.shard import full_weights, sharded
from beitctl.errors import DataError, UserError
from beitctl.model.codebook import Codebook, Rules, Upkeep, perplexity
from beitctl.model.init import initial
from beitctl.model.vqkd import VQKDModel
from beitctl_plugins.tokenizers.collapse import (
    CollapseGuard,
    Variety,
    check_teacher,
    few_rows,
    spread_of,
    variety,
)
from beitctl_plugins.tokenizers.views import Crops, streams_of
from beitctl_plugins.tokenizers.vqkd_learner import Losses, ViewSteps, VQKDLearner
from beitctl_plugins.tokenizers.vqkd_measuring import Window, fixed_views, measure
from beitctl_plugins.tokenizers.vqkd_tokenizer import VQKDTokenizer, official

WEIGHTS = "tokenizer.safetensors"
NOTE = "tokenizer.json"
STUDIED = 256
"""Pictures that the teacher is tried on before training."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of the tokenizer's two Vision Transformers."""

    __pydantic_config__ = ModelConfig.__pydantic_config__

    layers: int = 12
    """Blocks of the encoder."""
    decoder_layers: int = 3
    """Blocks of the decoder."""
    width: int = 768
    """Width of both."""
    heads: int = 12
    """Attention heads of both."""
    ffn: int = 3072
    """FFN width of both."""
    image_px: int = 224
    """Side of the picture that is tokenized, in pixels."""
    patch_px: int = 16
    """Side of a patch in pixels: one code each."""
    init: Literal["beit", "magneto", "released"] = "beit"
    """Initialisation."""

    def __post_init__(self) -> None:
        self.encoder()
        if self.decoder_layers < 1:
            raise ValueError(f"decoder_layers ({self.decoder_layers}) must be at least 1")

    def encoder(self) -> ModelConfig:
        """The encoder as a Multiway model: BEiT v2's plain pre-norm ViT without key bias."""
        return ModelConfig(
            layers=self.layers, width=self.width, heads=self.heads, ffn=self.ffn, image_px=self.image_px,
            patch_px=self.patch_px, norm="pre", key_bias=False, norm_eps=1e-6, mask_token=False,
            init=self.init,
        )  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "alive": {},
    "small": {"revive_after": 10, "centre": True},
    "official": {
        "start": "random", "start_after": 0, "revive_after": 0, "entropy": 0.0, "centre": False,
        "min_used_share": 0.0,
    },
}  # fmt: skip
"""What the presets set. ``small`` also sleeps for a third of the steps."""


class VQKD(Plugin):
    """A vector-quantised tokenizer that learns to reconstruct a teacher's features (BEiT v2)."""

    teacher: TeacherField
    """The frozen network to learn from."""
    train_config: TrainConfig = Field(alias="train")
    """The training loop."""
    preset: Literal["alive", "small", "official"] = "alive"
    """Defaults of the settings below. ``alive``: codes start spread out and dead ones are revived; ``small``:
    the same for short runs on 30,000 pictures or fewer; ``official``: as released, without any of it."""
    shape: Shape = Field(default_factory=Shape)
    """Size of the networks."""
    codes: int = Field(default=8192, ge=2, le=65_536)
    """Codes of the codebook."""
    code_width: int = Field(default=32, ge=1)
    """Width of a code."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Moving-average decay of the codes."""
    commitment: float = Field(default=1.0, ge=0)
    """Weight of the commitment loss."""
    start: Literal["k-means++", "random"] = "k-means++"
    """First centres of the k-means that gives the first codes (released code: random vectors)."""
    revive_after: int = Field(default=100, ge=0)
    """Steps without use after which a code is put on a recent vector that lies far from all codes; 0 never
    (the released code)."""
    start_after: int = Field(default=0, ge=0)
    """Steps of training without the codebook, so that its k-means start meets vectors that mean something
    (the released code: 0). Short trainings need it: codes that start on untrained vectors drift together."""
    entropy: float = Field(default=0.0, ge=0)
    """Weight of a term that rewards even use of the codes; 0 is without."""
    centre: bool = False
    """Subtract the mean feature from the teacher's features (released code: no). Convolutional teachers have
    a large common part that says nothing and is reconstructed without looking."""
    min_used_share: float = Field(default=0.05, ge=0, le=1)
    """Share of the codes that must be used between two log records; training stops when three in a row fall
    short, or at once when the teacher cannot tell as many patches apart. 0 lets everything pass."""
    samples: int = Field(default=512, ge=1)
    """Pictures per step, over all ranks and sources."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the picture that a crop shows."""

    @model_validator(mode="after")
    def _unaveraged(self) -> "VQKD":
        if self.train_config.ema_decay:
            raise ValueError(
                f"train.ema_decay ({self.train_config.ema_decay:g}) must be 0: codes belong to the encoder "
                "as it is, an averaged one would assign others"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, table: Any) -> Any:
        """Fill in what the preset says; ``official`` admits nothing else."""
        if not isinstance(table, dict) or table.get("preset", "alive") not in PRESETS:
            return table
        name, train = table.get("preset", "alive"), table.get("train")
        values = dict(PRESETS[name])
        steps = train.get("steps") if isinstance(train, dict) else getattr(train, "steps", None)
        if name == "small" and isinstance(steps, int):
            values["start_after"] = steps // 3
        if name == "official":
            other = [key for key, value in values.items() if table.get(key, value) != value]
            if other:
                listed = ", ".join(f"{key} = {values[key]!r}".replace("False", "false") for key in other)
                raise ValueError(
                    f'preset = "official" means {listed}; remove {", ".join(other)} or the preset'
                )
        return {**values, **table}

    def plan(self) -> Mapping[str, Any]:
        encoder = self.shape.encoder()
        with torch.device("meta"):
            model = self._model(1)
        return {
            "tokenizer": f"VQ-KD, {self.codes} codes of width {self.code_width}, "
            f"{encoder.grid[0]} x {encoder.grid[1]}",
            "parameters (without the last layer)": sum(p.numel() for p in model.parameters()),
            "pictures seen": self.samples * self.train_config.steps,
        }

    def train(self, sources: Sequence[Source], job: Job) -> Mapping[str, Any]:
        ranks = dist.start()
        encoder = self.shape.encoder()
        teacher = self.teacher.open(encoder.grid[0]).to(ranks.device)
        seed, streams = self.train_config.seed, self._streams(sources)
        found = self._study(teacher, streams, ranks)
        learner: VQKDLearner = sharded(
            lambda: self._learner(teacher.width, sum(stream.samples for stream in streams)),
            ranks,
            self.train_config.precision,
            lambda name, shape: initial(name, shape, encoder, seed),
            prepare=preparation(self.train_config, ranks, job.log.warning),
            shard_ranks=self.train_config.shard_ranks,
        ).teach(teacher)
        if self.centre:
            learner.model.feature_mean.copy_(found.mean)
        windows = self._loop(learner, streams, ranks, job)
        weights = full_weights(learner)
        if ranks.main:
            self._write(weights, teacher.width, job.folder / "tokenizer")
        ranks.barrier()
        if not ranks.main:
            return {}
        tokenizer = self.load(job.folder / "tokenizer")
        return measure(tokenizer, streams, teacher, job.log, windows) | {"teacher_groups": found.groups}

    def _study(self, teacher: Any, streams: Sequence[Stream], ranks: dist.Ranks) -> Variety:
        """What the teacher says of some pictures, the same on every rank.

        Raises:
            DataError: it is of no use.
        """
        rows = []
        for fixed, _ in fixed_views(streams, STUDIED):
            rows.append(few_rows(teacher(fixed.large.to(ranks.device).float() / 255).float()))
        found = variety(torch.cat(rows))
        if self.min_used_share:
            check_teacher(found, self.codes, self.min_used_share)
        return found

    def _loop(
        self, learner: VQKDLearner, streams: Sequence[Stream], ranks: dist.Ranks, job: Job
    ) -> list[Window]:
        """Train to the end; gives the uses of every code in each window between two log records."""
        config, upkeep = self.train_config, learner.upkeep
        data = ViewSteps(streams, config.seed, Place(ranks.rank, ranks.world, config.micro_samples))
        guard, windows = CollapseGuard(self.codes, self.min_used_share), list[Window]()
        seen = torch.zeros(self.codes, device=ranks.device)

        def started(step: int) -> None:
            seen.copy_(upkeep.usage)
            if step:
                job.log.note(f"resuming from step {step}")

        def returned(step: int) -> None:
            seen.copy_(upkeep.usage)
            windows[:] = [window for window in windows if window[0] <= step]

        session = Session(
            ranks, job.folder, "vqkd", job.resume, self.shape.layers,
            examples={stream.name: len(stream.examples) for stream in streams}, saved=job.log.checkpoint,
            started=started, returned=returned,
            warn=job.log.warning, sampled=job.log.samples,
        )  # fmt: skip
        with closing(train(learner, data, config, session)) as steps:
            for step in steps:
                if step.number % config.log_every_steps == 0 or step.number == config.steps:
                    window = upkeep.usage - seen
                    seen.copy_(upkeep.usage)
                    metrics = step.metrics()
                    for name in ("commitment/accuracy", "entropy/accuracy"):
                        metrics.pop(name, None)
                    metrics["similarity/cosine"] = metrics.pop("similarity/accuracy")
                    if window.any():
                        windows.append((step.number, window.long().cpu().numpy()))
                        metrics |= {
                            "codebook_used": float((window > 0).sum()),
                            "codebook_perplexity": perplexity(window),
                            "codebook_spread": spread_of(upkeep.recent),
                        }
                    job.log.step(step.number, config.steps, metrics)
                    if window.any():
                        guard.check(step.number, window, upkeep.recent)
        return windows

    def _streams(self, sources: Sequence[Source]) -> list[Stream]:
        sizes = (self.shape.image_px, int(getattr(self.teacher, "input_px", self.shape.image_px)))
        return streams_of(sources, self.samples, Crops(self.crop_scale, sizes), self.shape.encoder())

    def _learner(self, features: int, samples: int) -> VQKDLearner:
        model = self._model(features)
        rules = Rules(
            decay=self.decay, start=self.start, start_after=self.start_after, revive_after=self.revive_after,
            seed=self.train_config.seed,
        )  # fmt: skip
        upkeep = Upkeep(model.codebook, rules, samples)
        return VQKDLearner(model, Losses(self.commitment, self.entropy), upkeep)

    def _model(self, features: int) -> VQKDModel:
        return VQKDModel(
            self.shape.encoder(), self.shape.decoder_layers, features, Codebook(self.codes, self.code_width)
        )

    def _write(self, weights: Mapping[str, Tensor], features: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: value for name, value in weights.items() if name.startswith("model.")}
        tensors = {name.removeprefix("model."): value.contiguous() for name, value in own.items()}
        save_file(tensors, folder / WEIGHTS)
        note = {
            "kind": "vqkd",
            "shape": asdict(self.shape),
            "codes": self.codes,
            "code_width": self.code_width,
            "features": features,
            "preset": self.preset,
            "teacher": self.model_dump(mode="json")["teacher"],
            "fingerprint": hashlib.blake2b((folder / WEIGHTS).read_bytes(), digest_size=16).hexdigest(),
        }
        (folder / NOTE).write_text(json.dumps(note, indent=1))

    @classmethod
    def load(cls, folder: Path, heads: int | None = None) -> VQKDTokenizer:
        """Read the tokenizer of a folder, or a file of BEiT v2's official code.

        Args:
            folder: the folder, or a file such as ``vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth``.
            heads: attention heads of an official file, which does not say them; by default 64 channels each.

        Raises:
            DataError: a file is missing, damaged or not of this kind.
            UserError: ``heads`` is needed, does not fit, or is given for a folder, which says it.
        """
        if not folder.is_dir():
            return official(folder, heads)
        if heads is not None:
            raise UserError(f"{folder}: heads={heads} is for official files; a folder says it itself")
        try:
            note = json.loads((folder / NOTE).read_text())
            tensors = load_file(folder / WEIGHTS)
            digest = hashlib.blake2b((folder / WEIGHTS).read_bytes(), digest_size=16).hexdigest()
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: not a readable image tokenizer ({error})") from error
        if digest != note["fingerprint"]:
            raise DataError(
                f"{folder / WEIGHTS} was changed after training: its hash is not the one in {NOTE}"
            )
        shape = Shape(**note["shape"])
        codebook = Codebook(note["codes"], note["code_width"])
        model = VQKDModel(shape.encoder(), shape.decoder_layers, note["features"], codebook)
        fit(tensors, model, "", folder)
        return VQKDTokenizer(model, digest)
