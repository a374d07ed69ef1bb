"""``beitctl data peek``: a contact sheet of some examples."""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from beitctl.api import Example, Examples
from beitctl.data.images import Pictures
from beitctl.data.order import generator
from beitctl.errors import DataError
from beitctl.inspecting.checking import spread_over
from beitctl.inspecting.looking import Seen, read, reason
from beitctl.inspecting.ordered import in_order
from beitctl.report.figures import Row, Tile, gallery
from beitctl.report.naming import printable

TILE_PX = 160
GAP_PX = 4
"""White between the two pictures of one example."""
ID_CHARACTERS = 28
TEXT_CHARACTERS = 400


def sheet(examples: Examples, title: str, *, count: int = 24, seed: int | None = None) -> bytes:
    """A PNG with examples in rows: picture, id, class and first caption.

    Args:
        examples: an opened source.
        title: what is written above.
        count: how many, at most.
        seed: of the random choice; None spreads them evenly.

    Raises:
        DataError: none of them can be read.
    """
    indices = chosen(len(examples), count, seed)
    how = "evenly spread" if seed is None else f"chosen at random (seed {seed})"
    some = f"{len(indices):,} of {len(examples):,} examples, {how}" if len(indices) < len(examples) else ""
    one = functools.partial(_tile, examples, pictures=Pictures())
    found = list(in_order(one, indices, 2))
    if not any(good for _, good in found):
        first = f": {found[0][0].caption}" if found else ""
        raise DataError(f"{title}: none of {len(found)} examples can be read{first}")
    tiles = [tile for tile, _ in found]
    columns, side = _grid(len(tiles))
    rows = [Row(tiles[first : first + columns]) for first in range(0, len(tiles), columns)]
    heading = f"{printable(title, 90)}: {some or f'all {len(indices):,} examples'}"
    return gallery([Row(rows[0].tiles, heading), *rows[1:]], tile_px=side)


def chosen(total: int, count: int, seed: int | None) -> Sequence[int]:
    """Indices of examples in order: evenly spread, or random ones, each once."""
    if seed is None or count >= total:
        return spread_over(total, count)
    places: list[int] = np.sort(generator(seed, "peek").choice(total, count, replace=False)).tolist()
    return places


def _grid(count: int) -> tuple[int, int]:
    """Columns, and side of a tile in pixels: many are small, as a sheet has 400 kB at most."""
    if count <= 24:
        return 6, TILE_PX
    return (8, 112) if count <= 60 else (12, 80)


def _tile(examples: Examples, index: int, pictures: Pictures) -> tuple[Tile, bool]:
    """An example as a tile, and whether it could be read."""
    example = read(examples, index)
    if isinstance(example, Seen):
        return Tile(caption=f"{printable(example.id)} · {printable(example.reason)}", frame="wrong"), False
    images = [image for image in (example.image, example.second) if image is not None]
    name = printable(example.id, ID_CHARACTERS)
    if not images:
        return Tile(caption=_words(name, example)), True
    shown = []
    for image in images:
        try:
            shown.append(_small(pictures.open(image, example.id).pil()))
        except DataError as error:
            why = printable(reason(error, example.id, image))
            return Tile(caption=f"{name} · {why}", frame="wrong"), False
    return Tile(np.asarray(_beside(shown)), _words(name, example)), True


def _words(name: str, example: Example) -> str:
    """What stands below a picture."""
    parts = [name, example.label, *example.captions[:1], example.text]
    if example.answers:
        known = [answer for answer in example.answers if answer.strip()]
        parts.append(max(known, key=known.count, default=None))
    if example.objects:
        parts.append(", ".join(thing.label for thing in example.objects))
    return printable(" · ".join(part[:TEXT_CHARACTERS] for part in parts if part))


def _small(picture: Image.Image) -> Image.Image:
    """A picture that is not much larger than a tile."""
    copy = picture.copy()
    copy.thumbnail((2 * TILE_PX, 2 * TILE_PX))
    return copy


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side on white."""
    if len(pictures) == 1:
        return pictures[0]
    width = sum(picture.width for picture in pictures) + GAP_PX * (len(pictures) - 1)
    whole = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + GAP_PX
    return whole
