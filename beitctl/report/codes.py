"""What the report shows of an image tokenizer: is its codebook alive, and do its codes mean anything?

``tell`` writes everything that its inputs allow. The numbers are made in ``code_numbers``, the pictures in
``code_figures``: numpy, scipy and matplotlib, no torch. The same inputs give the same page.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from beitctl.errors import DataError
from beitctl.report import code_figures, figures
from beitctl.report.code_figures import Array, Window
from beitctl.report.code_numbers import (
    SHUFFLES,
    TYPICAL_PICTURES,
    checked,
    checked_labels,
    mutual_information,
    same_label,
    typical,
    usage,
)

if TYPE_CHECKING:
    from beitctl.api import Log

MOST_NEAREST_VIEWS = 4096
"""Pictures among which the neighbours that are shown are looked for."""
STEEP = 20
"""Times even use that the most used code may have before the histogram becomes logarithmic."""
HISTOGRAM_CAPTION = (
    "Good: a level line or a gentle slope that reaches far to the right. Bad: a steep peak and then "
    "nothing; codes to the right of where the bars end are wasted. Where there are not many more patches "
    "than codes, some must stay without use."
)
TIME_CAPTION = (
    "Left: as training goes on, the share of all codes that occur at all (solid), and the perplexity as a "
    "share of all codes (dashed): how many codes there would be if those in use were used alike. Both "
    "should rise towards 100 % and stay there. A dashed line far below the solid one means that a few "
    "codes do most of the work; a line that falls, that codes die. Right: every column is a stretch of "
    "training, with all codes stacked in it from the most used (top) to the least used (bottom). The "
    "colour of 'even' from top to bottom is good: all codes work alike. Dark at the top and yellow below is "
    "a codebook in which few codes do most of the work; grey are codes that were never used in that "
    "stretch, and are wasted."
)
PATCHES_CAPTION = (
    "A tokenizer turns every small square of a picture, a patch, into one of a fixed number of codes. Each "
    "row is one code with the patches that match it best (framed, with some of what surrounds them; light "
    "grey is beyond the edge), from different pictures where possible. Good: within a row the framed "
    "squares have something in common, such as an edge, an eye, a texture or a kind of thing, and rows "
    "differ from one another. Bad: a row without anything in common, or several rows that show the same."
)
CLASS_CAPTION = (
    " In brackets: the class of picture that most of the code's patches come from, and their share. It says "
    "something only where it is well above the share of that class in all pictures."
)
MAPS_CAPTION = (
    "The tokenizer is trained to rebuild, from the codes alone, what a trained network (the teacher) says "
    "about each patch. Beside every picture, the colour of a patch says how alike the two are: a cosine of "
    "1 is the same, 0 is unrelated. Yellow is rebuilt well, dark purple badly: such patches are what the "
    "codes cannot express. The colour scale is fitted to these pictures; to compare runs, use the numbers. "
    "The bars count the patches of all pictures. Good: most bars far to the right."
)
NEAREST_CAPTION = (
    "Pictures compared by their codes alone: which codes a picture has and how often, no matter where. "
    "First in every row is a picture, then the five most similar among all others, with the likeness from "
    "0 to 1. Good: the neighbours show similar things. Bad: the same few pictures in every row, or "
    "neighbours that share nothing but brightness."
)
FRAMES_CAPTION = (
    " A green frame with a tick marks a neighbour of the same class, a red one with a cross another class."
)
COLUMNS = ("what", "value", "what it says")


def tell(  # noqa: PLR0913 - one argument per thing that can be shown
    log: "Log", *, views: Array, codes: Array, near: Array, size: int, cosine: Array | None = None,
    labels: Array | None = None, names: Sequence[str] | None = None, windows: Sequence[Window] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Write figures and tables about a tokenizer's codes to the log.

    Args:
        log: where to write.
        views: (m, 3, h, h) uint8: the first m <= n pictures.
        codes: (n, N) one code for each patch; N = grid * grid.
        near: (n, N) closeness of each patch to its code: larger is closer.
        size: K, number of codes of the codebook.
        cosine: (c, grid, grid) between rebuilt and true teacher features of the first c <= m pictures.
        labels: (n,) class numbers, -1 for pictures without.
        names: names of the classes.
        windows: (step, uses (K,)) during training.

    Returns:
        ``codebook_used``, ``used_share``, ``codebook_perplexity``, ``top_share`` (see
        ``code_numbers.usage_of``), ``codebook_entropy`` (nats); ``teacher_cosine`` (mean) with ``cosine``;
        with at least two classes among the labels also what ``code_numbers.mutual_information`` and
        ``code_numbers.same_label`` give.

    Raises:
        DataError: an array is empty, of a wrong shape, or holds values that cannot be.
    """
    codes = checked(codes, size)
    labels, names = _classes(labels, names, len(codes))
    found = _usage(log, codes, size, windows)
    caption = PATCHES_CAPTION + (CLASS_CAPTION if labels is not None else "")
    png = code_figures.gallery(views, codes, near, size, labels, names)
    log.figure("code-patches", png, "What the codes stand for", caption)
    if cosine is not None:
        png = code_figures.similarity_maps(views, cosine)
        log.figure("code-similarity", png, "How well the teacher is rebuilt", MAPS_CAPTION)
        found["teacher_cosine"] = float(np.mean(cosine))
    if len(views) > 1:
        caption = NEAREST_CAPTION + (FRAMES_CAPTION if labels is not None else "")
        png = code_figures.nearest(views[:MOST_NEAREST_VIEWS], codes, size, labels, names)
        log.figure("code-nearest", png, "Pictures with similar codes", caption)
    if labels is not None and len(np.unique(labels[labels >= 0])) > 1:
        found |= _meaning(log, codes, labels, size, names)
    return found


