"""Pictures: from the bytes of a file to (3, px, px) uint8, by way of a crop that can be written down.

The same crop drawn at two sizes shows the same part of the picture, so the tokenizer and the model can look
at one view each.
"""

import functools
import io
import logging
import math
import os
import re
import struct
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch.nn import functional

from beitctl.errors import DataError

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs comes as a DataError

FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on broken files."""

MAX_BYTES = 512 * 2**20
"""Files that are larger are no pictures to train on."""

MOST_SCANS = 64
"""In a progressive JPEG; programs write ten or so, and each costs time however few bytes it has."""

MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""Of a JPEG, also behind a scan."""

STRIP_PIXELS = 2**20
"""Pixels that are converted at a time."""

PATIENCE = 1000
"""Pictures that a cache drops before it is given up if hardly any was wanted again."""

ORIENTATION = 0x0112
"""EXIF tag; values 5 to 8 swap width and height."""


@dataclass(frozen=True)
class Crop:
    """A part of a picture in source pixels, and what is done to it; factors of 1 change nothing."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False
    """Whether left and right are swapped."""
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def random_crop(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    jitter: float = 0.0,
) -> Crop:
    """Part of a picture with random area, aspect, place, flip and colours (Inception's crop).

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        rng: the source of all randomness.
        scale: smallest and largest share of the picture's area.
        ratio: smallest and largest width / height; drawn log-uniformly.
        flip: probability of a flip.
        jitter: brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter.
    """
    top, left, h, w = _random_box(width, height, rng, scale, ratio)
    flipped = bool(rng.random() < flip)
    if not jitter:
        return Crop(top, left, h, w, flipped)
    brightness, contrast, saturation = (float(f) for f in rng.uniform(max(0, 1 - jitter), 1 + jitter, 3))
    return Crop(top, left, h, w, flipped, brightness, contrast, saturation)


def _random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random box; the largest centred one that fits after ten misses."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def centre_crop(width: int, height: int) -> Crop:
    """Largest square in the middle of a picture."""
    side = min(width, height)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB. Not to be changed: others may use it."""

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[0])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    def pil(self) -> Image.Image:
        """The same as a picture of Pillow."""
        return Image.fromarray(self.pixels)


