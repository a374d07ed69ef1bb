"""ViTDet's pyramid of one map of patches, with torchvision's Mask R-CNN on it.

Letters: n pictures, d width, h x w patches, c channels of the pyramid, S side of a picture in pixels, k
objects or detections of a picture.
Sources: arXiv:2203.16527 (ViTDet, whose window attention is left out: attention is global), arXiv:1703.06870
(Mask R-CNN).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

ENLARGED = (4, 2, 1, 0.5)
"""How much finer than patches the maps are; a fifth is a quarter as fine."""
POOLED = ("0", "1", "2", "3")
"""Names of the maps that regions are pooled from; the last one only proposes."""
RATIOS = (0.5, 1.0, 2.0)
"""Height over width of the anchors."""
BOX_SIDE, MASK_SIDE = 7, 14
"""Sides of a pooled region."""
SAMPLING = 2
"""Points along each side of a bin that is pooled, as in torchvision's Mask R-CNN."""
PATCHES = 2
"""Which map is as fine as the patches."""
CANONICAL = 56
"""Side of a region that is pooled from the map of patches, in strides of the finest: 224 px for patches of 16
(arXiv:1612.03144, equation 1)."""
ANCHORS = 256
"""Anchors of a picture that the proposals learn from."""
FOREGROUND = 0.25
"""Largest share of objects among the regions that boxes learn from."""
SEEDS = 2**24
"""Numbers that a float32 in 0..1 tells apart."""


@dataclass(frozen=True)
class Shape:
    """What a detector is made of, and what it says."""

    channels: int = 256
    """Of the pyramid and of the convolutions behind it."""
    hidden: int = 1024
    """Width of the linear layers of the box head."""
    convolutions: int = 4
    """Of the box head, before one linear layer; 0: two linear layers."""
    regions: int = 512
    """Regions of a picture that boxes learn from."""
    anchor_scale: float = 8.0
    """Side of an anchor over the stride of its map."""
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    detections: int = 100
    """Most detections in a picture."""
    masks: bool = True
    """Whether there is a mask head."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every pixel."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, any, any) to the same shape."""
        last = x.permute(0, 2, 3, 1)
        return F.layer_norm(last, last.shape[-1:], self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Pyramid(nn.Module):
    """One map to five, at 4, 2, 1, 1/2 and 1/4 times its size (arXiv:2203.16527, section 3)."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        starts: list[tuple[list[nn.Module], int]] = [
            (
                [
                    nn.ConvTranspose2d(width, half, 2, stride=2),
                    ChannelNorm(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ],
                quarter,
            ),
            ([nn.ConvTranspose2d(width, half, 2, stride=2)], half),
            ([], width),
            ([nn.MaxPool2d(2, 2)], width),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *start,
                nn.Conv2d(out, channels, 1, bias=False),
                ChannelNorm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                ChannelNorm(channels),
            )
            for start, out in starts
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(n, d, h, w) to maps (n, c, ., .) by name, the finest first."""
        found = {name: level(x) for name, level in zip(POOLED, self.levels, strict=True)}
        return found | {"pool": F.max_pool2d(found[POOLED[-1]], 1, stride=2)}


class _Anchors(AnchorGenerator):  # type: ignore[misc]
    """Anchors at exact strides; torchvision's are whole numbers, 14 / 4 is none."""

    def __init__(self, strides: Sequence[float], scale: float) -> None:
        super().__init__(tuple((stride * scale,) for stride in strides), (RATIOS,) * len(strides))
        self.strides = [(stride, stride) for stride in strides]

    def forward(self, images: Any, maps: Sequence[Tensor]) -> list[Tensor]:
        """Boxes of all anchors of a picture, once for each picture."""
        self.set_cell_anchors(maps[0].dtype, maps[0].device)
        found = torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], self.strides))
        return [found] * len(images.image_sizes)


