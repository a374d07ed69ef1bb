"""The charts of a report: which numbers of a run are drawn together, and how each chart is explained."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beitctl.report import figures
from beitctl.report.progress import number
from beitctl.report.tables import MEANINGS, Table, mapping, real, tables, whole

MAX_PICTURE_BYTES = 6_500_000  # base64 makes it 8.7 MB; a page stays under 10
MAX_SMALL_CHARTS = 16

CHART_TITLES = {
    "lr": "Learning rate",
    "grad_norm": "Length of the gradient",
    "samples_per_s": "Speed in examples a second",
    "data_wait": "Share of time spent waiting for data",
    "tflops_per_gpu": "Useful work of a GPU in TFLOP/s",
    "mfu": "Share of the nominal peak of the GPU (MFU)",
    "mfu_of_measured": "Share of the measured peak of the GPU",
    "memory_gib": "Memory of the GPU in GiB",
}
"""Titles of charts by metric; ``MEANINGS`` explains them."""
LOSS_CAPTION = (
    "Each line is one training objective. The loss says how wrong the model's predictions are: a line that "
    "falls means that it learns, a level one that it does not, a jump upwards that training became unstable."
)
ACCURACY_CAPTION = (
    "Each line is one training objective: the share of predictions that are right, from 0 to 1. "
    "A line that rises means that the model learns."
)
BASELINES = (
    " A dotted line is what always giving the most frequent answer would reach: what has to be beaten."
)

Series = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Picture:
    """A picture in the page; ``link`` stands in where embedding it would make the page too large."""

    title: str
    caption: str
    alt: str
    src: str | None = None
    link: str | None = None


@dataclass
class Room:
    """How many bytes of pictures the page still takes."""

    left: int = MAX_PICTURE_BYTES

    def embed(self, png: bytes) -> str | None:
        """The picture as a data URI; None if it is no PNG or too large for what is left."""
        if not png.startswith(b"\x89PNG\r\n\x1a\n") or len(png) > self.left:
            return None
        self.left -= len(png)
        return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def collect(records: Iterable[Mapping[str, Any]]) -> Series:
    """Values over steps by metric, from records that have a step; what is no number is left out."""
    found: Series = {}
    for record in records:
        step = whole(record.get("step"))
        for name, value in _flat(mapping(record.get("metrics"))):
            point = real(value)
            if step is not None and point is not None:
                found.setdefault(name, []).append((step, point))
    return found


def restarts(records: Iterable[Mapping[str, Any]]) -> list[int]:
    """First step after every start but the first."""
    found: list[int] = []
    starts, due = 0, False
    for record in records:
        if record["event"] == "start":
            starts += 1
            due = starts > 1
        step = whole(record.get("step"))
        if due and record["event"] == "step" and step is not None:
            found.append(step)
            due = False
    return found


def training(
    series: Series, metrics: Mapping[str, Any], restarts: Sequence[int], room: Room
) -> list[Picture]:
    """Losses in one chart, accuracies in another with the baselines that ``metrics`` has for them."""
    charts = []
    losses = _ending(series, "loss")
    if losses:
        title = "Loss per objective (lower is better)"
        png = figures.curves(losses, "", "loss", restarts=restarts)
        charts.append(_chart(png, title, LOSS_CAPTION, losses, room))
    accuracies = _ending(series, "accuracy")
    if accuracies:
        title = "Accuracy per objective (higher is better)"
        reference = {
            f"{name}: most frequent answer": value
            for name, value in _baselines(metrics)
            if name in accuracies
        }
        png = figures.curves(accuracies, "", "share of right answers", reference, restarts)
        caption = ACCURACY_CAPTION + (BASELINES if reference else "")
        charts.append(_chart(png, title, caption, accuracies, room))
    return charts


def _ending(series: Series, name: str) -> Series:
    return {key.removesuffix(f"/{name}"): points for key, points in series.items() if key.endswith(name)}


def _baselines(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, group in metrics.items():
        if isinstance(group, Mapping):
            value = real(group.get("baseline_accuracy"))
            found += [(name, value)] if value is not None else _baselines(group)
    return found


def others(series: Series, restarts: Sequence[int], room: Room) -> list[Picture]:
    """A chart for every metric that is neither a loss nor an accuracy, well-known ones first.

    The work of a GPU is left out where there was none: its memory is measured on GPUs alone.
    """
    hidden = () if any(name.endswith("memory_gib") for name in series) else ("tflops_per_gpu",)
    rest = [name for name in series if not name.endswith(("loss", "accuracy", *hidden))]
    rest.sort(key=lambda name: (list(CHART_TITLES).index(name) if name in CHART_TITLES else 99, name))
    charts = []
    for name in rest[:MAX_SMALL_CHARTS]:
        title = CHART_TITLES.get(name, name)
        caption = MEANINGS.get(name.rpartition("/")[2], "")
        png = figures.curves({name: series[name]}, "", name, restarts=restarts, small=True)
        charts.append(_chart(png, title, caption, {name: series[name]}, room))
    return charts


def evaluations(
    records: Sequence[dict[str, Any]], restarts: Sequence[int], room: Room
) -> tuple[list[Picture], list[Table]]:
    """A chart of every metric that was evaluated at several steps, and tables of the last values."""
    by_metric: dict[str, Series] = {}
    last: dict[str, Any] = {}
    for record in records:
        name = str(record.get("name", "evaluation"))
        last[name] = mapping(record.get("metrics"))
        for key, points in collect([record]).items():
            by_metric.setdefault(key, {}).setdefault(name, []).extend(points)
    charts = []
    for key, lines in list(by_metric.items())[:MAX_SMALL_CHARTS]:
        if max(map(len, lines.values())) > 1:
            meaning = MEANINGS.get(key.rpartition("/")[2], "")
            title = f"Evaluation: {key}"
            caption = f"Measured on data that are not trained on, while training goes on. {meaning}"
            charts.append(
                _chart(figures.curves(lines, "", key, restarts=restarts), title, caption, lines, room)
            )
    return charts, tables(last, "Last evaluation") if last else []


def _chart(png: bytes, title: str, caption: str, lines: Series, room: Room) -> Picture:
    spans = [
        f"{name} from {number(points[0][1])} to {number(points[-1][1])} at step {points[-1][0]}"
        for name, points in lines.items()
    ]
    return Picture(title, caption.strip(), f"Chart. {title}: {'; '.join(spans)}.", room.embed(png))


def _flat(metrics: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", item) for inner, item in _flat(value))
        else:
            yield name, value
