"""Semantic segmentation: the class of every pixel, by BEiT's pyramid and UPerNet on the vision branch.

Source: arXiv:2106.08254, section 3.3, and its code, which trains with mmsegmentation 0.11.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from beitctl.api import Example, Examples, Item, Log, Measured, Plugin, Term, Tools
from beitctl.config import ModelConfig
from beitctl.data.batch import Group
from beitctl.engine.learner import PIXELS, MultiwayLearner, normalise
from beitctl.errors import DataError, UserError
from beitctl.model.dense import AUXILIARY, Segmenter, default_taps, feature_maps, resized
from beitctl.model.flops import Flops
from beitctl.model.multiway import Encoded
from beitctl.model.plan import BatchPlan
from beitctl_plugins.tasks import segment_scores as scores
from beitctl_plugins.tasks.classes import names_in
from beitctl_plugins.tasks.dense_views import IGNORED, Numbers, Training, bilinear, training_view
from beitctl_plugins.tasks.sliding import Windows, probabilities

HEAD = "segmenter"
BACKGROUND = "background"
LONGEST = 16
"""Times the shorter side: pictures that are longer take too many windows."""


class Segmentation(Plugin):
    """Tell the class of every pixel of a picture (ADE20K).

    Metrics are mIoU, the mean accuracy of the classes and the share of right pixels, over the pixels that
    have a class, at the size of the original picture. ``predictions.jsonl`` holds every predicted
    segmentation as a PNG in base64, whose grey values mean what those of the source mean.
    """

    layout: ClassVar[Literal["image"]] = "image"

    class_names: str = ""
    """A text file with the name of one class a line: the first is that of the grey value 1. Empty: the names
    that the source has."""
    background: bool = False
    """Whether grey value 0 is a class of its own, "background" (pasted objects, Pascal VOC). Without, its
    pixels count nowhere (ADE20K)."""
    ignored: int = Field(default=255, ge=-1)
    """Another grey value whose pixels count nowhere, unless it is that of a class; -1: none."""
    taps: list[int] = Field(default=[])
    """Numbers of blocks after which the four maps are taken. Empty: after 4, 6, 8, 12 of 12 and 8, 12, 16, 24
    of 24 blocks, else after a third, a half, two thirds and all."""
    pixels: Literal["", "half", "imagenet", "clip"] = ""
    """What pictures are normalised with (published for ADE20K: "imagenet"); empty: as pretrained."""
    auxiliary_weight: float = Field(default=0.4, ge=0)
    """Weight of the loss of the auxiliary head; 0: there is none."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a channel of the last features of a head is dropped."""
    resize: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest size of a training picture: its shorter side over that of the model."""
    most_of_one: float = Field(default=0.75, gt=0, le=1)
    """Training crops in which one class has a larger share are drawn again, ten times at most."""
    distort: bool = True
    """Whether brightness, contrast, saturation and hue of training pictures are changed."""
    window_stride: int = Field(default=0, ge=0)
    """Pixels from one window to the next in evaluation; 0: two thirds of a window (341 of 512, 426 of
    640)."""
    test_short_px: int = Field(default=0, ge=0)
    """Shorter side of a picture in evaluation, at least that of the model; 0: that."""
    scales: list[float] = Field(default=[1.0], min_length=1)
    """Sizes by which answers are averaged in evaluation; published: 0.5, 0.75, 1, 1.25, 1.5, 1.75."""
    flip_test: bool = False
    """Whether mirrored pictures are asked too in evaluation (published with several scales)."""

    @field_validator("resize")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"smallest and largest size, 0 < smallest <= largest, not {value}")
        return value

    @field_validator("scales")
    @classmethod
    def _sizes(cls, value: list[float]) -> list[float]:
        if not all(0 < scale <= 8 for scale in value):
            raise ValueError(f"sizes above 0 and up to 8, not {value}")
        return value

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task on pasted objects, whose background is a class, with settings that do not go by size."""
        left_out = ("class_names", "taps", "window_stride", "test_short_px", "scales", "flip_test")
        kept = {name: value for name, value in table.items() if name not in left_out}
        return {**kept, "background": True}

    @classmethod
    def smoke_data(cls, split: str) -> dict[str, Any]:
        """Embedded pictures with things pasted over them."""
        return {"kind": "embedded", "content": "objects", "split": split}

    def vocabulary(self, examples: Examples) -> tuple[str, ...]:
        """Names of the classes: those of the file, or those that the source has; background first.

        Raises:
            DataError: the file cannot be used.
            UserError: there are no names.
        """
        names = names_in(self.class_names, "class_names") if self.class_names else ()
        names = names or tuple(getattr(examples, "segments", ()) or ())
        if not names:
            raise UserError(
                "segmentation needs the names of its classes, which this source does not have: set "
                "class_names to a text file with one name a line, the first for the grey value 1"
            )
        return (BACKGROUND, *names) if self.background else names

    def fitted(self, config: ModelConfig) -> ModelConfig:
        """The model that is fine-tuned: the maps are taken before any final norm."""
        return replace(config, final_norm=False, pixels=self.pixels or config.pixels)

    def depths(self, config: ModelConfig) -> tuple[int, ...]:
        """Numbers of blocks after which the four maps are taken.

        Raises:
            UserError: ``taps`` are not four growing numbers of blocks of this model.
        """
        taps = tuple(self.taps) or default_taps(config.layers)
        if len(taps) != 4 or list(taps) != sorted(taps) or not 1 <= taps[0] <= taps[3] <= config.layers:
            raise UserError(
                f"taps ({self.taps}) must be four growing numbers from 1 to {config.layers}, the blocks"
            )
        return taps

    def terms(self) -> Mapping[str, Term]:
        found = {"": Term("sample")}
        return found | ({"auxiliary": Term("sample", self.auxiliary_weight)} if self.auxiliary_weight else {})

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        if len(tools.labels) < 2:
            raise UserError(
                f"segmentation needs two classes or more, found {len(tools.labels)}: name them in class_names"
                + ("" if self.background else ", or set background = true if the rest is to be a class")
            )
        if min(tools.model.grid) < 2:
            raise UserError(
                f"segmentation needs at least 2 x 2 patches, image_px {tools.model.image_px} has "
                f"{tools.model.grid[0]} x {tools.model.grid[1]}"
            )
        self.depths(tools.model)
        return {HEAD: Segmenter(tools.model, len(tools.labels), auxiliary=self.auxiliary_weight > 0)}

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        """A view, and in ``extra`` the classes of its pixels.

        ``classes`` (H, W) int16 is -1 where nothing counts. In training there is ``kept`` (channels,)
        float32, by which dropout scales the last features; in evaluation ``picture`` (H, W, 3) uint8, the
        whole picture, to which ``classes`` belong.
        """
        numbers = self._numbers(tools)
        classes = scores.classes_of(example, numbers, tools)
        assert example.image is not None
        pixels = tools.pictures.open(example.image, example.id).pixels
        side = tools.model.side_px
        if not tools.train:
            if max(classes.shape) > LONGEST * min(classes.shape):
                raise DataError(
                    f"{example.id}: {classes.shape[1]} x {classes.shape[0]} pixels; a side may be {LONGEST} "
                    "times as long as the other: cut the picture into pieces"
                )
            view = bilinear(pixels, side, side).transpose(2, 0, 1)
            return Item(image=view, extra={"classes": classes, "picture": np.array(pixels)})
        settings = Training(self.resize, self.most_of_one, self.distort, tools.model.pixels)
        view, seen = training_view(pixels, classes, side, draw, settings)
        kept = draw.random(tools.model.width + AUXILIARY) >= self.dropout
        scaled = (kept / (1 - self.dropout)).astype(np.float32)
        return Item(image=view.transpose(2, 0, 1), extra={"classes": seen, "kept": scaled})

    def _numbers(self, tools: Tools) -> Numbers:
        """What grey values mean."""
        values = len(tools.labels) + (0 if self.background else 1)
        return Numbers(len(tools.labels), self.background, self.ignored if self.ignored >= values else -1)

    def output(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> Tensor:
        """(n, V, 4 h, 4 w) logits of pictures of h x w patches, as those of transformers' class."""
        maps = feature_maps(encoded, group.picture_rows, self.depths(encoded.model.config))
        logits: Tensor = heads[HEAD](maps)
        return logits.float()

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Cross-entropy of the pixels of a picture: the sum over those with a class by the number of all.

        Right is the share of a picture's pixels with a class whose class is found.
        """
        config, head = encoded.model.config, cast("Segmenter", heads[HEAD])
        depths = self.depths(config)
        maps = feature_maps(encoded, group.picture_rows, depths)
        kept = None
        if encoded.model.training and self.dropout and group.extra:
            kept = torch.stack([one["kept"] for one in group.extra])
        logits, others = head.both(maps, kept)
        known = [one["classes"] for one in group.extra]
        classes = torch.stack(known).long() if known else logits.new_zeros((0, *config.size)).long()
        found = {"": _entropy(logits, classes)}
        if others is not None:
            found["auxiliary"] = _entropy(others, classes)
        if depths[-1] < config.layers:  # blocks that nobody reads take part too, as FSDP needs
            total, right = found[""]
            found[""] = (total + 0 * encoded.last[group.picture_rows].float().sum(), right)
        return found

    def operations(
        self, config: ModelConfig, plan: BatchPlan, group: Group, heads: Mapping[str, nn.Module]
    ) -> Flops:
        """Operations of the head's convolutions."""
        head = cast("Segmenter", heads[HEAD])
        return Flops(heads=head.operations(len(group.picture_rows), config.grid))

    def infer(
        self, learner: MultiwayLearner, chunk: Sequence[tuple[Example, Item]], tools: Tools
    ) -> list[dict[str, Any]]:
        """Of every picture its id, (3, V) counts of pixels and the predicted classes as PNG."""
        config, numbers = learner.model.config, self._numbers(tools)
        windows = Windows(
            config.side_px, self.window_stride or max(1, config.side_px * 2 // 3),
            self.test_short_px or config.side_px, self.scales, self.flip_test,
        )  # fmt: skip

        def answer(pixels: Tensor) -> Tensor:
            packed, _ = learner.model.pack(normalise(pixels, PIXELS[config.pixels]))
            depths = self.depths(config)
            encoded = learner.model.encoded(packed, sorted(set(depths)))
            rows = torch.arange(len(pixels) * config.picture_tokens, device=pixels.device)
            maps = feature_maps(encoded, rows.view(len(pixels), -1), depths)
            return resized(learner.heads[HEAD](maps).float(), config.size)

        found = []
        for example, item in chunk:
            share = probabilities(answer, item.extra["picture"], windows, learner.model.device)
            said = share.argmax(0).to(torch.int16).cpu().numpy()
            counts = scores.counted(said, item.extra["classes"], numbers.classes)
            found.append({"id": example.id, "counts": counts, "png": scores.as_png(said, numbers)})
        return found

    def score(
        self, outputs: Sequence[Any], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """The mIoU and accuracies, and those of always naming the most frequent class of training pixels.

        The most frequent class is that of 200 training pictures, evenly spread.
        """
        found = [one for batch in outputs for one in batch]
        each = np.stack([one["counts"] for one in found])
        frequent = scores.most_frequent(train, self._numbers(tools), tools)
        metrics = scores.metrics_of(each.sum(0), frequent)
        metrics["examples"] = float(len(found))
        rows = [scores.row_of(one, tools.labels) for one in found]
        return Measured(metrics, {"miou": (len(found), scores.resampled_miou(each))}, rows)

    def draw(self, outputs: Sequence[Any], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """A table of the classes, and pictures beside their classes."""
        found = [one for batch in outputs for one in batch]
        scores.draw_classes(np.stack([one["counts"] for one in found]).sum(0), tools.labels, log)
        scores.draw_pictures(found, examples, self._numbers(tools), tools, log)


def _entropy(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over pictures of the mean loss of a pixel, and of the share of right ones; 0-d both.

    Args:
        logits: (n, V, any, any), brought to the size of the classes in fp32.
        classes: (n, H, W), -1 where nothing counts: such pixels have loss 0 and no part in the share.
    """
    large = resized(logits.float(), classes.shape[1:])
    pixels = classes.shape[1] * classes.shape[2]
    total = F.cross_entropy(large, classes, reduction="sum", ignore_index=IGNORED) / pixels
    right = (large.detach().argmax(1) == classes).sum((1, 2))
    known = (classes != IGNORED).sum((1, 2)).clamp(min=1)
    return total, (right / known).sum()
