"""VQ-KD as a plugin: training against a teacher, and the frozen tokenizer that comes out of it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from beitctl.api import Example, Job, Plugin, Source, TeacherField, Tools
from beitctl.checkpoints.native import fit
from beitctl.config import ModelConfig, TrainConfig
from beitctl.data.images import Pictures, centre_crop, random_crop
from beitctl.data.loader import Place, Stream, drawn
from beitctl.data.order import share
from beitctl.engine import dist
from beitctl.engine.learner import HALF, Sums, normalise
from beitctl.engine.loop import Session, train
from beitctl.engine.shard import full_weights, sharded
from beitctl.errors import DataError, UserError
from beitctl.model.init import initial
from beitctl.model.vqkd import Codebook, VQKDModel, perplexity
from beitctl.report import figures
from beitctl_plugins.tokenizers.vqkd_tokenizer import VQKDTokenizer, official

WEIGHTS = "tokenizer.safetensors"
NOTE = "tokenizer.json"
CACHE_MIB = 1024


@dataclass(frozen=True)
class Views:
    """A batch of one crop at two sizes: for the tokenizer and for its teacher."""

    small: Tensor
    """(n, 3, h, h) uint8."""
    large: Tensor
    """(n, 3, t, t) uint8."""
    samples: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]

    def to(self, device: torch.device) -> "Views":
        return replace(self, small=self.small.to(device), large=self.large.to(device))


@dataclass(frozen=True)
class _TwoViews:
    """Prepares one crop at two sizes; speaks the protocol of a task to the loader."""

    scale: tuple[float, float]
    sizes: tuple[int, int]
    layout: ClassVar[Literal["image"]] = "image"

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Any:
        if example.image is None:
            raise DataError(f"{example.id}: no picture")
        picture = tools.pictures.open(example.image, example.id)
        width, height = picture.size
        crop = (
            random_crop(width, height, draw, scale=self.scale) if tools.train else centre_crop(width, height)
        )
        return tuple(tools.pictures.crop(picture, crop, px) for px in self.sizes)


class _ViewSteps(Dataset[list[Views]]):
    """Two views of the pictures of any step."""

    def __init__(self, streams: Sequence[Stream], seed: int, place: Place) -> None:
        self.streams, self.seed, self.place = streams, seed, place

    def __getitem__(self, step: int) -> list[Views]:
        rows, ids, problems = [], [], []
        for stream in self.streams:
            for offset in share(stream.samples, self.place.world, self.place.rank):
                id, item, bad = drawn(stream, step * stream.samples + offset, self.seed)
                rows.append(item)
                ids.append(id)
                problems += bad
        small, large = (torch.from_numpy(np.stack(views)) for views in zip(*rows, strict=True))
        return [Views(small, large, tuple(ids), tuple(problems))]


class VQKDLearner(nn.Module):
    """The tokenizer with its teacher, which is no part of what is trained or saved."""

    weights: Mapping[str, float]

    def __init__(self, model: VQKDModel, commitment: float, centre: bool) -> None:
        super().__init__()
        self.model, self.centre = model, centre
        self.weights = {"similarity": 1.0, "commitment": commitment}
        self._teacher: list[nn.Module] = []  # a list hides it from FSDP and from the checkpoint

    def teach(self, teacher: nn.Module) -> "VQKDLearner":
        """Give the frozen teacher."""
        self._teacher = [teacher]
        return self

    def forward(self, batch: Views) -> Sums:
        """1 - cosine to the teacher's features, and the commitment to the codes; sums over patches."""
        with torch.no_grad():
            target = self._teacher[0](batch.large.float() / 255).float()
            target = self.model.centred(target) if self.centre else target
        features, commitment, _ = self.model(normalise(batch.small, HALF))
        cosine = F.cosine_similarity(features, target, dim=-1)
        zero = torch.zeros((), device=cosine.device)
        return {
            "similarity": ((1 - cosine).sum(), cosine.detach().sum()),
            "commitment": (commitment.mean(-1).sum(), zero),
        }

    def counts(self, batch: Views) -> dict[str, float]:
        patches = len(batch.small) * self.model.encoder.config.patches
        return {"similarity": float(patches), "commitment": float(patches)}


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


