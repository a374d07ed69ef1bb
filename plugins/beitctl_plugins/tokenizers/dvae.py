"""A discrete VAE as a plugin: training from pictures alone, and the frozen tokenizer that comes out of it."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from beitctl.api import Job, Plugin, Source
from beitctl.checkpoints.files import read_tensors
from beitctl.checkpoints.native import fit
from beitctl.config import STRICT, ModelConfig, TrainConfig
from beitctl.data.loader import Place, Stream
from beitctl.engine import dist
from beitctl.engine.compiling import preparation
from beitctl.engine.learner import HALF, normalise, raw
from beitctl.engine.loop import train
from beitctl.engine.session import Session
from beitctl.engine.shard import full_weights, sharded
from beitctl.errors import DataError
from beitctl.model.codebook import perplexity
from beitctl.model.dvae import DiscreteVAE, initial_dvae
from beitctl.report import figures
from beitctl_plugins.tokenizers.dalle import check_codes, fingerprint
from beitctl_plugins.tokenizers.dvae_learner import DVAELearner, Schedule, ShotSteps, UseGuard
from beitctl_plugins.tokenizers.views import Crops, streams_of

WEIGHTS = "tokenizer.safetensors"
NOTE = "tokenizer.json"
BATCH = 64
MEASURED = 20_000
"""Pictures of each source whose central view is measured after training."""
SHOWN = 8
"""Pictures in a row of the gallery."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of the networks."""

    __pydantic_config__ = STRICT

    layers: int = 3
    """Halvings of the picture: one code for ``2 ** layers`` pixels squared (BEiT-1's code: 3)."""
    width: int = 256
    """Channels of the convolutions (BEiT-1's code: 256)."""
    blocks: int = 1
    """Residual blocks after every halving and every doubling (BEiT-1's code: 1); the costly part."""
    image_px: int = 112
    """Side of the picture that is tokenized, in pixels; 112 gives 14 x 14 codes."""

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= 8:
            raise ValueError(f"layers ({self.layers}) must lie in 1..8")
        if self.width < 1 or self.blocks < 0:
            raise ValueError(f"width ({self.width}) must be at least 1, blocks ({self.blocks}) at least 0")
        if self.image_px < 1 or self.image_px % self.patch_px:
            raise ValueError(
                f"image_px ({self.image_px}) must be a multiple of 2 ** layers ({self.patch_px}), "
                f"such as {max(1, round(self.image_px / self.patch_px)) * self.patch_px}"
            )

    @property
    def patch_px(self) -> int:
        """Side in pixels of what a code stands for."""
        return int(2**self.layers)


