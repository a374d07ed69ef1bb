"""Pictures about the codes of a tokenizer, as PNG bytes; their captions are in ``beitctl.report.codes``.

Arrays are named as in ``beitctl.report.code_numbers``: n pictures of N = grid * grid patches, K codes.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageDraw

from beitctl.errors import DataError
from beitctl.report import figures
from beitctl.report.code_numbers import checked, checked_labels, neighbours, spread, usage_of
from beitctl.report.figures import Row, Tile

Array = np.ndarray[Any, Any]
Window = tuple[int, Array]
"""A step, and the uses (K,) of every code since the window before."""

TILE_PX = 84
COMMON, RARE = 12, 8
PATCHES = 8
RARE_USES = 4
"""Uses that a code must have to be shown as a rare one, where there are such: of fewer little can be seen."""
BANDS = 128
MAX_WINDOWS = 200
UNUSED = "#d9d9d9"
SCALE = ("1/16 or less", "1/8", "1/4", "1/2", "even", "2 times", "4 times", "8 times", "16 or more")
FRAME = "#E69F00"
QUERIES = 6
MAPS = 4
MAP_IN, BELOW_IN = 1.12, 2.7
"""Height of a row of maps, and of the histogram below them, in inches."""
VEIL = 0.65
"""How much of a map's colour covers the picture below it."""


def checked_views(views: Array, patches: int) -> tuple[Array, int]:
    """Pictures (m, 3, h, h) uint8 and the number of patches along a side.

    Raises:
        DataError: not of this shape or type, or they do not divide into ``patches`` squares.
    """
    found = np.asarray(views)
    grid = round(patches**0.5)
    if grid * grid != patches:
        raise DataError(f"codes: {patches} for each picture; expected a square number, such as 196")
    if found.ndim != 4 or found.shape[1] != 3 or found.dtype != np.uint8 or not len(found):
        raise DataError(
            f"views: shape {found.shape} of {found.dtype}; expected (pictures, 3, side, side) of uint8, "
            "at least one"
        )
    if found.shape[2] != found.shape[3] or not found.shape[2] or found.shape[2] % grid:
        raise DataError(
            f"views: {found.shape[2]} x {found.shape[3]} pixels; expected squares with a side that is a "
            f"multiple of {grid}, because there are {grid} x {grid} codes"
        )
    return found, grid