class VQKD(Plugin):
    """A vector-quantised tokenizer that learns to reconstruct a teacher's features (BEiT v2)."""

    teacher: TeacherField
    """The frozen network to learn from."""
    train_config: TrainConfig = Field(alias="train")
    """The training loop."""
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
    revive_after: int = Field(default=100, ge=0)
    """Steps without use after which a code is put on a random vector; 0 never (the released code)."""
    start_after: int = Field(default=0, ge=0)
    """Steps of training without the codebook, so that its k-means start meets vectors that mean something
    (the released code: 0). Short trainings need it: codes that start on untrained vectors drift together."""
    centre: bool = False
    """Subtract the mean feature of the first batch from the teacher's features (released code: no).
    Convolutional teachers have a large common part that says nothing and is reconstructed without looking."""
    samples: int = Field(default=512, ge=1)
    """Pictures per step, over all ranks and sources."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the picture that a crop shows."""

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
        seed = self.train_config.seed
        streams = self._streams(sources)
        learner: VQKDLearner = sharded(
            lambda: VQKDLearner(self._model(teacher.width), self.commitment, self.centre),
            ranks,
            self.train_config.precision,
            lambda name, shape: initial(name, shape, encoder, seed),
        ).teach(teacher)
        self._loop(learner, streams, ranks, job)
        weights = full_weights(learner)
        if ranks.main:
            self._write(weights, teacher.width, job.folder / "tokenizer")
        ranks.barrier()
        tokenizer = self.load(job.folder / "tokenizer")
        return self._measure(tokenizer, streams, teacher, job)

    def _loop(self, learner: VQKDLearner, streams: Sequence[Stream], ranks: dist.Ranks, job: Job) -> None:
        config = self.train_config
        data = _ViewSteps(streams, config.seed, Place(ranks.rank, ranks.world))
        session = Session(
            ranks, job.folder, "vqkd", job.resume, self.shape.layers,
            examples=sum(len(stream.examples) for stream in streams), saved=job.log.checkpoint,
            warn=lambda text: job.log.warning("W301", text, "look at the file, or remove it"),
        )  # fmt: skip
        seen = learner.model.codebook.usage.clone()
        with closing(train(learner, data, config, session)) as steps:
            for step in steps:
                if step.number % config.log_every_steps == 0 or step.number == config.steps:
                    usage = learner.model.codebook.usage
                    window = usage - seen
                    seen = usage.clone()
                    metrics = step.metrics()
                    metrics.pop("commitment/accuracy", None)
                    metrics["similarity/cosine"] = metrics.pop("similarity/accuracy")
                    metrics |= {
                        "codebook_used": float((window > 0).sum()),
                        "codebook_perplexity": perplexity(window),
                    }
                    job.log.step(step.number, config.steps, metrics)

    def _streams(self, sources: Sequence[Source]) -> list[Stream]:
        sizes = (self.shape.image_px, _teacher_px(self.teacher, self.shape.image_px))
        tools = Tools(self.shape.encoder(), pictures=Pictures(cache_mib=CACHE_MIB))
        opened = [source.open() for source in sources]
        total = sum(map(len, opened))
        counts = [max(1, round(self.samples * len(examples) / total)) for examples in opened]
        task: Any = _TwoViews(self.crop_scale, sizes)
        return [
            Stream(f"pictures{index}", task, examples, count, tools)
            for index, (examples, count) in enumerate(zip(opened, counts, strict=True))
        ]

    def _model(self, features: int) -> VQKDModel:
        codebook = Codebook(
            self.codes, self.code_width, decay=self.decay, revive_after=self.revive_after,
            start_after=self.start_after, seed=self.train_config.seed,
        )  # fmt: skip
        return VQKDModel(self.shape.encoder(), self.shape.decoder_layers, features, codebook)

    def _write(self, weights: Mapping[str, Tensor], features: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name.removeprefix("model."): value.contiguous() for name, value in weights.items()}
        save_file(tensors, folder / WEIGHTS)
        note = {
            "kind": "vqkd",
            "shape": asdict(self.shape),
            "codes": self.codes,
            "code_width": self.code_width,
            "features": features,
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

    def _measure(
        self, tokenizer: VQKDTokenizer, streams: Sequence[Stream], teacher: nn.Module, job: Job
    ) -> Mapping[str, Any]:
        """Usage of the codebook over the central view of every picture, and the likeness to the teacher."""
        counts = torch.zeros(self.codes)
        cosines: list[Tensor] = []
        device = next(teacher.buffers()).device
        tokenizer.model.to(device)
        for views in _fixed(streams):
            counts += torch.bincount(
                tokenizer.encode(views.small.to(device)).flatten(), minlength=self.codes
            ).cpu()
            if len(cosines) < 8:
                target = teacher(views.large.to(device).float() / 255)
                cosines.append(tokenizer.similarity(views.small.to(device), target).mean(1).cpu())
        used = int((counts > 0).sum())
        job.log.figure(
            "codebook",
            figures.histogram(counts.numpy(), "How often each code is used", "codes"),
            "Codebook",
            f"{used} of {self.codes} codes stand for at least one patch of the training pictures. "
            "The flatter the curve, the better the codebook is used.",
        )
        return {
            "codebook_used": used,
            "codebook_size": self.codes,
            "codebook_perplexity": perplexity(counts),
            "teacher_cosine": float(torch.cat(cosines).mean()),
        }


def _teacher_px(teacher: Any, image_px: int) -> int:
    return int(getattr(teacher, "input_px", image_px))


def _fixed(streams: Sequence[Stream], size: int = 64) -> Any:
    """Central views of all pictures, in batches."""
    for stream in streams:
        tools = replace(stream.tools, train=False)
        rows: list[Any] = []
        for index in range(len(stream.examples)):
            try:
                rows.append(stream.task.prepare(stream.examples[index], np.random.default_rng(0), tools))
            except DataError:
                continue
            if len(rows) == size:
                yield _views(rows)
                rows = []
        if rows:
            yield _views(rows)


def _views(rows: Sequence[Any]) -> Views:
    small, large = (torch.from_numpy(np.stack(views)) for views in zip(*rows, strict=True))
    return Views(small, large, (), ())
