"""Mixup, CutMix and random erasing of a batch on its device.

Mixup arXiv:1710.09412, CutMix arXiv:1905.04899, random erasing arXiv:1708.04896, with timm's rules. Samples
are mixed in twos, 2k with 2k + 1 of a pass, and what is drawn is drawn when a sample is prepared: numbers in
0..1 of ``Item.chance``. So results do not depend on ranks, as long as every pass holds an even number.

Letters: n samples, V classes, H and W pixels.
"""

import math

import numpy as np
import torch
from torch import Tensor

MIX, ERASE = slice(0, 5), slice(5, 10)
"""Places in ``Item.chance`` of what ``mix_draws`` and ``erase_draws`` give."""
AREAS = (0.02, 1 / 3)
"""Smallest and largest share of a picture that is erased."""
ASPECTS = (0.3, 1 / 0.3)
"""Smallest and largest height / width of what is erased."""
ATTEMPTS = 10
SEEDS = 2**24
"""Numbers in 0..1 that fp32 tells apart."""


def mix_draws(
    draw: np.random.Generator, px: int, alphas: tuple[float, float], prob: float, switch: float
) -> tuple[float, ...]:
    """How a sample is mixed with its neighbour: its own share, and top, bottom, left, right of the box.

    Args:
        draw: the source of all randomness.
        px: side of the pictures.
        alphas: of the Beta distributions of mixup and of CutMix; 0: not used.
        prob: probability that there is any mixing.
        switch: probability of CutMix where both are used.

    Returns:
        Edges of the box by the side, equal ones for mixup; for CutMix the share is 1 less the box's area.
    """
    mixup, cutmix = alphas
    cut = bool(draw.random() < switch) if mixup and cutmix else bool(cutmix)
    alpha = cutmix if cut else mixup
    share = float(draw.beta(alpha, alpha)) if alpha else 1.0
    if draw.random() >= prob or share == 1.0:
        return 1.0, 0.0, 0.0, 0.0, 0.0
    if not cut:
        return share, 0.0, 0.0, 0.0, 0.0
    top, bottom, left, right = cut_box(draw, px, share)
    edges = (top / px, bottom / px, left / px, right / px)
    return 1 - (bottom - top) * (right - left) / px**2, *edges


def cut_box(draw: np.random.Generator, px: int, share: float) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a square of the area 1 - ``share`` around a random point, cut at the edges.

    The rule of timm's ``rand_bbox``.
    """
    side = int(px * math.sqrt(1 - share))
    found: list[int] = []
    for middle in draw.integers(px, size=2).tolist():
        found += [max(0, middle - side // 2), min(px, middle + (side + 1) // 2)]
    return found[0], found[1], found[2], found[3]


def erase_draws(draw: np.random.Generator, px: int, prob: float) -> tuple[float, ...]:
    """What is erased of a picture: top, left, height, width by the side, and a number to seed the noise.

    The rule of timm's ``RandomErasing`` with one box; height and width are 0 where nothing is erased.
    """
    nothing = (0.0, 0.0, 0.0, 0.0, 0.0)
    if draw.random() >= prob:
        return nothing
    for _ in range(ATTEMPTS):
        area = draw.uniform(*AREAS) * px * px
        aspect = math.exp(draw.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < px and width < px:
            top, left = (int(draw.integers(px - size + 1)) for size in (height, width))
            return top / px, left / px, height / px, width / px, int(draw.integers(SEEDS)) / SEEDS
    return nothing


def erased(pixels: Tensor, draws: Tensor) -> Tensor:
    """Normalised pictures (n, 3, H, W) with noise in a box of some; ``draws`` (n, 5) of ``erase_draws``.

    The noise is N(0, 1) from a generator of the device, seeded by the sample's number. Waits for the device.
    """
    found = pixels.clone()
    for picture, row in zip(found, draws.tolist(), strict=True):
        top, left, height, width = _pixels(row[:4], pixels.shape[-1])
        if not height or not width:
            continue
        generator = torch.Generator(pixels.device).manual_seed(int(row[4] * SEEDS))
        size = (len(picture), height, width)
        picture[:, top : top + height, left : left + width] = torch.randn(
            size, generator=generator, device=pixels.device, dtype=pixels.dtype
        )
    return found


def _pixels(shares: list[float], px: int) -> list[int]:
    return [round(share * px) for share in shares]


def partners(draws: Tensor) -> Tensor:
    """(n,) the sample that each is mixed with.

    Raises:
        ValueError: one has none.
    """
    count = len(draws)
    if count % 2:
        raise ValueError(
            f"mixup and cutmix mix samples in twos, but a pass holds {count}: samples must be a multiple of "
            "twice the ranks times the passes (micro_samples)"
        )
    return torch.arange(count, device=draws.device) ^ 1


def _of_pairs(draws: Tensor) -> Tensor:
    """The numbers of the even sample of every pair, for both."""
    return draws[torch.arange(len(draws), device=draws.device) // 2 * 2]


def mixed(pixels: Tensor, draws: Tensor) -> Tensor:
    """Pictures (n, 3, H, W), each mixed with its neighbour's; ``draws`` (n, 5) of ``mix_draws``.

    Raises:
        ValueError: n is odd.
    """
    other = partners(draws)
    share, top, bottom, left, right = (column[:, None, None, None] for column in _of_pairs(draws).unbind(1))
    height, width = pixels.shape[-2:]
    y = torch.arange(height, device=pixels.device)[:, None]
    x = torch.arange(width, device=pixels.device)
    inside = (y >= (top * height).round()) & (y < (bottom * height).round())
    inside = inside & (x >= (left * width).round()) & (x < (right * width).round())
    own = torch.where(bottom > top, (~inside).to(pixels.dtype), share.to(pixels.dtype))
    return pixels * own + pixels[other] * (1 - own)


def soft_targets(labels: Tensor, draws: Tensor, classes: int, smoothing: float) -> Tensor:
    """(n, V) probabilities that mixed samples should have, where ``smoothing`` spreads over all classes.

    Equal to timm's ``mixup_target`` with its partner.

    Raises:
        ValueError: n is odd.
    """
    off = smoothing / classes
    hot = torch.full((len(labels), classes), off, device=labels.device)
    hot.scatter_(1, labels[:, None], 1 - smoothing + off)
    other, share = partners(draws), _of_pairs(draws)[:, :1]
    return hot * share + hot[other] * (1 - share)


def dominating(labels: Tensor, draws: Tensor) -> Tensor:
    """(n,) the class that has the larger share of a mixed sample; one's own at equal shares."""
    return torch.where(_of_pairs(draws)[:, 0] >= 0.5, labels, labels[partners(draws)])


def soft_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (n, V) logits with (n, V) probabilities, summed over the samples."""
    return -(targets * logits.log_softmax(-1)).sum()