def usage_over_time(windows: Sequence[Window], size: int) -> bytes:
    """Used share and perplexity over steps, beside sorted usage by window; see ``codes.TIME_CAPTION``.

    Args:
        windows: (step, uses (K,)) in any order; of equal steps the last counts. At most 200 are drawn,
            evenly spread, with the last.
        size: K.

    Raises:
        DataError: there is no window, or one has not K counts.
    """
    by_step = {int(step): np.asarray(counts, dtype=np.float64) for step, counts in windows}
    wrong = next((counts for counts in by_step.values() if counts.shape != (size,)), None)
    if not by_step or wrong is not None:
        found = "none" if wrong is None else f"counts of shape {wrong.shape}"
        raise DataError(f"windows of codebook usage: found {found}; expected ({size},) counts of each")
    steps = sorted(by_step)
    steps = [steps[-1 - place] for place in spread(len(steps), MAX_WINDOWS)[::-1]]
    figure = Figure(figsize=(8.2, 3.4), dpi=120, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    _shares(left, steps, [usage_of(by_step[step]) for step in steps], size)
    _bands(figure, right, steps, np.stack([_banded(by_step[step], size) for step in steps], axis=1))
    return figures.png(figure)


def _shares(axes: Axes, steps: Sequence[int], used: Sequence[dict[str, Any]], size: int) -> None:
    one = len(steps) <= 30
    line: dict[str, Any] = {"marker": "o", "markersize": 4 if one else 0, "linewidth": 1.8}
    axes.plot(steps, [u["used_share"] for u in used], color=figures.BLUE, label="codes in use", **line)
    even = [u["perplexity"] / size for u in used]
    axes.plot(steps, even, color=figures.RED, linestyle="--", label="perplexity", **line)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(f"How many of the {size:,} codes are used", fontsize=10, loc="left", color=figures.INK)
    axes.set_xlabel("step")
    axes.set_ylabel("share of all codes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e3e3e3", linewidth=0.7)
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.legend(frameon=False, loc="best")


def _banded(counts: Array, size: int) -> Array:
    """Sorted uses in at most 128 bands, as multiples of even use; NaN where a band is not used."""
    bands = min(size, BANDS)
    ordered = np.sort(counts)[::-1]
    edges = np.arange(bands) * size // bands
    means = np.add.reduceat(ordered, edges) / np.diff([*edges, size])
    return np.where(means > 0, means / max(counts.mean(), 1e-300), np.nan)


def _bands(figure: Figure, axes: Axes, steps: Sequence[int], bands: Array) -> None:
    levels = np.array([0, *2.0 ** np.arange(-3.5, 4), 2.0**4.5])
    norm = BoundaryNorm(levels.tolist(), 256, extend="neither")
    axes.set_facecolor(UNUSED)
    edges = np.linspace(1, 0, len(bands) + 1)
    bands = np.minimum(bands, 2.0**4.4)
    shades = axes.pcolormesh(_edges(steps), edges, bands, cmap="viridis_r", norm=norm, rasterized=True)
    bar = figure.colorbar(shades, ax=axes, ticks=(levels[1:] + levels[:-1]) / 2, spacing="uniform")
    bar.ax.set_yticklabels(SCALE, fontsize=8)
    bar.ax.tick_params(length=0)
    bar.set_label("uses, compared with even use", fontsize=9)
    axes.set_title("How often each code is used", fontsize=10, loc="left", color=figures.INK)
    axes.set_xlabel("step")
    axes.set_ylabel("codes, least used to most used")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.legend(
        handles=[Patch(facecolor=UNUSED, label="never used")], loc="lower right", fontsize=8, framealpha=0.9
    )


def _edges(steps: Sequence[int]) -> Array:
    """Limits of columns: a window reaches from the one before to its own step."""
    first = steps[0] - (steps[1] - steps[0]) if len(steps) > 1 else steps[0] - max(steps[0], 1)
    return np.array([first, *steps], dtype=np.float64)


def gallery(
    views: Array, codes: Array, near: Array, size: int, labels: Array | None = None,
    names: Sequence[str] | None = None,
) -> bytes:  # fmt: skip
    """Patches closest to the most used codes and to some rare ones; see ``codes.PATCHES_CAPTION``.

    Args:
        views: (m, 3, h, h) uint8: the first m <= n pictures, of which patches are shown.
        codes: (n, N).
        near: (n, N) closeness of each patch to its code: larger is closer; NaN is last.
        size: K.
        labels: (n,) class numbers, -1 for none; then a row says its most frequent class.
        names: Names of the classes.

    Raises:
        DataError: shapes or values do not fit.
    """
    codes = checked(codes, size)
    views, grid = checked_views(views, codes.shape[1])
    labels = None if labels is None else checked_labels(labels, len(codes))
    near = np.asarray(near, dtype=np.float64)
    if near.shape != codes.shape or len(views) > len(codes):
        raise DataError(
            f"{len(views)} views, codes of shape {codes.shape} and closeness of shape {near.shape} do not "
            "belong together; expected one code and one closeness for each patch"
        )
    counts = np.bincount(codes.ravel(), minlength=size)
    shown, near = codes[: len(views)], np.where(np.isnan(near), -np.inf, near)[: len(views)]
    common, rare = _choose(counts, np.bincount(shown.ravel(), minlength=size))
    rows = []
    for heading, chosen in (("The most used codes", common), ("Rarely used codes", rare)):
        for place, code in enumerate(chosen):
            said = f"code {code}: {counts[code]:,} {'use' if counts[code] == 1 else 'uses'}"
            said += _often(codes, labels, names, code)
            tiles = [_patch(views[p], q, grid) for p, q in _closest(shown, near, code)]
            rows.append(
                Row([Tile(None, said), *(Tile(tile) for tile in tiles)], heading if place == 0 else "")
            )
    return figures.gallery(rows, tile_px=TILE_PX)


def _choose(counts: Array, seen: Array) -> tuple[Array, Array]:
    """The most used codes, and rare ones; only codes that occur in the views."""
    order = np.lexsort((np.arange(len(counts)), -counts))
    order = order[seen[order] > 0]
    common, rest = order[:COMMON], order[COMMON:]
    enough = rest[counts[rest] >= RARE_USES]
    return common, (enough if len(enough) >= RARE else rest)[-RARE:]


def _often(codes: Array, labels: Array | None, names: Sequence[str] | None, code: int) -> str:
    """The class that most of a code's patches come from."""
    if labels is None:
        return ""
    of = np.repeat(labels, (codes == code).sum(1))
    found, uses = np.unique(of[of >= 0], return_counts=True)
    if not len(found):
        return ""
    label = int(found[uses.argmax()])
    return f" ({uses.max() / uses.sum():.0%} {label if names is None else names[label]})"


def _closest(codes: Array, near: Array, code: int) -> list[tuple[int, int]]:
    """(picture, patch) closest to a code: one of each picture first, then others."""
    pictures, patches = np.nonzero(codes == code)
    order = np.argsort(-near[pictures, patches], kind="stable")
    _, first = np.unique(pictures[order], return_index=True)
    again = np.ones(len(order), dtype=bool)
    again[first] = False
    order = order[np.argsort(again, kind="stable")][:PATCHES]
    return [(int(pictures[k]), int(patches[k])) for k in order]


def _patch(view: Array, place: int, grid: int) -> Array:
    """A patch, framed, with half a patch around it; grey beyond the picture's border."""
    side = view.shape[1] // grid
    margin = max(side // 2, 1)
    padded = np.pad(view, ((0, 0), (margin, margin), (margin, margin)), constant_values=235)
    y, x = (k * side for k in divmod(place, grid))
    cut = padded[:, y : y + side + 2 * margin, x : x + side + 2 * margin].transpose(1, 2, 0)
    zoom = TILE_PX / cut.shape[0]
    image = Image.fromarray(np.ascontiguousarray(cut)).resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    low, high = round(margin * zoom), round((margin + side) * zoom)
    draw.rectangle((low - 3, low - 3, high + 2, high + 2), outline="#000000", width=1)
    draw.rectangle((low - 2, low - 2, high + 1, high + 1), outline=FRAME, width=2)
    return np.asarray(image)


def similarity_maps(views: Array, cosine: Array) -> bytes:
    """Where reconstructed and true features of the teacher agree; see ``codes.MAPS_CAPTION``.

    Args:
        views: (m, 3, h, h) uint8, m from that of ``cosine``; those beyond are not used.
        cosine: (m, grid, grid) from -1 to 1.

    Raises:
        DataError: shapes do not fit, or a cosine is not finite.
    """
    cosine = np.asarray(cosine, dtype=np.float64)
    if cosine.ndim != 3 or cosine.shape[1] != cosine.shape[2] or not cosine.size or len(cosine) > len(views):
        raise DataError(
            f"cosine: shape {cosine.shape} for {len(views)} views; expected (pictures, grid, grid)"
        )
    if not np.isfinite(cosine).all():
        raise DataError(
            f"cosine: {int((~np.isfinite(cosine)).sum())} of {cosine.size} values are not finite; the "
            "tokenizer or its teacher gives NaN"
        )
    cosine = np.clip(cosine, -1, 1)  # rounding may exceed 1
    views, _ = checked_views(views, cosine.shape[1] * cosine.shape[2])
    means = cosine.mean((1, 2))
    order = np.argsort(means, kind="stable")
    groups = {"rebuilt worst": order[:MAPS]}
    if len(order) >= 3 * MAPS:
        middle = len(order) // 2 - MAPS // 2
        groups["in the middle"] = order[middle : middle + MAPS]
        groups["rebuilt best"] = order[-MAPS:]
    low = max(np.floor(np.quantile(cosine, 0.02) * 10) / 10, -1.0)
    high = min(np.ceil(np.quantile(cosine, 0.98) * 10) / 10, 1.0)
    norm = Normalize(low, high if high > low else low + 0.1)
    # places are set by hand: a layout engine takes seconds for so many axes
    maps = MAP_IN * len(groups)
    height = maps + BELOW_IN
    figure = Figure(figsize=(8.2, height), dpi=120, facecolor="white")
    grid = figure.add_gridspec(
        len(groups), 2 * MAPS, left=0.03, right=0.88, bottom=BELOW_IN / height, top=1 - 0.2 / height,
        wspace=0.06, hspace=0.12,
    )  # fmt: skip
    for row, (name, chosen) in enumerate(groups.items()):
        axes = [figure.add_subplot(grid[row, column]) for column in range(2 * MAPS)]
        _maps(axes, name, [(views[k], cosine[k]) for k in chosen], norm)
    bar = figure.add_axes((0.91, (BELOW_IN + 0.1) / height, 0.018, (maps - 0.5) / height))
    figure.colorbar(ScalarMappable(norm, _veiled()), bar, label="cosine of a patch", extend="both")
    bar.tick_params(labelsize=8)
    below = (0.1, 0.48 / height, 0.78, (BELOW_IN - 0.95) / height)
    _cosines(figure.add_axes(below), cosine.ravel())
    return figures.png(figure, photos=True)


def _maps(row: Sequence[Axes], name: str, shown: Sequence[tuple[Array, Array]], norm: Normalize) -> None:
    for axes in row:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    row[0].set_ylabel(name, fontsize=9, fontweight="bold")
    for number, (view, cosine) in enumerate(shown):
        row[2 * number].imshow(view.transpose(1, 2, 0))
        row[2 * number + 1].imshow(_covered(view, cosine, norm))
        row[2 * number + 1].set_title(f"mean {cosine.mean():.2f}", fontsize=8, pad=2)


def _veiled() -> ListedColormap:
    """The colours of the map as they look over a middle grey."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))[:, :3]
    return ListedColormap(VEIL * colours + (1 - VEIL) * 0.5)


def _covered(view: Array, cosine: Array, norm: Normalize) -> Array:
    """A grey picture under the colours of its cosines, which on average keep their meaning."""
    side = view.shape[1] // len(cosine)
    grey = np.asarray(Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0))).convert("L")) / 255
    colours = np.asarray(_veiled()(norm(cosine)))[..., :3].repeat(side, 0).repeat(side, 1)
    return np.clip(colours + (1 - VEIL) * 0.7 * (grey[..., None] - 0.5), 0, 1)


def _cosines(axes: Axes, values: Array) -> None:
    low = min(float(np.floor(values.min() * 10) / 10), 0.0)
    axes.hist(values, bins=np.linspace(low, 1, 61).tolist(), color=figures.BLUE, alpha=0.75)
    mean = float(values.mean())
    axes.axvline(mean, color=figures.RED, linestyle="--", linewidth=1.6, label=f"mean {mean:.3f}")
    below = float((values < 0.5).mean())
    axes.set_title(
        f"All {values.size:,} patches: mean {mean:.3f}, {below:.1%} of them below 0.5",
        fontsize=10, loc="left", color=figures.INK,
    )  # fmt: skip
    axes.set_xlim(low, 1)
    axes.set_xlabel("cosine of rebuilt and true features (1 is the same)")
    axes.set_ylabel("patches")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.legend(frameon=False, loc="upper left")


def nearest(
    views: Array, codes: Array, size: int, labels: Array | None = None, names: Sequence[str] | None = None
) -> bytes:
    """Pictures with the five whose codes are most alike; see ``codes.NEAREST_CAPTION``.

    Args:
        views: (m, 3, h, h) uint8: the first m <= n pictures, which are compared.
        codes: (n, N).
        size: K.
        labels: (n,) class numbers, -1 for none; then rows start in different classes.
        names: Names of the classes.

    Raises:
        DataError: shapes or values do not fit.
    """
    codes = checked(codes, size)
    views, _ = checked_views(views, codes.shape[1])
    if len(views) > len(codes):
        raise DataError(f"{len(views)} views but codes of {len(codes)} pictures; expected codes of all")
    known = None if labels is None else checked_labels(labels, len(codes))[: len(views)]
    codes = codes[: len(views)]
    order = np.arange(len(views)) if known is None else np.argsort(known, kind="stable")
    if known is not None and (known >= 0).any():
        order = order[known[order] >= 0]
    step = len(order) / min(QUERIES, len(order))
    queries = order[[int((k + 0.5) * step) for k in range(min(QUERIES, len(order)))]]
    found, alike = neighbours(codes, size, queries)
    rows = []
    for query, others, likeness in zip(queries, found, alike, strict=True):
        tiles = [Tile(_picture(views[query]), _name(known, names, query))]
        for other, value in zip(others, likeness, strict=True):
            said = f"{value:.2f} {_name(known, names, other)}"
            tiles.append(Tile(_picture(views[other]), said, _frame(known, query, other)))
        rows.append(Row(tiles))
    return figures.gallery(rows, ("picture", "most similar", "2nd", "3rd", "4th", "5th"), tile_px=112)


def _picture(view: Array) -> Array:
    return view.transpose(1, 2, 0)


def _name(labels: Array | None, names: Sequence[str] | None, picture: int) -> str:
    if labels is None or labels[picture] < 0:
        return ""
    return str(labels[picture]) if names is None else names[labels[picture]]


def _frame(labels: Array | None, query: int, other: int) -> Any:
    if labels is None or labels[query] < 0 or labels[other] < 0:
        return None
    return "right" if labels[query] == labels[other] else "wrong"
