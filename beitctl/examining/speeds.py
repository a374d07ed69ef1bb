"""What this machine reaches at most: matrix products, copies, pictures decoded."""

import io
import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from beitctl.data.images import Pictures, random_crop
from beitctl.engine.measuring import ceilings
from beitctl.examining.finding import Finding

DECODE = "pictures_per_core"
SIDE, SECONDS = 224, 1.0
WIDTH, HEIGHT, QUALITY = 500, 375, 90
"""Of the pictures that are decoded: those of ImageNet, about."""


def speeds(device: torch.device, anew: bool) -> Iterator[Finding]:
    """What is remembered of a device, or is measured anew and remembered.

    Args:
        device: what multiplies and copies; pictures are decoded on the CPU in any case.
        anew: whether to measure.
    """
    kept = True
    if anew:
        cpu = torch.device("cpu")
        kept = ceilings.remember(device, ceilings.measure(device))
        today = time.strftime("%Y-%m-%d")
        kept &= ceilings.remember(cpu, {DECODE: decoded_per_second(), f"{DECODE}_measured": today})
    known, decoding = ceilings.recalled(device), ceilings.recalled(torch.device("cpu"))
    when = known.get(ceilings.WHEN)
    products, copies = known.get(ceilings.GEMM), known.get(ceilings.COPY)
    yield _line(
        "matrix products",
        f"{products:.3g} TFLOP/s in {known.get('dtype')}" if isinstance(products, float) else "",
        when,
    )
    yield _line("copies", f"{copies:.3g} GB/s" if isinstance(copies, float) else "", when)
    pictures = decoding.get(DECODE)
    yield _line(
        "decoding",
        f"{pictures:.0f} pictures/s and core (JPEG {WIDTH} x {HEIGHT}, crops of {SIDE})"
        if isinstance(pictures, float)
        else "",
        decoding.get(f"{DECODE}_measured"),
    )
    if not kept:
        yield Finding(
            "cache",
            "note",
            "what was measured could not be remembered",
            "set BEITCTL_CACHE to a folder of yours",
        )


def _line(name: str, value: str, when: float | str | None) -> Finding:
    if not value:
        return Finding(name, "note", "not measured", "beitctl doctor --measure")
    return Finding(name, "ok", f"{value}, measured {when}; again with --measure")


def decoded_per_second() -> float:
    """Pictures a second that one core decodes and crops as the loader does it, by processor time."""
    pictures, draw, data = Pictures(), np.random.default_rng(0), _jpeg()
    threads, done = torch.get_num_threads(), 0
    torch.set_num_threads(1)
    try:
        _one(pictures, data, draw)
        begun = time.process_time()
        while (spent := time.process_time() - begun) < SECONDS:
            _one(pictures, data, draw)
            done += 1
    finally:
        torch.set_num_threads(threads)
    return done / spent


def _one(pictures: Pictures, data: bytes, draw: np.random.Generator) -> None:
    picture = pictures.open(data)
    pictures.crop(picture, random_crop(picture.width, picture.height, draw), SIDE)


def _jpeg() -> bytes:
    """A picture of noise with the spectrum of photos, which takes as long to decode as one."""
    frequencies = np.fft.fftfreq(HEIGHT)[:, None] ** 2 + np.fft.fftfreq(WIDTH)[None] ** 2
    frequencies[0, 0] = 1
    noise = np.random.default_rng(0).standard_normal((3, HEIGHT, WIDTH))
    pixels = np.fft.ifft2(np.fft.fft2(noise) / np.sqrt(frequencies)).real.transpose(1, 2, 0)
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()
