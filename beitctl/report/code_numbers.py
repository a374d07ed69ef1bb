"""Numbers about the codes of a tokenizer: how they are used, and what they say about the class of a picture.

Codes are (n, N) integers: one code from 0 to K - 1 for each of N patches of n pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from beitctl.errors import DataError

SHUFFLES = 20
TYPICAL = 5
TYPICAL_PICTURES = 3
"""Pictures of a class that a code must be in before it counts as typical: one picture proves nothing."""
MOST_COMPARED = 10_000
"""Pictures that are compared with one another at most."""
BLOCK = 256
TIE = 1e-5
SPARSE_COST = 100
"""Time of a multiplication of sparse rows, in those of a dense product (measured: 95 to 175, at most 440)."""
DENSE_CELLS = 60_000_000

Array = np.ndarray[Any, Any]


def checked(codes: Array, size: int) -> Array:
    """The codes as an (n, N) int64 array.

    Raises:
        DataError: they are no such array, are none at all, or one lies outside 0 .. ``size`` - 1.
    """
    found = np.asarray(codes)
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
        raise DataError(
            f"codes: shape {found.shape} of {found.dtype}; expected (pictures, patches) of whole numbers"
        )
    if not found.size:
        raise DataError(f"codes: shape {found.shape} holds no code; at least one picture is needed")
    low, high = int(found.min()), int(found.max())
    if low < 0 or high >= size:
        raise DataError(
            f"codes: found {low if low < 0 else high}, but a codebook of {size} has 0 to {size - 1}; "
            "were these codes made by another tokenizer?"
        )
    return found.astype(np.int64, copy=False)


def checked_labels(labels: Array, pictures: int) -> Array:
    """Class numbers (n,) int64, -1 where a picture has none.

    Raises:
        DataError: there is not one whole number from -1 for each picture.
    """
    found = np.asarray(labels)
    if found.shape != (pictures,) or not np.issubdtype(found.dtype, np.integer):
        raise DataError(
            f"labels: shape {found.shape} of {found.dtype}; expected one whole number for each of "
            f"{pictures} pictures, -1 where there is none"
        )
    if int(found.min()) < -1:
        raise DataError(f"labels: found {int(found.min())}; expected a class from 0, or -1 for none")
    return found.astype(np.int64, copy=False)


def usage(codes: Array, size: int) -> dict[str, Any]:
    """How evenly K = ``size`` codes are used; see ``usage_of``.

    Raises:
        DataError: codes as of ``checked``.
    """
    return usage_of(np.bincount(checked(codes, size).ravel(), minlength=size))


def usage_of(counts: Array) -> dict[str, Any]:
    """How evenly codes are used, from the uses (K,) of each.

    Returns:
        ``used`` (number of codes), ``used_share``, ``perplexity`` (exp of the entropy; from 0 where nothing
        is used to K where all codes are used alike), ``top_share`` (share of the most used code in all
        uses), ``entropy`` (nats), and ``counts`` (K,) as given.

    Raises:
        DataError: ``counts`` are not (K,) finite numbers from 0.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or not counts.size or not np.isfinite(counts).all() or counts.min() < 0:
        raise DataError(f"counts of codes: shape {counts.shape}; expected (codes,) finite numbers from 0")
    total, used = float(counts.sum()), int((counts > 0).sum())
    shares = counts[counts > 0] / total if used else np.zeros(0)
    entropy = max(0.0, float(-(shares * np.log(shares)).sum()))
    return {
        "used": used,
        "used_share": used / counts.size,
        "perplexity": float(np.exp(entropy)) if used else 0.0,
        "top_share": float(shares.max()) if used else 0.0,
        "entropy": entropy,
        "counts": counts,
    }