class Pictures:
    """Opens and crops pictures; keeps the last decoded ones, if it has room. One per process."""

    def __init__(self, max_pixels: int = 64_000_000, cache_mib: float = 0) -> None:
        # takes a second, which is wanted once and before worker processes are forked
        from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415

        self._jpeg = functools.partial(decode_jpeg, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        self.max_pixels = max_pixels
        self.cache_bytes = int(cache_mib * 2**20)
        self._kept: OrderedDict[bytes | Path, Picture] = OrderedDict()
        self._kept_bytes = self._hits = self._dropped = 0

    def open(self, image: bytes | Path, key: str | None = None) -> Picture:
        """Decode a picture: upright, first frame, 8 bits a channel, transparent parts over white.

        torchvision decodes JPEG, Pillow everything else and whatever torchvision does not read.

        Args:
            image: an encoded picture, or the path of one.
            key: its id, for messages.

        Raises:
            DataError: it cannot be read, is no picture, is cut off, or has more than ``max_pixels``.
        """
        if self._kept and image in self._kept:
            self._kept.move_to_end(image)
            self._hits += 1
            return self._kept[image]
        with self._faults(image, key):
            data = image if isinstance(image, bytes) else _read(image)
            with self._header(data, _name(image, key)) as found:
                picture = self._decoded(found, data)
        self._keep(image, picture)
        return picture

    def size(self, image: bytes | Path, key: str | None = None) -> tuple[int, int]:
        """Width and height in pixels of a picture as ``open`` gives it, from the header alone.

        Raises:
            DataError: it cannot be read, is no picture, or has more than ``max_pixels``.
        """
        with self._faults(image, key), self._header(image, _name(image, key)) as found:
            width, height = found.size
            upright = found.format == "TIFF"  # there Pillow has swapped them already
            turned = not upright and found.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return (height, width) if turned else (width, height)

    def crop(self, picture: Picture, crop: Crop, px: int) -> NDArray[np.uint8]:
        """Part of a picture, (3, px, px) uint8, bicubic with antialiasing; channels last in memory.

        Raises:
            DataError: the crop reaches over the edge, so it was drawn for another picture.
        """
        bottom, right = crop.top + crop.height, crop.left + crop.width
        if min(crop.left, crop.top) < 0 or right > picture.width or bottom > picture.height:
            box = (crop.left, crop.top, right, bottom)
            raise DataError(
                f"crop {box} reaches over the edge of a picture of {picture.width}x{picture.height} pixels: "
                "the picture has changed since the crop was drawn; run tokenize-images again"
            )
        part = picture.pixels[crop.top : bottom, crop.left : right]
        part = _coloured(resized(part, px, px), crop)
        if crop.flip:
            part = torch.from_numpy(part).flip(1).numpy()
        return part.transpose(2, 0, 1)

    def _decoded(self, found: Image.Image, data: bytes) -> Picture:
        """All of a picture of which Pillow has read the header."""
        if found.info.get("progressive") and _scans(data) > MOST_SCANS:
            raise ValueError(f"more than {MOST_SCANS} scans, which take minutes to decode")
        if found.format == "EPS":
            raise ValueError("EPS is a program: convert it to PNG")
        if found.format in ("JPEG", "MPO") and found.mode in ("RGB", "L"):
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            try:
                pixels = self._jpeg(encoded)
                return Picture(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
            except RuntimeError:
                pass  # Pillow reads it, or says what is wrong with it
        found.load()
        ImageOps.exif_transpose(found, in_place=True)
        return Picture(_pixels(found))

    @contextmanager
    def _header(self, image: bytes | Path, name: str) -> Iterator[Image.Image]:
        """A picture of which only the header is read."""
        with (
            warnings.catch_warnings(action="ignore"),  # the limit below replaces Pillow's warning
            Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as found,
        ):
            if found.width * found.height > self.max_pixels:
                raise DataError(
                    f"{name}: {found.width}x{found.height} pixels are more than the limit of "
                    f"{self.max_pixels}; shrink it"
                )
            yield found

    @contextmanager
    def _faults(self, image: bytes | Path, key: str | None) -> Iterator[None]:
        """What goes wrong inside the block is a DataError."""
        try:
            yield
        except UnidentifiedImageError as error:
            raise DataError(
                f"{_name(image, key)}: not a readable picture ({_unknown(image)}); replace or remove it"
            ) from error
        except FAULTS as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DataError(
                f"{_name(image, key)}: not a readable picture ({reason}); replace or remove it"
            ) from error

    def _keep(self, image: bytes | Path, picture: Picture) -> None:
        """Put a picture into the cache, and drop those not used for longest."""
        if _memory(image, picture) > self.cache_bytes:
            return
        self._kept[image] = picture
        self._kept_bytes += _memory(image, picture)
        while self._kept_bytes > self.cache_bytes:
            self._kept_bytes -= _memory(*self._kept.popitem(last=False))
            self._dropped += 1
        if self._dropped > PATIENCE and self._hits < self._dropped / 10:  # far more pictures than fit
            self.cache_bytes = self._kept_bytes = 0
            self._kept.clear()


def resized(pixels: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """(H, W, 3) at another size, bicubic with antialiasing: the kernel of torchvision's transforms v2."""
    batch = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
    found = functional.interpolate(batch, (height, width), mode="bicubic", antialias=True)
    array: NDArray[np.uint8] = found[0].permute(1, 2, 0).numpy()
    return array


def _coloured(pixels: NDArray[np.uint8], crop: Crop) -> NDArray[np.uint8]:
    """(H, W, 3) with the colours of a crop."""
    factors = (
        (ImageEnhance.Brightness, crop.brightness),
        (ImageEnhance.Contrast, crop.contrast),
        (ImageEnhance.Color, crop.saturation),
    )
    if all(factor == 1 for _, factor in factors):
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    for enhance, factor in factors:
        if factor != 1:
            image = enhance(image).enhance(factor)
    return np.array(image)


def _name(image: bytes | Path, key: str | None) -> str:
    """What a picture is called in messages."""
    if not isinstance(image, Path):
        return "a picture" if key is None else key
    return str(image) if key is None else f"{key} ({image})"


def _unknown(image: bytes | Path) -> str:
    """What is taken for a picture by mistake."""
    try:
        with io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb") as file:
            head = file.read(1024)
    except OSError:
        return "unknown format"
    if head[4:8] == b"ftyp":
        return "HEIC or AVIF, which cannot be decoded here: convert it to JPEG"
    if b"%PDF" in head or b"<svg" in head:
        return f"{'PDF' if b'%PDF' in head else 'SVG'}, which has no pixels: convert it to PNG"
    return "unknown format"


def _read(path: Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        return file.read()


def _scans(data: bytes) -> int:
    """Scans of the first picture in the bytes of a JPEG."""
    place, scans = 2, 0
    while (found := MARKER.search(data, place)) is not None and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of a decoded picture; in strips, as copies of a large one in other modes would add up."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    width, height = image.size
    found = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        found[top : top + rows] = np.asarray(_to_rgb(strip))
    return found


def _memory(image: bytes | Path, picture: Picture) -> int:
    """Bytes of an encoded picture and of the decoded one."""
    return picture.pixels.nbytes + (len(image) if isinstance(image, bytes) else 0)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB of a picture with 8 bits, whatever the mode was."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, as grey of 8 bits: white is the largest value of the format."""
    values = np.asarray(image)
    if image.mode == "F":
        white = 1.0 if values.max() <= 1 else 255.0
    else:
        white = 65535.0 if image.mode.startswith("I;16") or values.max() <= 65535 else 2.0**31 - 1
    found = np.empty(values.size, np.uint8)
    flat = values.reshape(-1)
    for start in range(0, len(flat), STRIP_PIXELS):
        block = flat[start : start + STRIP_PIXELS].astype(np.float64)
        found[start : start + STRIP_PIXELS] = np.clip(np.rint(block * (255 / white)), 0, 255)
    return Image.fromarray(found.reshape(values.shape))