class DVAETokenizer:
    """A frozen discrete VAE; the code of a position is its most likely one."""

    def __init__(self, model: DiscreteVAE, image_px: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.codes, self.grid, self.image_px = model.codes, image_px // model.shrink, image_px
        self.fingerprint = fingerprint(model, image_px)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to (B, grid * grid) int64."""
        return self.model.tokens(self._pixels(images))

    @torch.no_grad()
    def closest(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, N) of (B, 3, H, W) uint8, and the log-probability (B, N) of each."""
        best = self.model.logits(self._pixels(images)).log_softmax(-1).max(-1)
        return best.indices, best.values

    @torch.no_grad()
    def reconstruct(self, codes: Tensor) -> Tensor:
        """Codes (B, N) of square pictures to the pictures (B, 3, H, W) uint8 that they stand for.

        Raises:
            ValueError: N is no square number, or there is no such code.
        """
        check_codes(codes, self.codes)
        side = math.isqrt(codes.shape[1])
        table = self.model.codebook.weight
        made = self.model.pictures(table[codes.to(table.device)], (side, side))
        return raw(made, HALF).mul(255).round().clamp(0, 255).to(torch.uint8)

    def save(self, folder: Path) -> None:
        """Write the weights and the note that says what they are."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.cpu().contiguous() for name, value in self.model.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        note = {"kind": "dvae", "image_px": self.image_px, "fingerprint": self.fingerprint}
        (folder / NOTE).write_text(json.dumps(note, indent=1))

    def _pixels(self, images: Tensor) -> Tensor:
        return normalise(images.to(self.model.codebook.weight.device), HALF)


class DVAE(Plugin):
    """A discrete VAE that learns to draw pictures from a grid of codes: BEiT-1's kind of tokenizer.

    It needs no teacher. Codes stand for colours and edges rather than for things; VQ-KD's say more (BEiT v2).
    """

    train_config: TrainConfig = Field(alias="train")
    """The training loop."""
    shape: Shape = Field(default_factory=Shape)
    """Size of the networks."""
    codes: int = Field(default=8192, ge=2, le=65_536)
    """Codes of the codebook."""
    code_width: int = Field(default=512, ge=1)
    """Width of a code (BEiT-1's code: 512)."""
    temperature_start: float = Field(default=1.0, gt=0)
    """Temperature of the Gumbel-softmax at the start: mixtures of many codes, so that all of them learn."""
    temperature_end: float = Field(default=0.0625, gt=0)
    """Temperature at the end: nearly one code each, as when pictures are tokenized."""
    anneal_steps: int = Field(default=0, ge=0)
    """Steps in which the temperature falls, along half a cosine; 0: all steps."""
    straight_through: bool = False
    """Draw from one code alone and not from the mixture; the gradient is still the mixture's."""
    loss: Literal["mse", "smooth-l1"] = "mse"
    """Error of normalised pixels: squared, or smooth absolute."""
    kl_weight: float = Field(default=1e-3, ge=0)
    """Weight of the KL divergence, in nats per position, of the codes' probabilities to the uniform
    distribution; the pixels' error is a mean over pixels and channels (BEiT-1's code: 0)."""
    kl_warmup_steps: int = Field(default=0, ge=0)
    """Steps in which ``kl_weight`` rises from 0."""
    usage_weight: float = Field(default=0.0, ge=0)
    """Weight of the term that favours codes which were rarely likely in the steps before, in nats per
    position (not in BEiT-1's code). Short trainings need it: most codes fall out of use without."""
    min_used_share: float = Field(default=0.01, ge=0, le=1)
    """Share of the codes that must be used between two log records after a quarter of the steps; too few
    three times in a row end the run (exit code 6). 0: no check."""
    samples: int = Field(default=512, ge=1)
    """Pictures per step, over all ranks and sources."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the picture that a crop shows."""

    def plan(self) -> Mapping[str, Any]:
        with torch.device("meta"):
            model = self._model()
        grid = self.shape.image_px // model.shrink
        return {
            "tokenizer": f"discrete VAE, {self.codes} codes of width {self.code_width}, {grid} x {grid}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "pictures seen": self.samples * self.train_config.steps,
        }

    def train(self, sources: Sequence[Source], job: Job) -> Mapping[str, Any]:
        ranks = dist.start()
        streams = self._streams(sources)
        learner: DVAELearner = sharded(
            lambda: DVAELearner(
                self._model(), self.kl_weight, self.usage_weight, self.loss, self.straight_through
            ),
            ranks,
            self.train_config.precision,
            lambda name, shape: initial_dvae(name, shape, self.train_config.seed),
            prepare=preparation(self.train_config, ranks, job.log.warning),
            shard_ranks=self.train_config.shard_ranks,
        )
        self._loop(learner, streams, ranks, job)
        weights = full_weights(learner)
        if ranks.main:
            model = self._model()
            prefix = "model."
            model.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            )
            DVAETokenizer(model, self.shape.image_px).save(job.folder / "tokenizer")
        ranks.barrier()
        tokenizer = self.load(job.folder / "tokenizer")
        tokenizer.model.to(ranks.device)
        return self._measure(tokenizer, streams, ranks, job)

    def _loop(self, learner: DVAELearner, streams: Sequence[Stream], ranks: dist.Ranks, job: Job) -> None:
        config = self.train_config
        schedule = Schedule(
            self.temperature_start, self.temperature_end, self.anneal_steps or config.steps,
            self.kl_warmup_steps, config.log_every_steps,
        )  # fmt: skip
        place = Place(ranks.rank, ranks.world, config.micro_samples)
        data = ShotSteps(streams, schedule, config.seed, place)
        session = Session(
            ranks, job.folder, "dvae", job.resume,
            examples={stream.name: len(stream.examples) for stream in streams}, saved=job.log.checkpoint,
            warn=job.log.warning, sampled=job.log.samples,
        )  # fmt: skip
        guard = UseGuard(self.codes, self.min_used_share, config.steps / 4)
        with closing(train(learner, data, config, session)) as steps:
            for step in steps:
                if step.number % config.log_every_steps == 0 or step.number == config.steps:
                    metrics = step.metrics() | {
                        "temperature": schedule.temperature(step.number - 1),
                        "codebook_used": float((learner.usage > 0).sum()),
                        "codebook_perplexity": perplexity(learner.usage),
                    }
                    metrics["pixels/mse"] = metrics.pop("pixels/accuracy")
                    metrics["kl/nats"] = metrics.pop("kl/accuracy")
                    metrics.pop("balance/accuracy")
                    job.log.step(step.number, config.steps, metrics)
                    guard.check(step.number, learner.usage)

    def _streams(self, sources: Sequence[Source]) -> list[Stream]:
        px = self.shape.image_px
        view = ModelConfig(layers=1, width=1, heads=1, ffn=1, image_px=px, patch_px=self.shape.patch_px)
        return streams_of(sources, self.samples, Crops(self.crop_scale, (px,)), view)

    def _model(self) -> DiscreteVAE:
        shape = self.shape
        return DiscreteVAE(shape.layers, shape.width, shape.blocks, self.codes, self.code_width)

    @classmethod
    def load(cls, folder: Path) -> DVAETokenizer:
        """Read the tokenizer of a folder.

        Raises:
            DataError: a file is missing, damaged, changed or not of this kind.
        """
        try:
            note = json.loads((folder / NOTE).read_text())
            kind, image_px, mark = note["kind"], note["image_px"], note["fingerprint"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{folder}: not a readable image tokenizer ({error!r})") from error
        if kind != "dvae":
            raise DataError(f"{folder / NOTE}: kind is {kind!r:.80}, expected 'dvae'; load it by its kind")
        tensors = read_tensors(folder / WEIGHTS)
        try:
            model = DiscreteVAE.from_shapes(tensors)
        except DataError as error:
            raise DataError(f"{folder / WEIGHTS}: {error}") from error
        if type(image_px) is not int or image_px < 1 or image_px % model.shrink:
            raise DataError(
                f"{folder / NOTE}: image_px is {image_px!r:.80}, expected a multiple of {model.shrink}"
            )
        fit(tensors, model, "", folder / WEIGHTS)
        found = DVAETokenizer(model, image_px)
        if found.fingerprint != mark:
            raise DataError(
                f"{folder}: weights or note were changed after training: their hash is not the one in {NOTE}"
            )
        return found

    def _measure(
        self, tokenizer: DVAETokenizer, streams: Sequence[Stream], ranks: dist.Ranks, job: Job
    ) -> Mapping[str, Any]:
        """Use of the codes and error of the pictures, over central views; each rank sees its share."""
        counts, squares, values = torch.zeros(self.codes), 0.0, 0
        for views in _central(streams, ranks):
            codes = tokenizer.encode(views)
            counts += torch.bincount(codes.flatten(), minlength=self.codes).cpu()
            error = tokenizer.reconstruct(codes).cpu().float() - views.float()
            squares, values = squares + float(error.square().sum(dtype=torch.float64)), values + error.numel()
        *shares, squares, total = ranks.sum([*counts.tolist(), squares, float(values)])
        counts = torch.tensor(shares)
        used = int((counts > 0).sum())
        if ranks.main:
            self._draw(tokenizer, streams, counts, used, job)
        return {
            "codebook_used": used,
            "codebook_size": self.codes,
            "codebook_perplexity": perplexity(counts),
            "reconstruction_psnr": 10 * math.log10(255**2 / max(squares / max(1.0, total), 1e-12)),
        }

    def _draw(
        self, tokenizer: DVAETokenizer, streams: Sequence[Stream], counts: Tensor, used: int, job: Job
    ) -> None:
        """A histogram of the codes' use, and pictures beside what their codes alone say."""
        job.log.figure(
            "codebook",
            figures.histogram(counts.numpy(), "How often each code is used", "codes"),
            "Codebook",
            f"{used} of {self.codes} codes stand for at least one place of the training pictures. "
            "The flatter the curve, the better the codebook is used.",
        )
        views = next(_central(streams[:1], limit=2 * SHOWN), None)
        if views is None:
            return
        made = tokenizer.reconstruct(tokenizer.encode(views)).cpu()
        rows = [
            figures.Row([figures.Tile(picture.permute(1, 2, 0).numpy()) for picture in part], title)
            for start in range(0, len(views), SHOWN)
            for title, part in (
                ("pictures", views[start : start + SHOWN]),
                ("drawn from their codes", made[start : start + SHOWN]),
            )
        ]
        job.log.figure(
            "reconstructions",
            figures.gallery(rows, tile_px=96),
            "Pictures and what their codes say of them",
            f"Central views of training pictures, and what the decoder draws from their {tokenizer.grid} x "
            f"{tokenizer.grid} codes. What cannot be seen below, a model that predicts codes does not learn.",
        )


def _central(
    streams: Sequence[Stream], ranks: dist.Ranks | None = None, limit: int = MEASURED
) -> Iterator[Tensor]:
    """Central views (n, 3, H, W) uint8 of pictures that can be read, a rank's share, in batches.

    At most ``limit`` of each source, evenly spread over it.
    """
    first, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    rows: list[Any] = []
    for stream in streams:
        tools = replace(stream.tools, train=False)
        count = len(stream.examples)
        for index in range(0, count, -(-count // limit))[first::world]:
            try:
                found: Any = stream.task.prepare(stream.examples[index], np.random.default_rng(0), tools)
            except DataError:  # named while training
                continue
            rows.append(found[0])
            if len(rows) == BATCH:
                yield torch.from_numpy(np.stack(rows))
                rows = []
    if rows:
        yield torch.from_numpy(np.stack(rows))