def _classes(
    labels: Array | None, names: Sequence[str] | None, pictures: int
) -> tuple[Array | None, Sequence[str] | None]:
    """Checked labels, None where no picture has one, and the names of the classes if there are any."""
    if labels is None:
        return None, None
    labels = checked_labels(labels, pictures)
    if int(labels.max()) < 0:
        return None, None
    if names is not None and int(labels.max()) >= len(names):
        raise DataError(f"labels: found class {int(labels.max())}, but there are {len(names)} names")
    return labels, names


def _usage(log: "Log", codes: Array, size: int, windows: Sequence[Window] | None) -> dict[str, float]:
    used = usage(codes, size)
    steep = used["top_share"] * size > STEEP
    png = figures.histogram(
        used["counts"], "", "code", y_label="uses (logarithmic)" if steep else "uses", log_y=steep
    )
    caption = (
        f"The {size:,} codes, most used first, and how many of {codes.size:,} patches in {len(codes):,} "
        f"pictures have each. {used['used']:,} codes occur ({used['used_share']:.1%}); the most used "
        f"takes {used['top_share']:.1%} of all patches. "
    )
    log.figure("code-histogram", png, "How often each code is used", caption + HISTOGRAM_CAPTION)
    if windows:
        png = code_figures.usage_over_time(windows, size)
        log.figure("code-usage", png, "Use of the codes during training", TIME_CAPTION)
    return {
        "codebook_used": float(used["used"]),
        "used_share": used["used_share"],
        "codebook_perplexity": used["perplexity"],
        "top_share": used["top_share"],
        "codebook_entropy": used["entropy"],
    }


def _meaning(
    log: "Log", codes: Array, labels: Array, size: int, names: Sequence[str] | None
) -> dict[str, float]:
    known, near = mutual_information(codes, labels, size), same_label(codes, labels, size)
    log.table(
        "code-meaning", "What the codes know about the class of a picture", COLUMNS, _explained(known, near)
    )
    log.table(
        "code-classes",
        "Codes that speak for a class: how many times as frequent as elsewhere "
        f"(codes in at least {TYPICAL_PICTURES} of its pictures)",
        ("class", "pictures", "codes"),
        typical(codes, labels, size, names),
    )
    return {**known, **near}


def _explained(known: Mapping[str, float], near: Mapping[str, float]) -> list[list[object]]:
    return [
        [
            "mutual information of code and class", known["mutual_information"],
            "How much the code of one single patch tells about the class of its picture, in nats.",
        ],
        [
            "the same by chance",
            f"{known['mutual_information_chance']:.4g} ± {known['mutual_information_chance_sd']:.1g}",
            f"After the labels were shuffled among the pictures, {SHUFFLES} times. It is not 0, because a "
            "rare code seems to know the class of the few pictures it is in: more codes or fewer pictures "
            "raise it.",
        ],
        [
            "above chance", known["mutual_information_above_chance"],
            "The honest part. Compare tokenizers by this number, on the same pictures; higher is better.",
        ],
        [
            "entropy of the class", known["label_entropy"],
            "The most that could be known. A single patch seldom shows what the whole picture is, so a small "
            "part of this is normal.",
        ],
        [
            "nearest picture has the same class", near["nearest_same_label"],
            "Share of the pictures whose most similar other picture, by codes alone, is of the same class. "
            "Higher is better.",
        ],
        [
            "the same by chance", near["nearest_chance"],
            "With another picture drawn at random: what has to be beaten.",
        ],
        [
            "pictures with a label", int(known["labelled"]),
            f"Of {int(known['classes'])} classes. "
            f"{int(known['unlabelled'])} pictures without a label are left out.",
        ],
    ]  # fmt: skip
