"""Charts and picture grids as PNG bytes: light background, colours that colour-blind readers can tell apart.

Colours: Okabe and Ito's palette, with line styles and marks beside them, so that colour never stands alone.
"""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
PALETTE = (BLUE, RED, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#333333")
STYLES = ("-", "--", "-.", ":")
INK, FAINT = "#222222", "#999999"
WIDE, SMALL = (7.6, 3.3), (4.6, 2.5)
MAX_BYTES = 400_000
DRAWABLE = 1e100
MAX_BARS = 2000  # more are narrower than a pixel, and take seconds
UNSMOOTHED = 100
LABELLED_CLASSES = 40
COUNTED_CLASSES = 15

FRAMES = {"right": (GREEN, "✓"), "wrong": (RED, "✗")}
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
FONT_PX, GAP, FRAME = 13, 10, 4
CAPTION_LINES = 8


@dataclass(frozen=True)
class Tile:
    """One cell of a gallery: a picture, or a piece of text where ``image`` is None."""

    image: "np.ndarray[Any, Any] | None" = None
    """(H, W, 3) uint8."""
    caption: str = ""
    frame: Literal["right", "wrong"] | None = None
    """Draws a green frame and a tick, or a red one and a cross."""


@dataclass(frozen=True)
class Row:
    """One row of a gallery."""

    tiles: Sequence[Tile] = field(default_factory=tuple)
    title: str = ""
    """Written above the row, such as the text that was searched for."""


def curves(
    series: Mapping[str, Sequence[tuple[int, float]]],
    title: str,
    y_label: str,
    reference: Mapping[str, float] | None = None,
    restarts: Sequence[int] = (),
    *,
    small: bool = False,
) -> bytes:
    """Lines over steps; long ones as a faint line with its moving average.

    Args:
        series: Points (step, value) by name; values that are not finite leave a gap.
        title: Says what is shown, and whether lower or higher is better.
        y_label: Quantity and unit.
        reference: Values to compare with by name, drawn as level dotted lines; in the
            colour of the line whose name theirs begins with.
        restarts: Steps after which the run went on from a checkpoint, drawn as upright lines.
        small: Half the width, no legend, and zero in view unless there are negative values.
    """
    figure, axes = chart(title, "step", y_label, SMALL if small else WIDE)
    for number, (name, points) in enumerate(series.items()):
        _curve(axes, name, points, PALETTE[number % len(PALETTE)], STYLES[number // len(PALETTE) % 4])
    colours = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(series)}
    for name, value in (reference or {}).items():
        colour = next((colours[line] for line in colours if name.startswith(line)), FAINT)
        axes.axhline(value, color=colour, linestyle=(0, (1, 2)), linewidth=1.4, label=name)
    for step in restarts:
        axes.axvline(step, color=FAINT, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5 if small else 8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    if small and 0 <= axes.dataLim.ymin <= axes.dataLim.ymax:
        axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    if len(handles) > 1 and not small:
        legend = axes.legend(handles, names, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for text in legend.get_texts():
            text.set_parse_math(False)
    return png(figure)


def histogram(
    counts: "np.ndarray[Any, Any]", title: str, x_label: str, *, y_label: str = "uses", log_y: bool = False
) -> bytes:
    """How often each of N things occurs, most frequent first.

    Args:
        counts: (N,) numbers of uses, in any order.
        title: Says what is shown.
        x_label: What is counted, such as "code".
        y_label: Unit of the counts.
        log_y: Whether the counts are on a logarithmic axis.
    """
    ordered = np.sort(np.asarray(counts, dtype=np.float64).ravel())[::-1]
    figure, axes = chart(title, f"{x_label}, most frequent first", y_label)
    used = int((ordered > 0).sum())
    if ordered.size:
        edges = np.linspace(0, ordered.size, min(ordered.size, MAX_BARS) + 1).astype(int)
        axes.stairs(
            ordered[edges[:-1]],
            edges,
            fill=True,
            color=BLUE,
            alpha=0.75,
            label=f"{used:,} of {ordered.size:,} used",
        )
        axes.axhline(ordered.mean(), color=RED, linestyle="--", linewidth=1.4, label="if all were used alike")
        axes.set_xlim(0, ordered.size)
        axes.legend(frameon=False, loc="upper right")
    if log_y and used:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=max(ordered[ordered > 0].min() / 2, 1e-12))
    else:
        axes.set_ylim(bottom=0)
    return png(figure)


def matrix(values: "np.ndarray[Any, Any]", labels: Sequence[str], title: str) -> bytes:
    """Confusion matrix: rows are the true classes, columns the predicted ones, shaded by share of the row.

    Args:
        values: (C, C) counts.
        labels: C names; left out beside more classes than fit.
        title: Says what is shown.

    Raises:
        ValueError: ``values`` is not square, or there is not one label for each row.
    """
    counts = np.asarray(values, dtype=np.float64)
    if counts.shape != (len(labels), len(labels)):
        raise ValueError(
            f"values have shape {counts.shape}, expected {(len(labels), len(labels))}: one row a label"
        )
    side = min(max(4.0, 1.8 + 0.45 * len(labels)), 9.0)
    figure, axes = chart(title, "predicted class", "true class", size=(side + 1.2, side))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    if len(labels) <= LABELLED_CLASSES:
        names = [textwrap.shorten(name, 24, placeholder="…") or "(none)" for name in labels]
        places = range(len(labels))
        axes.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(places, names, parse_math=False)
    if len(labels) <= COUNTED_CLASSES:
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, f"{count:g}", ha="center", va="center", color=ink, fontsize=8)
    return png(figure)


def gallery(rows: Sequence[Row], columns: Sequence[str] = (), *, tile_px: int = 128) -> bytes:
    """Grid of pictures and texts: captions below, frames for right and wrong, titles above columns and rows.

    Pictures keep their shape; small ones are enlarged without smoothing. If the PNG would be larger than
    400 kB, it is reduced to 256 colours and then to smaller tiles.
    """
    while True:
        sheet = _sheet(rows, columns, tile_px)
        data = encode(sheet)
        if len(data) > MAX_BYTES:
            data = encode(sheet.quantize(256, dither=Image.Dither.NONE))
        if len(data) <= MAX_BYTES or tile_px <= 32:
            return data
        tile_px = max(tile_px * 4 // 5, 32)


def chart(title: str, x_label: str, y_label: str, size: tuple[float, float] = WIDE) -> tuple[Figure, Axes]:
    """An empty chart in the style of all charts; ``size`` is in inches."""
    figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    # names come from data: a dollar sign in them is no formula
    axes.set_title(textwrap.fill(title, 90), fontsize=11, loc="left", color=INK, parse_math=False)
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_ylabel(y_label, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    return figure, axes


def _curve(axes: Axes, name: str, points: Sequence[tuple[int, float]], colour: str, style: str) -> None:
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([value for _, value in points], dtype=np.float64)
    values[~(np.abs(values) < DRAWABLE)] = np.nan
    line: dict[str, Any] = {"color": colour, "linestyle": style, "label": textwrap.shorten(name, 40)}
    if len(values) <= UNSMOOTHED:
        axes.plot(steps, values, marker="o", markersize=4 if len(values) <= 30 else 0, linewidth=1.6, **line)
        return
    width = len(values) // 50
    kernel = np.ones(width)
    finite = np.isfinite(values)
    weights = np.convolve(finite, kernel, mode="same")
    sums = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    smooth = np.divide(sums, weights, out=np.full_like(sums, np.nan), where=weights > 0.5)
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(steps, smooth, linewidth=1.8, **line)


def png(figure: Figure, *, photos: bool = False) -> bytes:
    """A chart as PNG in 256 colours; with ``photos`` in all colours if that stays below 400 kB."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in a script that has no font
        figure.savefig(buffer, format="png")
    image = Image.open(buffer).convert("RGB")
    if photos and len(data := encode(image)) <= MAX_BYTES:
        return data
    return encode(image.quantize(256, dither=Image.Dither.NONE))


def encode(image: Image.Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _font(bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONTS / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), FONT_PX)


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont, lines: int = CAPTION_LINES) -> list[str]:
    """Lines of at most ``width`` pixels; words too long for one are broken, text too long is cut."""
    found = [""]
    for word in text.split():
        joined = f"{found[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            found[-1] = joined
            continue
        found += [""] if found[-1] else []
        for letter in word:
            if font.getlength(found[-1] + letter) > width:
                found.append("")
            found[-1] += letter
    if len(found) > lines:
        found = found[:lines]
        found[-1] = found[-1][:-1] + "…"
    return found if found[0] else []


def _sheet(rows: Sequence[Row], columns: Sequence[str], tile_px: int) -> Image.Image:
    font, bold = _font(), _font(bold=True)
    line_px = FONT_PX + 4
    count = max([len(row.tiles) for row in rows] + [len(columns), 1])
    pitch = tile_px + 2 * FRAME + GAP
    width = GAP + count * pitch
    heads = [_wrap(name, tile_px, bold, 2) for name in columns]
    top = GAP + line_px * max((len(head) for head in heads), default=0)
    places = []  # row, its title's lines, top
    for row in rows:
        title = _wrap(row.title, width - 2 * GAP, bold, 3)
        places.append((row, title, top))
        below = max((len(_below(tile, tile_px, font)) for tile in row.tiles), default=0)
        cell = max((_cell_height(tile, tile_px, font, line_px) for tile in row.tiles), default=0)
        top += line_px * (len(title) + below) + cell + 2 * FRAME + GAP + (4 if title else 0)
    sheet = Image.new("RGB", (width, top), "white")
    draw = ImageDraw.Draw(sheet)
    for number, head in enumerate(heads):
        _write(draw, head, (GAP + FRAME + number * pitch, GAP // 2), bold)
    for row, title, y in places:
        _write(draw, title, (GAP, y), bold)
        for number, tile in enumerate(row.tiles):
            _paste(
                sheet, tile, (GAP + number * pitch, y + line_px * len(title) + (4 if title else 0)), tile_px
            )
    return sheet


def _below(tile: Tile, tile_px: int, font: ImageFont.FreeTypeFont) -> list[str]:
    return [] if tile.image is None else _wrap(tile.caption, tile_px, font)


def _cell_height(tile: Tile, tile_px: int, font: ImageFont.FreeTypeFont, line_px: int) -> int:
    if tile.image is not None:
        return tile_px
    mark = FONT_PX if tile.frame else 0
    return line_px * len(_wrap(tile.caption, tile_px - 8, font)) + mark + 8


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], at: tuple[int, int], font: ImageFont.FreeTypeFont
) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * (FONT_PX + 4)), line, fill=INK, font=font)


def _paste(sheet: Image.Image, tile: Tile, at: tuple[int, int], tile_px: int) -> None:
    draw = ImageDraw.Draw(sheet)
    font = _font()
    x, y = at[0] + FRAME, at[1] + FRAME
    if tile.image is None:
        height = _cell_height(tile, tile_px, font, FONT_PX + 4)
        draw.rectangle((x, y, x + tile_px - 1, y + height - 1), fill="#f3f3f3")
        _write(draw, _wrap(tile.caption, tile_px - 8, font), (x + 4, y + 4), font)
    else:
        height = tile_px
        picture = _fit(tile.image, tile_px)
        sheet.paste(picture, (x + (tile_px - picture.width) // 2, y + (tile_px - picture.height) // 2))
        _write(draw, _below(tile, tile_px, font), (x, y + tile_px + FRAME + 1), font)
    if tile.frame:
        colour, mark = FRAMES[tile.frame]
        box = (x - FRAME, y - FRAME, x + tile_px + FRAME - 1, y + height + FRAME - 1)
        draw.rectangle(box, outline=colour, width=FRAME)
        badge = FONT_PX + 6
        draw.rectangle((box[2] - badge, box[3] - badge, box[2], box[3]), fill=colour)
        draw.text(
            (box[2] - badge / 2, box[3] - badge / 2), mark, fill="white", font=_font(bold=True), anchor="mm"
        )


def _fit(image: "np.ndarray[Any, Any]", tile_px: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image))
    scale = tile_px / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC)