class _Sampler:
    """A balanced sample of objects and background, as torchvision's; each picture has its own seed."""

    def __init__(self, count: int, share: float) -> None:
        self.count, self.share = count, share
        self.seeds: Iterator[int] = iter(())

    def __call__(self, labels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Which places of every picture are taken as objects (label above 0), and as background (0)."""
        objects, others = [], []
        for found in labels:
            generator = torch.Generator().manual_seed(next(self.seeds))
            above, zero = (torch.where(kind)[0] for kind in (found >= 1, found == 0))
            most = min(len(above), int(self.count * self.share))
            objects.append(_some(above, most, len(found), generator))
            others.append(_some(zero, min(len(zero), self.count - most), len(found), generator))
        return objects, others


def _some(places: Tensor, count: int, of: int, generator: torch.Generator) -> Tensor:
    """(of,) bool, True at some of the places, drawn on the CPU: the same on every device."""
    chosen = torch.randperm(len(places), generator=generator)[:count].to(places.device)
    taken = torch.zeros(of, dtype=torch.bool, device=places.device)
    taken[places[chosen]] = True
    return taken


class _Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's, with losses that are means of every picture, added up: no picture changes another's."""

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], wanted: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of whether there is an object, and of its box; 0-d each."""
        pictures = (objectness.view(len(labels), -1), deltas.view(len(labels), -1, 4), labels, wanted)
        parts = [
            super(_Proposals, self).compute_loss(score, delta, [label], [want])
            for score, delta, label, want in zip(*pictures, strict=True)
        ]
        first, second = zip(*parts, strict=True)
        return torch.stack(first).sum(), torch.stack(second).sum()


class Detector(nn.Module):
    """Patches to boxes, classes and masks. It computes in fp32, whatever it is given."""

    compute_fp32 = True

    def __init__(self, width: int, patch_px: int, classes: int, shape: Shape) -> None:
        super().__init__()
        strides = [patch_px / size for size in ENLARGED]
        c = shape.channels
        self.patch_px, self.classes, self.shape = patch_px, classes, shape
        self.pyramid = Pyramid(width, c)
        self.rpn = _Proposals(
            _Anchors([*strides, 2 * strides[-1]], shape.anchor_scale),
            RPNHead(c, len(RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=ANCHORS,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        linear = [shape.hidden] * (1 if shape.convolutions else 2)
        masks = {
            "mask_roi_pool": _pool(strides, MASK_SIDE),
            "mask_head": MaskRCNNHeads(c, [c] * 4, 1, norm_layer=ChannelNorm),
            "mask_predictor": MaskRCNNPredictor(c, c, classes + 1),
        }
        self.roi = RoIHeads(
            _pool(strides, BOX_SIDE),
            FastRCNNConvFCHead((c, BOX_SIDE, BOX_SIDE), [c] * shape.convolutions, linear, ChannelNorm),
            FastRCNNPredictor(shape.hidden, classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=shape.regions,
            positive_fraction=FOREGROUND,
            bbox_reg_weights=None,
            score_thresh=shape.score_threshold,
            nms_thresh=shape.nms_threshold,
            detections_per_img=shape.detections,
            **(masks if shape.masks else {}),
        )
        self.rpn.fg_bg_sampler = _Sampler(ANCHORS, 0.5)
        self.roi.fg_bg_sampler = _Sampler(shape.regions, FOREGROUND)

    def forward(
        self,
        features: Tensor,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        chance: Sequence[float] = (),
        sizes: Sequence[tuple[int, int]] = (),
    ) -> Any:
        """Losses where there are targets, else detections.

        Args:
            features: (n, d, h, w) patches of square pictures.
            targets: for every picture ``boxes`` (k, 4) left, top, right, bottom in pixels, ``labels`` (k,)
                from 1, and ``masks`` (k, S, S) uint8.
            chance: (n,) numbers in 0..1 from which anchors and regions of every picture are sampled.
            sizes: height and width of the part of every picture that shows something; empty: all of it.

        Returns:
            Sums over pictures of the losses ``objectness``, ``rpn_box``, ``classifier``, ``box``, ``mask``,
            each a mean over what was sampled of a picture, and ``right``, of the share of regions whose class
            is found. Or of every picture ``boxes`` (k, 4), ``labels`` (k,), ``scores`` (k,), best first, and
            ``masks`` (k, 1, 28, 28), probabilities within the boxes.
        """
        height, width = (side * self.patch_px for side in features.shape[-2:])
        images = ImageList(features, list(sizes) or [(height, width)] * len(features))
        self.rpn.train(targets is not None)
        self.roi.train(targets is not None)
        if targets is not None and not len(features):
            return self._nothing(features)
        levels = self.pyramid(features.float())
        if targets is not None:
            return self._losses(levels, images, [dict(one) for one in targets], chance)
        if not len(features):
            return []
        proposals, _ = self.rpn(images, levels)
        return self.roi(levels, proposals, images.image_sizes)[0]

    def _nothing(self, features: Tensor) -> dict[str, Tensor]:
        """Losses of no pictures, of which every parameter has a gradient."""
        zero = self._touched() + 0 * features.float().sum()
        names = ["objectness", "rpn_box", "classifier", "box", *(["mask"] if self.shape.masks else [])]
        return dict.fromkeys(names, zero) | {"right": zero.detach()}

    def _touched(self) -> Tensor:
        """0, on which every parameter has a part: without a gradient for each, FSDP2 aborts."""
        return 0 * torch.stack([parameter.sum() for parameter in self.parameters()]).sum()

    def _losses(
        self,
        levels: dict[str, Tensor],
        images: Any,
        targets: list[dict[str, Tensor]],
        chance: Sequence[float],
    ) -> dict[str, Tensor]:
        seeds = [2 * int(number * SEEDS) for number in chance]
        self.rpn.fg_bg_sampler.seeds = iter(seeds)
        self.roi.fg_bg_sampler.seeds = iter([seed + 1 for seed in seeds])
        proposals, first = self.rpn(images, levels, targets)
        proposals, matched, labels, wanted = self.roi.select_training_samples(proposals, targets)
        pooled = self.roi.box_roi_pool(levels, proposals, images.image_sizes)
        logits, deltas = self.roi.box_predictor(self.roi.box_head(pooled))
        counts = [len(one) for one in labels]
        parts = [
            (*fastrcnn_loss(score, delta, [label], [want]), (score.argmax(1) == label).float().mean())
            for score, delta, label, want in zip(
                logits.split(counts), deltas.split(counts), labels, wanted, strict=True
            )
            if len(label)
        ]
        classifier, box, right = (torch.stack(part).sum() for part in zip(*parts, strict=True))
        found = {
            "objectness": first["loss_objectness"],
            "rpn_box": first["loss_rpn_box_reg"],
            "classifier": classifier + self._touched(),
            "box": box,
            "right": right.detach(),
        }
        if self.shape.masks:
            found["mask"] = self._mask_loss(levels, images, targets, (proposals, matched, labels))
        return found

    def _mask_loss(
        self, levels: dict[str, Tensor], images: Any, targets: list[dict[str, Tensor]],
        sampled: tuple[list[Tensor], list[Tensor], list[Tensor]],
    ) -> Tensor:  # fmt: skip
        """Of the regions that are objects; 0 for a picture without any."""
        places = [torch.where(label > 0)[0] for label in sampled[2]]
        boxes, matched = (
            [one[place] for one, place in zip(part, places, strict=True)] for part in sampled[:2]
        )
        pooled = self.roi.mask_roi_pool(levels, boxes, images.image_sizes)
        logits = self.roi.mask_predictor(self.roi.mask_head(pooled))
        parts = [
            maskrcnn_loss(one, [box], [target["masks"]], [target["labels"]], [match])
            for one, box, target, match in zip(
                logits.split([len(box) for box in boxes]), boxes, targets, matched, strict=True
            )
        ]
        return torch.stack(parts).sum()

    def operations(self, samples: int, grid: tuple[int, int]) -> int:
        """Floating-point operations of a forward pass with the most regions there can be, as torch counts."""
        area = grid[0] * grid[1]
        areas = [int(size * size * area) for size in (*ENLARGED, 0.25)]
        total = 0
        for level, size in zip(self.pyramid.levels, areas, strict=False):
            total += _multiplied(level, size, area)
        total += sum(_multiplied(self.rpn.head, size, size) for size in areas)
        box = _multiplied(self.roi.box_head, BOX_SIDE**2, BOX_SIDE**2)
        total += self.shape.regions * (box + _multiplied(self.roi.box_predictor, 1, 1))
        if self.shape.masks:
            small, large = MASK_SIDE**2, 4 * MASK_SIDE**2
            mask = _multiplied(self.roi.mask_head, small, small)
            mask += _multiplied(self.roi.mask_predictor, large, small)
            total += int(self.shape.regions * FOREGROUND) * mask
        return 2 * samples * total


def _pool(strides: Sequence[float], side: int) -> Any:
    """Pools regions to side x side, at known strides: torchvision guesses them from the sizes of pictures."""
    pool = MultiScaleRoIAlign(list(POOLED), side, SAMPLING)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = LevelMapper(0, len(POOLED) - 1, round(CANONICAL * strides[0]), PATCHES)
    return pool


def _multiplied(part: nn.Module, area: int, before: int) -> int:
    """Multiplications of a part whose output has some pixels; its first deconvolution reads ``before``."""
    total = 0
    for module in part.modules():
        if isinstance(module, nn.ConvTranspose2d):
            total += module.weight.numel() * before
            before *= 4
        elif isinstance(module, nn.Conv2d):
            total += module.weight.numel() * area
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()
    return total
