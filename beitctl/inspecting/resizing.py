"""An example as a shard holds it: its picture upright, in RGB, small, as a JPEG."""

import io
from pathlib import Path

from PIL import Image

from beitctl.api import Example, Examples
from beitctl.data.images import FAULTS, ORIENTATION, Pictures
from beitctl.errors import DataError, UserError
from beitctl.inspecting.looking import Seen, content, header, read, reason
from beitctl.inspecting.shards import Ready
from beitctl.report.naming import printable

LONGEST_SIDE = 65_500
"""Of a JPEG, in pixels."""


def prepare(
    examples: Examples, index: int, *, px: int, quality: int, pictures: Pictures, words_only: bool
) -> Ready | Seen:
    """An example ready to be written, or why it is broken.

    Args:
        examples: an opened source.
        index: which example.
        px: larger pictures are shrunk until their short side has so many pixels.
        quality: of JPEG.
        pictures: decodes.
        words_only: whether examples without a picture can be written.

    Raises:
        ChangedError: the data are not any more what was opened.
        UserError: the example has parts that a shard cannot hold.
    """
    example = read(examples, index)
    if isinstance(example, Seen):
        return example
    _refuse_lost(example, words_only)
    if example.image is None:
        return Ready(example.id, None, example.captions, example.label, example.text)
    try:
        image, copied = _shrunk(example.image, example.id, px, quality, pictures)
    except DataError as error:
        return Seen(index, example.id, reason=reason(error, example.id, example.image))
    return Ready(example.id, image, example.captions, example.label, example.text, copied)


def _refuse_lost(example: Example, words_only: bool) -> None:
    """Refuse an example that would lose something."""
    parts = {
        "a second picture": example.second is not None,
        "answers": bool(example.answers),
        "a segmentation": example.segmentation is not None,
        "packed tokens": example.token_ids is not None or bool(example.caption_ids),
        "objects": bool(example.objects),
    }
    shown = printable(example.id)
    lost = [name for name, there in parts.items() if there]
    if lost:
        raise UserError(
            f"{shown}: has {' and '.join(lost)}, which a pack has no place for (it has a picture, "
            "captions, a label and text); train from the source as it is"
        )
    if example.image is None and not words_only:
        raise UserError(
            f"{shown}: has no picture, and --format tar is made of pictures; use --format parquet"
        )


def _shrunk(image: bytes | Path, id: str, px: int, quality: int, pictures: Pictures) -> tuple[bytes, bool]:
    """A picture as JPEG, and whether it is as it was; it is decoded in any case, to see that it is whole."""
    encoded = content(image, id)
    picture = pictures.open(encoded, id).pil()
    short = min(picture.size)
    if short <= px and _plain(encoded):
        return encoded, True
    if short > px:
        scale = px / short
        width, height = (max(px, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    if max(picture.size) > LONGEST_SIDE:
        raise DataError(f"{id}: a side of {max(picture.size):,} pixels, more than a JPEG can have")
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue(), False


def _plain(encoded: bytes) -> bool:
    """Whether a readable picture is an upright JPEG in RGB."""
    try:
        with header(encoded) as found:
            upright = found.getexif().get(ORIENTATION, 1) not in range(2, 9)
            return found.format == "JPEG" and found.mode == "RGB" and upright
    except FAULTS:
        return False
