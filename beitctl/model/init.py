"""Initial weights: one function, one generator per parameter.

A parameter's values depend on the seed and its own name and nothing else, so they are the same on any number
of ranks and whatever else the model holds.
"""

import hashlib
import math

import torch
from torch import Tensor

from beitctl.config import ModelConfig


def initial(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Initial value of one parameter of a model or of its heads, fp32 on the CPU.

    L layers, d width, l block counted from 1; truncated normals are cut at one standard deviation.

    ============================  =====================  ==========================  ==================
    parameter                     ``beit``               ``magneto``                 ``released``
    ============================  =====================  ==========================  ==================
    query, key                    trunc N(0, .02)        Xavier                      trunc N(0, .02)
    value                         trunc N(0, .02)        Xavier, gain sqrt(ln 2L)    trunc N(0, .02)
    fc1                           trunc N(0, .02)        Xavier, gain sqrt(ln 2L)    trunc N(0, .02)
    output projection, fc2        same / sqrt(2 l)       Xavier, gain sqrt(ln 2L)    trunc N(0, .02)
    patch projection              trunc N(0, .02)        Xavier                      U(+-1/sqrt(fan in))
    heads                         trunc N(0, .02)        trunc N(0, .02)             trunc N(0, .02)
    positions                     trunc N(0, .02)        trunc N(0, .02)             N(0, 1)
    text embedding                trunc N(0, .02)        N(0, d ** -.5)              N(0, d ** -.5)
    class token, mask token       trunc N(0, .02)        trunc N(0, .02)             0
    biases / norms                0 / 1                  0 / 1                       0 / 1
    ============================  =====================  ==========================  ==================

    Sources: ``beit``: BEiT's code and arXiv:2208.10442; ``magneto``: arXiv:2210.06423, which the released
    BEiT-3 is said to use; ``released``: what the released code does when it builds a model.

    Raises:
        ValueError: there is no rule for a parameter of this name.
    """
    draw = _Draw(name, shape, seed)
    last = name.rpartition(".")[2]
    if last in ("bias", "q_bias", "v_bias"):
        return torch.zeros(shape)
    if "norm" in name and len(shape) == 1:
        return torch.ones(shape)
    if last == "logit_scale":
        return torch.full(shape, math.log(1 / 0.07))  # CLIP's start, as in BEiT-3's retrieval model
    if last in ("cls_token", "mask_token"):
        return torch.zeros(shape) if config.init == "released" else draw.truncated()
    if name.endswith(("position", "position.weight")):
        return draw.normal(1.0) if config.init == "released" else draw.truncated()
    if name.endswith("text_embed.token.weight"):
        return draw.truncated() if config.init == "beit" else draw.normal(config.width**-0.5)
    if last == "weight" and len(shape) == 2:
        return _linear(name, draw, config)
    raise ValueError(f"no initial value is defined for parameter {name} of shape {tuple(shape)}")


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
    in_block = ".blocks." in f".{name}"
    if name.endswith("vision_embed.proj.weight") and config.init == "released":
        return draw.uniform(fan_in**-0.5)
    if config.init == "magneto" and (in_block or name.endswith("vision_embed.proj.weight")):
        gain = math.sqrt(math.log(2 * config.layers)) if in_block else 1.0
        if name.endswith("qkv.weight"):
            d = fan_out // 3
            weight = draw.normal(math.sqrt(2 / (fan_in + d)))
            weight[2 * d :] *= gain
            return weight
        return draw.normal(gain * math.sqrt(2 / (fan_in + fan_out)))
    weight = draw.truncated()
    if config.init == "beit" and in_block and name.endswith(("out.weight", "fc2.weight")):
        layer = 1 + int(name.split("blocks.")[1].split(".")[0])
        weight /= math.sqrt(2 * layer)
    return weight