def mutual_information(
    codes: Array, labels: Array, size: int, *, shuffles: int = SHUFFLES, seed: int = 0
) -> dict[str, float]:
    """What the code of a single patch tells about the class of its picture, in nats over patches.

    Counting alone makes this larger than zero, the more so the more codes and the fewer pictures there are:
    a code that occurs once always "knows" its class. So the same is computed after the labels have been
    shuffled among pictures (not patches: those of one picture belong together), where codes can say nothing.
    What exceeds the mean of the shuffles is the honest part. It errs on the low side where codes say nearly
    all: there counting adds less than in a shuffle.

    Args:
        codes: (n, N).
        labels: (n,) class numbers; pictures with -1 are left out and counted.
        size: K.
        shuffles: How often to shuffle.
        seed: Seed of the shuffles.

    Returns:
        ``mutual_information`` I, ``label_entropy`` H (the most that I can be), ``mutual_information_share``
        I / H (0 with one class), ``mutual_information_chance`` and ``mutual_information_chance_sd`` (mean and
        deviation of the shuffles), ``mutual_information_above_chance`` (I less that mean), ``classes``,
        ``labelled`` and ``unlabelled`` (pictures). All are 0 where no picture has a label.

    Raises:
        DataError: as of ``checked`` and ``checked_labels``.
    """
    codes = checked(codes, size)
    labels = checked_labels(labels, len(codes))
    known = labels >= 0
    classes, of = np.unique(labels[known], return_inverse=True)
    bags = bag(codes[known], size)
    counts = np.bincount(of) if len(of) else np.zeros(0)
    entropy = usage_of(counts)["entropy"] if len(of) else 0.0
    information = _information(bags, of)
    draw = np.random.default_rng(seed)
    chance = [_information(bags, draw.permutation(of)) for _ in range(shuffles)] or [0.0]
    return {
        "mutual_information": information,
        "label_entropy": entropy,
        "mutual_information_share": information / entropy if entropy else 0.0,
        "mutual_information_chance": float(np.mean(chance)),
        "mutual_information_chance_sd": float(np.std(chance)),
        "mutual_information_above_chance": information - float(np.mean(chance)),
        "classes": float(len(classes)),
        "labelled": float(known.sum()),
        "unlabelled": float((~known).sum()),
    }


def bag(codes: Array, size: int) -> Any:
    """How often each picture (n, N) uses each code: a sparse (n, K) matrix."""
    rows = np.repeat(np.arange(len(codes)), codes.shape[1])
    return csr_matrix((np.ones(codes.size), (rows, codes.ravel())), shape=(len(codes), size))


def by_class(bags: Any, of: Array) -> Any:
    """Sums of the rows of ``bags`` by class: a sparse (classes, K) matrix."""
    pictures = len(of)
    members = csr_matrix(
        (np.ones(pictures), of, np.arange(pictures + 1)), shape=(pictures, int(of.max(initial=-1)) + 1)
    )
    return (members.T @ bags).tocsr()


def _information(bags: Any, of: Array) -> float:
    if not len(of):
        return 0.0
    table = by_class(bags, of)
    cells, total = table.data, table.data.sum()
    rows, columns = np.asarray(table.sum(1)).ravel(), np.asarray(table.sum(0)).ravel()
    return max(float(_xlogx(cells) + _xlogx(total) - _xlogx(rows) - _xlogx(columns)) / float(total), 0.0)


def _xlogx(counts: Array) -> float:
    return float((counts * np.log(np.maximum(counts, 1))).sum())


def typical(codes: Array, labels: Array, size: int, names: Sequence[str] | None = None) -> list[list[Any]]:
    """The codes that speak most for each class: largest pointwise mutual information of code and class.

    Only codes in at least three pictures of the class count.

    Args:
        codes: (n, N).
        labels: (n,) class numbers, -1 for none.
        size: K.
        names: Names of the classes; their numbers without.

    Returns:
        Rows for a table: class, its pictures, and "17 (6.2×), ...": the code is 6.2 times as frequent in
        the class as in all labelled pictures.

    Raises:
        DataError: as of ``checked`` and ``checked_labels``; a class has no name.
    """
    codes = checked(codes, size)
    labels = checked_labels(labels, len(codes))
    if names is not None and int(labels.max()) >= len(names):
        raise DataError(f"labels: found class {int(labels.max())}, but there are {len(names)} names")
    known = labels >= 0
    classes, of = np.unique(labels[known], return_inverse=True)
    if not len(classes):
        return []
    bags = bag(codes[known], size)
    table, pictures = by_class(bags, of), by_class(bags.sign(), of)
    overall = np.asarray(table.sum(0)).ravel() / table.sum()
    rows: list[list[Any]] = []
    for number, label in enumerate(classes.tolist()):
        uses, within = table[number], pictures[number].toarray().ravel()
        places = uses.indices[within[uses.indices] >= TYPICAL_PICTURES]
        shares = uses.toarray().ravel()[places] / uses.sum()
        times = shares / overall[places]
        order = np.lexsort((places, -shares, -times))[:TYPICAL]
        said = ", ".join(f"{places[k]} ({times[k]:.1f}×)" for k in order if times[k] > 1)
        name = str(label) if names is None else names[label]
        rows.append([name, int((of == number).sum()), said or "–"])
    return rows


