"""Floating-point operations of a step, counted from its lengths; pure arithmetic, nothing runs.

A multiply-add is two operations. What counts is what ``torch.utils.flop_counter`` counts: matrix products.
Norms, softmax, activations and biases are left out, relative positions with them: these are looked up and
added, no product.

Letters: d width, f FFN width, T rows, L tokens of a sequence, S sequences of a kind, M longest of them.
"""

from dataclasses import dataclass, fields
from typing import Any

from beitctl.config import ModelConfig
from beitctl.model.plan import BatchPlan


@dataclass(frozen=True)
class Flops:
    """Operations of forward passes by part; passes and heads add up with ``+``."""

    patches: int = 0
    """Patch embedding."""
    projections: int = 0
    """Queries, keys, values and output of attention: 8 d^2 a row and block."""
    experts: int = 0
    """Expert FFNs: 4 d f a row and block, whichever expert reads the row."""
    attention: int = 0
    """Both products of attention over the real tokens: 4 L^2 d a sequence and block."""
    padded_attention: int = 0
    """The same as the backend ``padded`` does it: 4 M^2 d, each kind padded to its longest sequence."""
    heads: int = 0
    """Linear layers of the heads, on the predicted rows alone."""

    def __add__(self, other: "Flops") -> "Flops":
        names = [field.name for field in fields(self)]
        return Flops(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def blocks(self) -> int:
        """Of all blocks in a forward pass."""
        return self.projections + self.experts + self.attention

    @property
    def forward(self) -> int:
        """Of a forward pass."""
        return self.patches + self.blocks + self.heads

    @property
    def backward(self) -> int:
        """Of a backward pass: both operands of each product get a gradient, but pixels need none."""
        return 2 * self.forward - self.patches

    @property
    def training(self) -> int:
        """Of a forward and a backward pass, nothing computed twice: the useful work, which MFU goes by."""
        return self.forward + self.backward

    @property
    def recompute(self) -> int:
        """What full activation checkpointing adds: the forward pass of the blocks once more."""
        return self.blocks

    @property
    def padding(self) -> int:
        """What a forward pass adds with padded attention."""
        return self.padded_attention - self.attention

    @property
    def padded(self) -> int:
        """Of a forward and a backward pass with padded attention: what the reference really does."""
        return self.training + 3 * self.padding

    def as_dict(self) -> dict[str, int]:
        """The parts of the forward pass and the sums."""
        parts = ("patches", "projections", "experts", "attention", "heads")
        sums = ("forward", "backward", "training", "recompute", "padded")
        return {name: getattr(self, name) for name in parts + sums}


def of_pass(
    config: ModelConfig, plan: BatchPlan, *, blocks: int | None = None, embedded: bool = True
) -> Flops:
    """Operations of one forward pass of the model without heads.

    The counts of shared and decoupled attention are equal, those of all experts too: a row is read by one set
    of projections and one expert in any case.

    Args:
        config: shape of the model.
        plan: counts and lengths of the batch; its index arrays are not made.
        blocks: number of blocks that the rows go through; all of the model's by default.
        embedded: whether pictures are embedded as well; False where the rows are there already.
    """
    d, layers = config.width, config.layers if blocks is None else blocks
    rows = plan.real_tokens
    squares, grids = attended(plan)
    pixels = config.channels * config.patch_px**2
    return Flops(
        patches=2 * plan.pictures * config.patches * pixels * d if embedded else 0,
        projections=8 * d * d * rows * layers,
        experts=4 * d * config.ffn * rows * layers,
        attention=4 * squares * d * layers,
        padded_attention=4 * grids * d * layers,
    )


def attended(plan: BatchPlan) -> tuple[int, int]:
    """Pairs of query and key: of real tokens, and of grids padded to the longest sequence of each kind."""
    picture = plan.picture_tokens
    kinds = (
        [picture] * plan.images,
        [picture + length for length in plan.pair_lengths],
        list(plan.text_lengths),
    )
    real = sum(length * length for kind in kinds for length in kind)
    return real, sum(len(kind) * max(kind) ** 2 for kind in kinds if kind)


def of_head(rows: int, weights: int) -> Flops:
    """Operations of linear layers with so many weights in all, on so many rows."""
    return Flops(heads=2 * rows * weights)


def linear_weights(head: Any) -> int:
    """Weights of the linear layers of a head, a module, biases left out; sharded ones count whole."""
    named = dict(head.named_parameters())
    return sum(p.shape.numel() for name, p in named.items() if p.ndim == 2 and name.endswith("weight"))
