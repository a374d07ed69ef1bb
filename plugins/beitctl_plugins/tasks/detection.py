"""Detection and instance segmentation: boxes, classes and masks of the things in a picture.

Source: ViTDet (arXiv:2203.16527), which BEiT-3 follows for COCO (arXiv:2208.10442, section 3.3); its window
attention, cascade and soft NMS are not here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from beitctl.api import Example, Examples, Item, Log, Measured, Object, Plugin, Term, Tools
from beitctl.config import ModelConfig
from beitctl.data.batch import Group
from beitctl.engine.learner import PIXELS, MultiwayLearner, normalise
from beitctl.errors import ChangedError, DataError, UserError
from beitctl.model.flops import Flops
from beitctl.model.multiway import Encoded
from beitctl.model.plan import BatchPlan
from beitctl_plugins.tasks.classes import listed, names_in
from beitctl_plugins.tasks.detecting import intervals, measure
from beitctl_plugins.tasks.detecting.masks import encoded as run_lengths
from beitctl_plugins.tasks.detecting.network import Detector, Shape
from beitctl_plugins.tasks.detecting.views import check_objects, fitted_view, training_view

HEAD = "detector"
AT_ONCE = 4
"""Pictures in one forward pass of evaluation."""


class Detection(Plugin):
    """Find the things in a picture: their boxes, classes and masks (COCO).

    A pyramid on the last patches with Mask R-CNN, as in ViTDet. Metrics are COCO's mean average precision of
    boxes and masks, first ``box_map``; ``trivial_box_map50`` is that of one fixed box in every picture.
    ``detections.json`` holds everything that was found in the form of COCO's results, ``predictions.jsonl``
    the 20 surest detections of every picture.
    """

    layout: ClassVar[Literal["image"]] = "image"

    class_names: str = ""
    """A text file with the name of one class a line. Empty: the names that the source has, else those of all
    objects, sorted."""
    masks: bool = True
    """Whether masks are learnt too; every object needs one then."""
    scale_jitter: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest size of a training picture: its longer side over that of the model."""
    channels: int = Field(default=256, ge=1)
    """Channels of the pyramid and of the convolutions behind it."""
    hidden: int = Field(default=1024, ge=1)
    """Width of the linear layers of the box head."""
    convolutions: int = Field(default=4, ge=0)
    """Convolutions of the box head, before one linear layer; 0: two linear layers, much faster."""
    regions: int = Field(default=512, ge=4)
    """Regions of every picture that boxes and classes learn from."""
    anchor_scale: float = Field(default=8.0, gt=0)
    """Side of an anchor over the stride of its map: 8 has sides of 32 to 512 pixels with patches of 16."""
    score_threshold: float = Field(default=0.05, ge=0, lt=1)
    """Detections below it are left out."""
    nms_threshold: float = Field(default=0.5, gt=0, le=1)
    """Overlap (IoU) from which the less sure of two detections of a class is left out."""
    detections: int = Field(default=100, ge=1)
    """Most detections in a picture; COCO counts the surest 100."""

    @field_validator("scale_jitter")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"smallest and largest size, 0 < smallest <= largest, not {value}")
        return value

    @classmethod
    def smoke(cls, table: Mapping[str, Any]) -> dict[str, Any]:
        """The task with small heads, and no jitter that makes small pictures smaller."""
        kept = {name: value for name, value in table.items() if name != "class_names"}
        small = {"channels": 16, "hidden": 32, "convolutions": 0, "regions": 32}
        return {**kept, **small, "scale_jitter": [0.8, 1.25]}

    @classmethod
    def smoke_data(cls, split: str) -> dict[str, Any]:
        """Embedded pictures with things pasted over them."""
        return {"kind": "embedded", "content": "objects", "split": split}

    def vocabulary(self, examples: Examples) -> tuple[str, ...]:
        """Names of the classes: of the file, else those that the source has, else of all objects, sorted.

        Raises:
            DataError: the file cannot be used, or does not have the class of an object.
        """
        found = sorted({thing.label for things in _objects(examples) for thing in things})
        given = names_in(self.class_names, "class_names") if self.class_names else ()
        given = given or tuple(getattr(examples, "classes", ()) or ()) or tuple(found)
        strange = [name for name in found if name not in given]
        if strange:
            where = "class_names" if self.class_names else "the source"
            raise DataError(
                f"{where} does not name {len(strange):,} of the classes of objects: {listed(strange)}; it "
                f"names {listed(given)}"
            )
        return given

    def fitted(self, config: ModelConfig) -> ModelConfig:
        """The model that is fine-tuned: patches are read before any final norm."""
        return replace(config, final_norm=False)

    def terms(self) -> Mapping[str, Term]:
        names = ["", "box", *(["mask"] if self.masks else []), "objectness", "rpn_box"]
        return {name: Term("sample") for name in names}

    def heads(self, tools: Tools) -> dict[str, nn.Module]:
        if not tools.labels:
            raise UserError("detection needs objects to learn from: this source has none (Example.objects)")
        if min(tools.model.grid) < 2:
            raise UserError(
                f"detection needs at least 2 x 2 patches, image_px {tools.model.image_px} has "
                f"{tools.model.grid[0]} x {tools.model.grid[1]}"
            )
        shared = {name: value for name, value in vars(self).items() if name in Shape.__dataclass_fields__}
        detector = Detector(tools.model.width, tools.model.patch_px, len(tools.labels), Shape(**shared))
        return {HEAD: detector}

    def prepare(self, example: Example, draw: np.random.Generator, tools: Tools) -> Item:
        """A view, and in ``extra`` what is in it.

        In training ``boxes`` (k, 4) float32 left, top, right, bottom, ``classes`` (k,) int64 from 1, and
        ``masks`` (k, S, S / 8) uint8, eight pixels a byte; in evaluation ``size`` and ``seen``, height and
        width of the picture and of its part of the view.
        """
        if example.image is None:
            raise DataError(f"{example.id}: no picture")
        pixels = tools.pictures.open(example.image, example.id).pixels
        tall, wide = pixels.shape[:2]
        check_objects(example, (wide, tall), tools, self.masks and not tools.train)
        if not tools.train:
            view, seen = fitted_view(pixels, tools.model.side_px, tools.model.pixels)
            extra: dict[str, NDArray[Any]] = {"size": np.array([tall, wide]), "seen": np.array(seen)}
            return Item(image=np.ascontiguousarray(view.transpose(2, 0, 1)), extra=extra)
        view, found = training_view(example, pixels, draw, tools, self.scale_jitter, self.masks)
        return Item(
            image=np.ascontiguousarray(view.transpose(2, 0, 1)),
            chance=(float(draw.random()),),
            extra={
                "boxes": found.boxes,
                "classes": found.classes,
                "masks": np.packbits(found.masks, axis=-1),
            },
        )

    def output(
        self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]
    ) -> list[dict[str, Tensor]]:
        """What is found in every picture, in pixels of the model, as of ``Detector``."""
        found: list[dict[str, Tensor]] = heads[HEAD](_features(encoded, group.picture_rows))
        return found

    def loss(self, encoded: Encoded, group: Group, heads: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Mask R-CNN's losses, each a mean over what was sampled of a picture; sums over pictures.

        Right is the share of a picture's regions whose class is found.
        """
        side = encoded.model.config.side_px
        targets = [
            {"boxes": one["boxes"], "labels": one["classes"], "masks": _unpacked(one["masks"], side)}
            for one in group.extra
        ]
        chance = group.chance.flatten().tolist()
        found = heads[HEAD](_features(encoded, group.picture_rows), targets, chance)
        nothing = torch.zeros_like(found["right"])
        names = {name: name or "classifier" for name in self.terms()}
        return {name: (found[loss], nothing if name else found["right"]) for name, loss in names.items()}

    def operations(
        self, config: ModelConfig, plan: BatchPlan, group: Group, heads: Mapping[str, nn.Module]
    ) -> Flops:
        """Operations of the head with as many regions as there can be."""
        head = cast("Detector", heads[HEAD])
        return Flops(heads=head.operations(len(group.picture_rows), config.grid))

    def infer(
        self, learner: MultiwayLearner, chunk: Sequence[tuple[Example, Item]], tools: Tools
    ) -> list[dict[str, Any]]:
        """Of every picture what was found, in its own pixels, as ``detecting.measure`` says."""
        found = []
        for first in range(0, len(chunk), AT_ONCE):
            some = chunk[first : first + AT_ONCE]
            views = torch.from_numpy(np.stack([item.image for _, item in some if item.image is not None]))
            sizes = [(int(item.extra["seen"][0]), int(item.extra["seen"][1])) for _, item in some]
            said = _answers(learner, views, sizes)
            found += [
                _original(one, example.id, item) for one, (example, item) in zip(said, some, strict=True)
            ]
        return found

    def score(
        self, outputs: Sequence[Any], examples: Sequence[Example], tools: Tools, train: Examples
    ) -> Measured:
        """COCO's mean average precisions, and that of the mean training box with the most frequent class.

        The baseline is read from 200 training pictures, evenly spread.

        Raises:
            DataError: there is no object to find.
            SetupError: faster-coco-eval is not installed.
        """
        found, truth, results = self._compared(outputs, examples, tools)
        objects = sum(not one["iscrowd"] for one in truth["annotations"])
        if not objects:
            raise DataError(
                f"the {len(found)} pictures to measure on have no object: there is nothing to find"
            )
        metrics = measure.metrics_of(truth, results, self.masks)
        fixed = measure.trivial_results(truth, *measure.trivial(train, tools))
        metrics["trivial_box_map50"] = measure.mean_of(measure.precision(truth, fixed, "bbox")[0, ..., 0])
        metrics |= {"examples": float(len(found)), "objects": float(objects)}
        rows = [
            measure.row_of(one, example, tools.labels) for one, example in zip(found, examples, strict=True)
        ]
        classes = intervals.matched(truth, results, "bbox")
        each = {
            name: (len(found), intervals.resampled(classes, thresholds))
            for name, thresholds in (("box_map", len(intervals.THRESHOLDS)), ("box_map50", 1))
        }
        return Measured(metrics, each, rows, {"detections.json": results})

    def draw(self, outputs: Sequence[Any], examples: Sequence[Example], tools: Tools, log: Log) -> None:
        """A table of the classes, and pictures with their true objects and those that were found."""
        found, truth, results = self._compared(outputs, examples, tools)
        measure.draw_classes(truth, results, self.masks, log)
        measure.draw_pictures(found, examples, tools, log)

    def _compared(
        self, outputs: Sequence[Any], examples: Sequence[Example], tools: Tools
    ) -> tuple[list[Any], dict[str, Any], list[dict[str, Any]]]:
        """What was found picture by picture; the truth and the results as COCO writes them."""
        found = [one for batch in outputs for one in batch]
        truth = measure.truth_of(found, examples, tools.labels, self.masks)
        return found, truth, measure.results_of(found, tools.labels)


def _objects(examples: Examples) -> Iterator[Sequence[Object]]:
    """Objects of every example that can be used, without its picture where the source can."""
    there = getattr(examples, "objects", None)
    for index in range(len(examples)):
        try:
            yield there(index) if callable(there) else examples[index].objects
        except ChangedError:
            raise
        except DataError:
            continue


def _features(encoded: Encoded, picture_rows: Tensor) -> Tensor:
    """(n, d, h, w) patches after the last block."""
    config = encoded.model.config
    rows = encoded.last[picture_rows[:, config.prefix :]]
    return rows.transpose(1, 2).reshape(len(rows), config.width, *config.grid)


def _unpacked(packed: Tensor, side: int) -> Tensor:
    """(k, S, S / 8) bytes to (k, S, S) of 0 and 1."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & 1).flatten(-2)[..., :side]


def _answers(learner: MultiwayLearner, views: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Any]:
    """What the detector says of views (n, 3, S, S) of which a part shows something."""
    config = learner.model.config
    pixels = normalise(views.to(learner.model.device), PIXELS[config.pixels])
    packed, _ = learner.model.pack(pixels)
    encoded = learner.model.encoded(packed, [])
    rows = torch.arange(len(views) * config.picture_tokens, device=pixels.device).view(len(views), -1)
    found: list[Any] = learner.heads[HEAD](_features(encoded, rows), sizes=sizes)
    return found


def _original(found: Mapping[str, Tensor], id: str, item: Item) -> dict[str, Any]:
    """What was found in a view, in the pixels of the picture."""
    size = (int(item.extra["size"][0]), int(item.extra["size"][1]))
    (tall, wide), (height, width) = size, item.extra["seen"]
    boxes = found["boxes"].float().cpu() * torch.tensor([wide / width, tall / height] * 2)
    pasted = []
    for box, mask in zip(boxes, found["masks"].float().cpu(), strict=True) if "masks" in found else ():
        one: Tensor = paste_masks_in_image(mask[None], box[None], size)[0, 0]
        pasted.append(run_lengths((one > 0.5).numpy()))
    return {
        "id": id,
        "size": item.extra["size"],
        "boxes": boxes.numpy(),
        "scores": found["scores"].float().cpu().numpy(),
        "classes": found["labels"].cpu().numpy(),
        "masks": pasted,
    }