def likeness(bags: Any) -> Callable[[Array], Array]:
    """Compares pictures by the codes they use: cosine of tf-idf vectors, place and order of patches ignored.

    Codes that most pictures have weigh less: ln((1 + n) / (1 + pictures with it)) + 1.

    Args:
        bags: (n, K) uses, sparse, as of ``bag``.

    Returns:
        A function from the numbers (m,) of pictures to (m, n) cosines from 0 to 1.
    """
    pictures = bags.shape[0]
    having = np.bincount(bags.indices, minlength=bags.shape[1])
    scaled = bags.multiply(np.log((1 + pictures) / (1 + having)) + 1).tocsr()[:, having > 0]
    lengths = np.sqrt(np.asarray(scaled.multiply(scaled).sum(1)).ravel())
    scaled.data = (scaled.data / np.repeat(lengths, np.diff(scaled.indptr))).astype(np.float32)
    steps = float((having.astype(np.float64) ** 2).sum())
    if scaled.shape[0] * scaled.shape[1] <= min(DENSE_CELLS, SPARSE_COST * steps / pictures):
        scaled = scaled.toarray()
    turned = scaled.T if isinstance(scaled, np.ndarray) else scaled.T.tocsr()

    def compare(places: Array) -> Array:
        product = scaled[places] @ turned
        return product if isinstance(product, np.ndarray) else product.toarray()

    return compare


def spread(pictures: int, most: int) -> Array:
    """Numbers of at most ``most`` pictures, evenly spread."""
    return np.arange(pictures) if pictures <= most else np.arange(most) * pictures // most


def neighbours(codes: Array, size: int, queries: Array, count: int = 5) -> tuple[Array, Array]:
    """The pictures whose codes are most like those of ``queries``, themselves left out.

    Args:
        codes: (n, N).
        size: K.
        queries: (q,) numbers of pictures.
        count: Neighbours of each, fewer where there are fewer pictures.

    Returns:
        Numbers (q, count) of pictures, and their likeness, most alike first; of equals the first.
    """
    alike = likeness(bag(checked(codes, size), size))(queries)
    alike[np.arange(len(queries)), queries] = -1
    order = np.argsort(-alike, axis=1, kind="stable")[:, : min(count, len(codes) - 1)]
    return order, np.take_along_axis(alike, order, axis=1)


def same_label(codes: Array, labels: Array, size: int) -> dict[str, float]:
    """How often the picture with the most similar codes has the same label.

    Of several that are equally near, each counts in part. At most 10,000 labelled pictures, evenly spread,
    are compared with one another.

    Returns:
        ``nearest_same_label`` (share), ``nearest_chance`` (the same for a partner drawn at random, that is
        the sum of the squared shares of the classes, the picture itself excluded), ``nearest_pictures``.
        Both shares are 0 with fewer than two labelled pictures.

    Raises:
        DataError: as of ``checked`` and ``checked_labels``.
    """
    codes = checked(codes, size)
    labels = checked_labels(labels, len(codes))
    known = np.flatnonzero(labels >= 0)
    known = known[spread(len(known), MOST_COMPARED)]
    pictures = len(known)
    if pictures < 2:
        return {"nearest_same_label": 0.0, "nearest_chance": 0.0, "nearest_pictures": float(pictures)}
    _, of, counts = np.unique(labels[known], return_inverse=True, return_counts=True)
    compare = likeness(bag(codes[known], size))
    right = sum(_right(compare(places), places, of) for places in _blocks(pictures))
    return {
        "nearest_same_label": right / pictures,
        "nearest_chance": float((counts * (counts - 1)).sum() / (pictures * (pictures - 1))),
        "nearest_pictures": float(pictures),
    }


def _blocks(pictures: int) -> Iterator[Array]:
    for start in range(0, pictures, BLOCK):
        yield np.arange(start, min(start + BLOCK, pictures))


def _right(alike: Array, places: Array, of: Array) -> float:
    alike[np.arange(len(places)), places] = -1
    tied = alike >= alike.max(1, keepdims=True) - TIE
    same = of[places][:, None] == of[None, :]
    return float(((tied & same).sum(1) / tied.sum(1)).sum())
