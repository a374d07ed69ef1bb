"""Initial weights: one function, one generator per parameter.

A parameter's values depend on the seed and its own name and nothing else, so they are the same on any number
of ranks and whatever else the model holds.
"""

import hashlib
import math
import re

import torch
from torch import Tensor

from beitctl.config import ModelConfig

BIASES = ("bias", "q_bias", "v_bias")
SMALL = (
    "classifier.linear.weight",
    "classifier.distilled.weight",
    "reasoning.up.weight",
    "reasoning.out.weight",
)
"""Heads that begin at a thousandth of the others (BEiT's and BEiT-3's fine-tuning code)."""
SEGMENTER = "heads.segmenter."
"""Begins the names of the heads of semantic segmentation, whose 1-D weights are those of batch norms."""
DETECTOR = "heads.detector."
"""Begins the names of the heads of detection, whose 1-D weights are those of layer norms."""


def initial(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Initial value of one parameter of a model or of its heads, fp32 on the CPU.

    L layers, d width, l block counted from 1; truncated normals are cut at one standard deviation.

    ============================  =====================  ==========================  =======================
    parameter                     ``beit``               ``magneto``                 ``released``
    ============================  =====================  ==========================  =======================
    query, key                    trunc N(0, .02)        Xavier                      trunc N(0, .02)
    value                         trunc N(0, .02)        Xavier, gain sqrt(ln 2L)    trunc N(0, .02)
    fc1                           trunc N(0, .02)        Xavier, gain sqrt(ln 2L)    trunc N(0, .02)
    output projection, fc2        same / sqrt(2 l)       Xavier, gain sqrt(ln 2L)    trunc N(0, .02)
    patch projection              trunc N(0, .02)        Xavier                      U(+-1/sqrt(fan in))
    heads                         trunc N(0, .02)        trunc N(0, .02)             trunc N(0, .02)
    classifier, NLVR2's head      same * .001            same * .001                 same * .001
    positions                     trunc N(0, .02)        trunc N(0, .02)             N(0, 1)
    text embedding                trunc N(0, .02)        N(0, d ** -.5)              N(0, d ** -.5)
    class token, mask token       trunc N(0, .02)        trunc N(0, .02)             0
    token types                   trunc N(0, .02)        trunc N(0, .02)             trunc N(0, .02)
    relative positions            0                      0                           0
    LayerScale                    ``layer_scale``        ``layer_scale``             ``layer_scale``
    biases / norms                0 / 1                  0 / 1                       0 / 1
    segmentation: pyramid         U(+-1/sqrt(fan in))    the same                    the same
    segmentation: convolutions    N(0, sqrt(2/fan out))  the same                    the same
    segmentation: classifiers     N(0, .01)              the same                    the same
    detection: pyramid, box head  U(+-1/sqrt(fan in))    the same                    the same
    detection: other convolutions N(0, sqrt(2/fan out))  the same                    the same
    detection: proposals, classes N(0, .01)              the same                    the same
    detection: boxes of classes   N(0, .001)             the same                    the same
    ============================  =====================  ==========================  =======================

    With ``norm = "pre"``, ``released`` is BEiT-1's and BEiT v2's code: as ``beit``, but BEiT v2's extra
    blocks keep PyTorch's default U(+-1/sqrt(fan in)) for weights and biases, of which output projection and
    fc2 are then divided by sqrt(2 l).

    Sources: ``beit``: BEiT's code and arXiv:2208.10442; ``magneto``: arXiv:2210.06423, which the released
    BEiT-3 is said to use; ``released``: what the released code does when it builds a model; segmentation:
    PyTorch's default weights in BEiT's pyramid, mmsegmentation 0.11 in the heads; detection: Detectron2's
    Mask R-CNN, PyTorch's default weights in the pyramid and in the linear layers of the box head.

    Raises:
        ValueError: there is no rule for a parameter of this name.
    """
    draw, last = _Draw(name, shape, seed), name.rpartition(".")[2]
    constant = _constant(name, last, shape, config)
    if constant is not None:
        return constant
    as_built = config.init == "released" and config.norm == "sub"
    if last in ("bias", "cls_token", "mask_token", "distill_token"):
        return (
            torch.zeros(shape)
            if as_built
            else _extra_bias(draw, name, config)
            if last == "bias"
            else draw.truncated()
        )
    if name.endswith(("position", "position.weight")):
        return draw.normal(1.0) if as_built else draw.truncated()
    if name.endswith("text_embed.token.weight"):
        return draw.normal(config.width**-0.5) if as_built or config.init == "magneto" else draw.truncated()
    if name.endswith(("text_embed.type_row", "token_type.weight")):
        return draw.truncated()
    if name.startswith(DETECTOR) and last == "weight":
        return _detector(name, draw)
    if last == "weight" and len(shape) == 2:
        weight = _linear(name, draw, config)
        return weight * 0.001 if name.endswith(SMALL) else weight
    if last == "weight" and len(shape) == 4 and name.startswith(SEGMENTER):
        return _convolution(name, draw)
    raise ValueError(f"no initial value is defined for parameter {name} of shape {tuple(shape)}")


def _constant(name: str, last: str, shape: torch.Size, config: ModelConfig) -> Tensor | None:
    """Value of a parameter that begins with the same number everywhere; None for the others."""
    if last in ("q_bias", "v_bias") or name.endswith("relative.table"):
        return torch.zeros(shape)
    if last == "bias" and not (".aggregation." in name and config.init == "released"):
        return torch.zeros(shape)
    if ("norm" in name or name.startswith((SEGMENTER, DETECTOR))) and len(shape) == 1:
        return torch.zeros(shape) if last == "bias" else torch.ones(shape)
    if last in ("attention_scale", "ffn_scale"):
        return torch.full(shape, config.layer_scale)
    if last == "logit_scale":
        return torch.full(shape, math.log(1 / 0.07))  # CLIP's start, as in BEiT-3's retrieval model
    return None


def _extra_bias(draw: "_Draw", name: str, config: ModelConfig) -> Tensor:
    """PyTorch's default bias, in BEiT v2's extra blocks."""
    return draw.uniform((config.ffn if name.endswith("fc2.bias") else config.width) ** -0.5)


class _Draw:
    """Random tensors of one parameter, from its own generator."""

    def __init__(self, name: str, shape: torch.Size, seed: int) -> None:
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        self.shape = shape

    def normal(self, std: float) -> Tensor:
        return torch.empty(self.shape).normal_(0.0, std, generator=self.generator)

    def truncated(self, std: float = 0.02) -> Tensor:
        value = torch.empty(self.shape)
        return torch.nn.init.trunc_normal_(value, 0.0, std, -std, std, generator=self.generator)

    def uniform(self, bound: float) -> Tensor:
        return torch.empty(self.shape).uniform_(-bound, bound, generator=self.generator)


def _linear(name: str, draw: _Draw, config: ModelConfig) -> Tensor:
    """Weight of a linear layer, (out, in)."""
    fan_out, fan_in = draw.shape
    number = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    as_built = config.init == "released" and config.norm == "sub"
    if name.endswith("vision_embed.proj.weight") and as_built:
        return draw.uniform(fan_in**-0.5)
    if config.init == "magneto" and (number or name.endswith("vision_embed.proj.weight")):
        gain = math.sqrt(math.log(2 * config.layers)) if number else 1.0
        if name.endswith("qkv.weight"):
            d = fan_out // 3
            weight = draw.normal(math.sqrt(2 / (fan_in + d)))
            weight[2 * d :] *= gain
            return weight
        return draw.normal(gain * math.sqrt(2 / (fan_in + fan_out)))
    extra = ".aggregation." in name and config.init == "released"
    weight = draw.uniform(fan_in**-0.5) if extra else draw.truncated()
    if config.init != "magneto" and not as_built and number and name.endswith(("out.weight", "fc2.weight")):
        weight /= math.sqrt(2 * (1 + int(number.group(1))))
    return weight


def _convolution(name: str, draw: _Draw) -> Tensor:
    """Weight of a convolution (out, in, k, k) or deconvolution (in, out, k, k) of semantic segmentation."""
    first, second, *kernel = draw.shape
    if name.startswith(f"{SEGMENTER}fpn"):
        return draw.uniform((second * math.prod(kernel)) ** -0.5)
    if name.endswith("classifier.weight"):
        return draw.normal(0.01)
    return draw.normal(math.sqrt(2 / (first * math.prod(kernel))))


def _detector(name: str, draw: _Draw) -> Tensor:
    """Weight of a linear layer (out, in), convolution or deconvolution of detection."""
    first, second, *kernel = draw.shape
    if name.endswith("box_predictor.bbox_pred.weight"):
        return draw.normal(0.001)
    if ".rpn." in name or name.endswith("box_predictor.cls_score.weight"):
        return draw.normal(0.01)
    if ".pyramid." in name or not kernel:
        return draw.uniform((second * math.prod(kernel)) ** -0.5)
    return draw.normal(math.sqrt(2 / (first * math.prod(kernel))))
