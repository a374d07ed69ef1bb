"""The heads of transformers' ``BeitForSemanticSegmentation``; ours have the names of its files.

Since 5.23 the modules in memory have others, as those of the body do. After which blocks the maps are taken
no tensor says. unilm's code trains with those after 4, 6, 8, 12 of 12 blocks (8, 12, 16, 24 of 24), which are
beitctl's too; the class of transformers takes ``out_indices[i] - 1``, with the configurations on the Hub
2, 4, 6, 10: its outputs for the official files differ from those of unilm.

Source: transformers 5.24.0, ``models/beit/modeling_beit.py`` and ``conversion_mapping.py``.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from beitctl.checkpoints.mapping import Pair, same
from beitctl.checkpoints.parts import rows
from beitctl.model.dense import AUXILIARY, POOLED

OURS = "heads.segmenter."
CLASSIFIER = "decode_head.classifier.weight"
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
MODULES = (
    (r"^fpn1\.0\.", "fpn.fpn1.conv_transpose1."),
    (r"^fpn1\.1\.", "fpn.fpn1.normalization."),
    (r"^fpn1\.3\.", "fpn.fpn1.conv_transpose2."),
    (r"^fpn2\.0\.", "fpn.fpn2."),
    (r"^decode_head\.bottleneck\.", "decode_head.psp_bottleneck."),
    (r"^decode_head\.psp_modules\.(\d+)\.1\.", r"decode_head.psp_modules.blocks.\1.conv."),
    (r"\.conv\.weight$", ".convolution.weight"),
    (r"\.bn\.", ".normalization."),
)
"""From names in files to names of modules, one after the other."""


def classes_of(shapes: Mapping[str, torch.Size]) -> int:
    """Classes of the segmentation head that there is, theirs or ours; 0 without."""
    return rows(shapes, CLASSIFIER, OURS + CLASSIFIER)


def segmenter(shapes: Mapping[str, torch.Size], d: int, classes: int, *, modules: bool) -> Iterator[Pair]:
    """The pairs of the heads for a width d; with ``modules`` by the names that modules have in memory."""
    auxiliary = "auxiliary_head.classifier.weight"
    told = _tensors(d, classes, auxiliary=bool(rows(shapes, auxiliary, OURS + auxiliary)))
    for name, shape in told:
        theirs = name
        for pattern, replacement in MODULES if modules else ():
            theirs = re.sub(pattern, replacement, theirs)
        yield replace(same(OURS + name, theirs, shape), counts=name.endswith(BATCH_NORM[-1]))


def _tensors(d: int, classes: int, *, auxiliary: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names in files, and shapes."""
    for name in ("fpn1.0", "fpn1.3", "fpn2.0"):
        yield from ((f"{name}.weight", (d, d, 2, 2)), (f"{name}.bias", (d,)))
    yield from _batch_norm("fpn1.1", d)
    for number in range(len(POOLED)):
        yield from _layer(f"decode_head.psp_modules.{number}.1", d, d, 1)
    yield from _layer("decode_head.bottleneck", d * (1 + len(POOLED)), d, 3)
    for number in range(3):
        yield from _layer(f"decode_head.lateral_convs.{number}", d, d, 1)
        yield from _layer(f"decode_head.fpn_convs.{number}", d, d, 3)
    yield from _layer("decode_head.fpn_bottleneck", 4 * d, d, 3)
    yield from _classifier("decode_head", d, classes)
    if auxiliary:
        yield from _layer("auxiliary_head.convs.0", d, AUXILIARY, 3)
        yield from _classifier("auxiliary_head", AUXILIARY, classes)


def _layer(name: str, channels: int, out: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.conv.weight", (out, channels, kernel, kernel)
    yield from _batch_norm(f"{name}.bn", out)


def _batch_norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.{part}", (channels,)) for part in BATCH_NORM[:-1])
    yield f"{name}.{BATCH_NORM[-1]}", ()


def _classifier(name: str, channels: int, classes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.classifier.weight", (classes, channels, 1, 1)
    yield f"{name}.classifier.bias", (classes,)
