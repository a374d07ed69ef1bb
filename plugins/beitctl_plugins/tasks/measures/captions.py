"""CIDEr-D, BLEU and ROUGE-L of captions that were cut into words, as COCO's evaluation defines them.

Sources: Vedantam et al., arXiv:1411.5726 (CIDEr-D); Papineni et al., ACL 2002 (BLEU); Lin, 2004 (ROUGE-L);
their constants as in coco-caption (arXiv:1504.00325).

Letters: n candidates, each with several references.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]
LONGEST = 4
"""Words of the longest n-grams."""
SIGMA = 6.0
"""Width of CIDEr-D's penalty for lengths that differ."""
BETA = 1.2
"""Weight of recall in ROUGE-L."""
TINY, SMALL = 1e-15, 1e-9
"""What coco-caption adds to counts of BLEU, so that nothing is divided by 0."""


def grams(words: Words) -> Grams:
    """How often each n-gram of up to four words occurs."""
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, LONGEST + 1)
        for start in range(len(words) - size + 1)
    )


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> NDArray[np.float64]:
    """(n,) CIDEr-D of each candidate, 0 to 10; their mean is the score of the corpus.

    n-grams weigh the more the fewer candidates have them in their references; with one candidate all weigh
    nothing, and the score is 0.

    Raises:
        ValueError: a candidate has no reference, or the numbers differ.
    """
    _check(candidates, references)
    counted = [[grams(words) for words in several] for several in references]
    frequency: Counter[tuple[str, ...]] = Counter()
    for several in counted:
        frequency.update({gram for found in several for gram in found})
    total = math.log(len(candidates))

    def vector(found: Grams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Weights of n-grams by n, their norms, and the number of pairs of words."""
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, times in found.items():
            parts[len(gram) - 1][gram] = times * (total - math.log(max(1.0, frequency[gram])))
        norms = [math.sqrt(sum(value * value for value in part.values())) for part in parts]
        return parts, norms, sum(times for gram, times in found.items() if len(gram) == 2)

    scores = []
    for words, several in zip(candidates, counted, strict=True):
        mine, norms, length = vector(grams(words))
        likeness = 0.0
        for found in several:
            theirs, their_norms, their_length = vector(found)
            penalty = math.exp(-((length - their_length) ** 2) / (2 * SIGMA**2))
            for own, other, norm, other_norm in zip(mine, theirs, norms, their_norms, strict=True):
                if norm and other_norm:
                    shared = sum(
                        min(v, other[gram]) * other[gram] for gram, v in own.items() if gram in other
                    )
                    likeness += penalty * shared / (norm * other_norm)
        scores.append(10 * likeness / LONGEST / len(several))
    return np.array(scores)


def bleu(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]]
) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of all candidates together, 0 to 1, against the reference of the closest length.

    Raises:
        ValueError: a candidate has no reference, or the numbers differ.
    """
    _check(candidates, references)
    right, said = [0] * LONGEST, [0] * LONGEST
    length = closest = 0
    for words, several in zip(candidates, references, strict=True):
        length += len(words)
        closest += min((abs(len(other) - len(words)), len(other)) for other in several)[1]
        most: Grams = Counter()
        for other in several:
            most |= grams(other)
        for gram, times in grams(words).items():
            said[len(gram) - 1] += times
            right[len(gram) - 1] += min(times, most[gram])
    ratio = (length + TINY) / (closest + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    found, product = [], 1.0
    for order in range(LONGEST):
        product *= (right[order] + TINY) / (said[order] + SMALL)
        found.append(penalty * product ** (1 / (order + 1)))
    return found[0], found[1], found[2], found[3]


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> NDArray[np.float64]:
    """(n,) ROUGE-L of each candidate, 0 to 1: best precision and best recall over its references.

    Raises:
        ValueError: a candidate has no reference, or the numbers differ.
    """
    _check(candidates, references)
    scores = []
    for words, several in zip(candidates, references, strict=True):
        common = [_subsequence(words, other) for other in several]
        precision = max(common) / max(1, len(words))
        recall = max(found / max(1, len(other)) for found, other in zip(common, several, strict=True))
        both = precision and recall
        scores.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if both else 0.0)
    return np.array(scores)


def _subsequence(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def _check(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if len(candidates) != len(references) or not all(references) or not candidates:
        raise ValueError(
            f"{len(candidates)} candidates and {len(references)} sets of references, "
            f"{sum(not several for several in references)} of them empty: each needs at least one"
        )
