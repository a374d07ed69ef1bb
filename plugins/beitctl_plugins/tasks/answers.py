"""Answers to questions about pictures: how they are made alike, what they teach, how they are scored.

Sources: the evaluation code of visualqa.org (GT-Vision-Lab/VQA, v2) and BEiT-3's data code, quirks included:
the same normalisation chose the 3,129 answers that released heads know.

An answer that is blank as given counts as a person whose answer is not known: it equals none. So an index
that holds scores in place of people can be filled up to ten.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from beitctl.api import Example, Examples
from beitctl.errors import ChangedError, DataError

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")
"""As published: what was meant as "no digit before" asks for the letters ``<=``, and so says nothing."""
MOST_PERIODS = int(re.UNICODE)
"""As published: a flag stands where the number of replacements belongs."""
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
SHORT = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's they'd "
    "they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't "
    "would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
"""Short forms that are mended where one of their apostrophes is missing."""
MENDED = {
    word[:place] + word[place + 1 :]: word
    for word in SHORT.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}

FEW = 4
"""With fewer answers no rule of VQA v2 can reach 1; then the share of the answers counts."""
SOFT = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Target of an answer that so many people gave; more are like the last."""
NUMBER = re.compile(r"\d+(?:\.\d+)?")

Question = tuple[str | int, ...]
"""Words or ids of a question."""


@functools.lru_cache(maxsize=2**16)
def normalised(answer: str) -> str:
    """An answer in the form in which answers are compared: lower case, digits, no articles or punctuation."""
    text = answer
    for mark in PUNCTUATION:
        apart = f"{mark} " in answer or f" {mark}" in answer or DIGITS_COMMA.search(answer)
        text = text.replace(mark, "" if apart else " ")
    text = PERIOD.sub("", text, count=MOST_PERIODS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def _cleaned(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def agreed(answers: Sequence[str]) -> str | None:
    """The answer that most people gave, normalised; of equals the first. None if none is known."""
    counted = Counter(answer for answer in answers if answer.strip())
    return normalised(counted.most_common(1)[0][0]) if counted else None


def score(predicted: str, answers: Sequence[str]) -> float:
    """Official score of an answer: min(1, equal ones / 3), averaged over all ways to leave one person out.

    As published, both sides are normalised unless all people said the same. With fewer than four answers:
    the share that equals it, all normalised.
    """
    given, said = [_cleaned(answer) for answer in answers], _cleaned(predicted)
    if len(given) < FEW or len(set(given)) > 1:
        said = normalised(said)
        equal = sum(bool(answer) and normalised(answer) == said for answer in given)
    else:
        equal = sum(bool(answer) and answer == said for answer in given)
    if len(given) < FEW:
        return equal / len(given) if given else 0.0
    others = len(given) - equal
    return (equal * min(1.0, (equal - 1) / 3) + others * min(1.0, equal / 3)) / len(given)


def targets(
    answers: Sequence[str], numbers: Mapping[str, int], *, alike: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What the answers to a question teach: numbers of answers, and the score of each in 0..1.

    Args:
        answers: as people gave them.
        numbers: the vocabulary, normalised.
        alike: whether answers are normalised before they are looked up; the released code does not.

    Returns:
        (k,) int64 and (k,) float32; k is 0 where no answer is in the vocabulary.
    """
    counted = Counter(normalised(answer) if alike else answer for answer in answers if answer.strip())
    found = {numbers[answer]: count for answer, count in counted.items() if answer in numbers}
    few = len(answers) < FEW
    values = [count / len(answers) if few else SOFT[min(count, len(SOFT) - 1)] for count in found.values()]
    return np.array(list(found), np.int64), np.array(values, np.float32)


def kind(answer: str) -> str:
    """Kind of a normalised answer: ``yes_no``, ``number`` or ``other``."""
    if answer in ("yes", "no"):
        return "yes_no"
    return "number" if NUMBER.fullmatch(answer) else "other"


def readable(examples: Examples) -> Iterator[tuple[int, Example | None]]:
    """Index and example of all there are; None in place of one that cannot be used.

    Raises:
        ChangedError: the data are not any more what was opened.
    """
    for index in range(len(examples)):
        try:
            yield index, examples[index]
        except ChangedError:
            raise
        except DataError:
            yield index, None


def frequent(examples: Examples, least: int) -> tuple[str, ...]:
    """The answers that most people gave to at least ``least`` questions, by their first appearance."""
    counted = Counter(
        answer
        for _, example in readable(examples)
        if example is not None and (answer := agreed(example.answers)) is not None
    )
    return tuple(answer for answer, count in counted.items() if count >= least)


def read_vocabulary(file: Path) -> tuple[str, ...]:
    """The answers of BEiT-3's ``answer2label.txt``: a JSON object with ``answer`` and ``label`` on each line.

    Raises:
        DataError: it cannot be read, a label is not the number of its line, or an answer stands in it twice.
    """
    found: dict[str, int] = {}
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); correct answer_file") from error
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            answer, label = row["answer"], int(row["label"])
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise DataError(
                f'{file}:{number + 1}: expected {{"answer": "yes", "label": {number}}}, found {line[:80]!r}'
            ) from error
        if not isinstance(answer, str) or label != number:
            raise DataError(f"{file}:{number + 1}: labels must count lines from 0, found {line[:80]!r}")
        if answer in found:
            raise DataError(f"{file}:{number + 1}: {answer!r} stands in line {found[answer] + 1} already")
        found[answer] = number
    return tuple(found)


def question(example: Example) -> Question:
    """The words of a question in lower case without its question mark, or its ids."""
    if example.text:
        return tuple(example.text.lower().replace("?", " ").split())
    return tuple(int(number) for number in (() if example.token_ids is None else example.token_ids))


class QuestionOnly:
    """What to answer without looking: the most frequent answer to the same question in training.

    For a question that was not asked there: to those with the same first three, two or one words, else to
    all of them.
    """

    def __init__(self, asked: Iterable[tuple[Question, str]]) -> None:
        """Learn from questions and the answer that most people gave to each."""
        self._known: dict[tuple[int, Question], Counter[str]] = {}
        for words, answer in asked:
            for key in self._keys(words):
                self._known.setdefault(key, Counter())[answer] += 1

    @staticmethod
    def _keys(words: Question) -> list[tuple[int, Question]]:
        return [(-1, words), *((length, words[:length]) for length in (3, 2, 1)), (0, ())]

    def __call__(self, words: Question) -> str:
        """The answer to a question; empty if there was nothing to learn from."""
        for key in self._keys(words):
            if key in self._known:
                return self._known[key].most_common(1)[0][0]
        return ""
