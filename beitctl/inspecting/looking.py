"""One example under the magnifying glass: is it readable, and what are its pictures like."""

import contextlib
import io
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from beitctl.api import Example, Examples
from beitctl.data.images import FAULTS, MAX_BYTES, Pictures
from beitctl.errors import ChangedError, DataError

DIGEST_BYTES = 16
REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Measured:
    """What is known of a picture that could be decoded."""

    format: str
    mode: str
    width: int
    """Of the upright picture, as ``height``."""
    height: int
    size: int
    """Bytes of the encoded picture."""
    animated: bool
    transparent: bool
    """Whether it has an alpha channel or a transparent colour."""


@dataclass(frozen=True)
class Seen:
    """One example, looked at."""

    index: int
    id: str
    example: Example | None = None
    """None if it is broken."""
    pictures: tuple[Measured, ...] = ()
    """Of ``image`` and ``second``."""
    digest: bytes = b""
    """Hash of the bytes of ``image`` and ``second``, and of ``text``; empty without pictures."""
    reason: str = ""
    """Why it is broken."""


def look(examples: Examples, index: int, pictures: Pictures) -> Seen:
    """Read an example and decode all its pictures.

    Raises:
        ChangedError: the data are not any more what was opened.
    """
    example = read(examples, index)
    if isinstance(example, Seen):
        return example
    state = blake2b(digest_size=DIGEST_BYTES)
    measured = []
    for image in (example.image, example.second):
        if image is None:
            continue
        try:
            measured.append(_measure(image, example.id, pictures, state))
        except DataError as error:
            return Seen(index, example.id, reason=reason(error, example.id, image))
    if example.segmentation is not None:
        try:
            pictures.open(example.segmentation, example.id)
        except DataError as error:
            why = reason(error, example.id, example.segmentation)
            return Seen(index, example.id, reason=f"segmentation: {why}")
    state.update((example.text or "").encode())  # two questions about one picture are no copies
    return Seen(index, example.id, example, tuple(measured), state.digest() if measured else b"")


def read(examples: Examples, index: int) -> Example | Seen:
    """An example, or why it cannot be had.

    Raises:
        ChangedError: the data are not any more what was opened.
    """
    try:
        example = examples[index]
    except ChangedError:
        raise
    except DataError as error:
        return Seen(index, f"#{index}", reason=reason(error, "", None))
    for words in (example.id, *example.captions, example.text, example.label):
        try:
            (words or "").encode()
        except UnicodeEncodeError:
            return Seen(index, example.id, reason=f"not valid Unicode: {ascii(words)[:60]}")
    return example


def reason(error: DataError, id: str, image: bytes | Path | None) -> str:
    """What is wrong with an example, in one line and without its name."""
    text = " ".join(str(error).split())
    for prefix in (f"{id} ({image}): " if isinstance(image, Path) else "", f"{id}: "):
        text = text.removeprefix(" ".join(prefix.split()) + " " if prefix else "")
    text = text.removesuffix("; replace or remove it")
    return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 1] + "…"


def content(image: bytes | Path, id: str) -> bytes:
    """An encoded picture.

    Raises:
        DataError: it cannot be read.
    """
    if isinstance(image, bytes):
        return image
    try:
        size = image.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size >> 20} MiB are more than the limit of {MAX_BYTES >> 20} MiB")
        return image.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{id}: cannot be read ({why}); replace or remove it") from error


def header(encoded: bytes) -> Image.Image:
    """The opened header of a picture that is known to be readable."""
    return Image.open(io.BytesIO(encoded))


def _measure(image: bytes | Path, id: str, pictures: Pictures, state: blake2b) -> Measured:
    encoded = content(image, id)
    picture = pictures.open(encoded, id)
    state.update(encoded)
    animated, transparent = False, False
    with header(encoded) as found:
        with contextlib.suppress(*FAULTS):  # the first frame is all that is used
            animated = found.format != "MPO" and bool(getattr(found, "is_animated", False))
        with contextlib.suppress(*FAULTS):
            transparent = found.has_transparency_data
        name, mode = found.format or "unknown", found.mode
    return Measured(name, mode, picture.width, picture.height, len(encoded), animated, transparent)
