"""Answers of VQA v2: normalisation, targets, the official score, vocabularies, what a question alone tells.

Reference values were recorded from the evaluation code of visualqa.org (GT-Vision-Lab/VQA, commit a013f00).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from small import Given

from beitctl.api import Example
from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.tasks import answers

NORMALISED = [
    ("The Red Dog", "red dog"),
    ("two", "2"),
    ("None", "0"),
    ("ten dogs", "10 dogs"),
    ("a", ""),
    ("U.S.A.", "usa"),
    ("3.5", "3.5"),
    ("5.", "5"),
    ("1,000", "1000"),
    ("1, 000 cows", "1 000 cows"),
    ("x-ray", "x ray"),
    ("t - shirt", "t shirt"),
    ("black/white", "black white"),
    ("dont", "don't"),
    ("couldn'tve", "couldn't've"),
    ("couldntve", "couldntve"),
    ("somebody'd", "somebodyd"),
    ("shes", "shes"),
    ("yall", "y'all"),
    ("what?", "what"),
    ("(left)", "left"),
    ("c++", "c"),
    ("12:30", "12:30"),
    ("red,green", "red green"),
    ("red, green, blue", "red green blue"),
    ("\\", ""),
    ("." * 40, "." * 8),
]
SCORES = [
    ("yes", ["yes"] * 10, 1.0),
    ("yes", ["yes"] * 3 + ["no"] * 7, 0.9),
    ("yes", ["yes"] * 2 + ["no"] * 8, 0.6),
    ("yes", ["yes"] + ["no"] * 9, 0.3),
    ("yes", ["no"] * 10, 0.0),
    ("2", ["two"] * 10, 0.0),
    ("2", ["two"] * 9 + ["3"], 1.0),
    ("dog", ["the dog"] * 4 + ["Dog."] * 4 + ["cat"] * 2, 1.0),
    ("yes", [" yes\n"] * 10, 1.0),
    ("Yes", ["yes"] * 10, 0.0),
    ("Yes", ["yes"] * 9 + ["no"], 1.0),
    ("xray", ["x-ray"] * 5 + ["x ray"] * 5, 0.0),
    ("x ray", ["x-ray"] * 5 + ["xray"] * 5, 1.0),
]
NUMBERS = {"yes": 0, "no": 1, "2": 2, "dog": 3}


@pytest.mark.parametrize(("given", "expected"), NORMALISED)
def test_an_answer_is_normalised_as_by_the_official_code(given, expected):
    assert answers.normalised(given) == expected


@pytest.mark.parametrize(("said", "given", "expected"), SCORES)
def test_a_score_equals_that_of_the_official_code(said, given, expected):
    assert answers.score(said, given) == pytest.approx(expected, abs=1e-9)


def test_the_mean_score_of_two_hundred_questions_equals_the_recorded_one():
    draw = np.random.default_rng(5)
    words = [
        "yes", "no", "two", "2", "the dog", "dog", "x-ray", "x ray", "dont", "don't", "1,000", "1000",
    ]  # fmt: skip
    found = []
    for _ in range(200):
        pool = draw.choice(len(words), 3)
        given = [words[pool[i]] for i in draw.integers(3, size=10)]
        found.append(answers.score(words[pool[draw.integers(3)]], given))
    assert np.mean(found) == pytest.approx(0.84, abs=1e-9)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(("red",), 1.0), (("The Red",), 1.0), (("red", "blue"), 0.5), (("red", "red", "blue"), 2 / 3), ((), 0)],
)
def test_of_fewer_than_four_answers_the_share_counts(given, expected):
    assert answers.score("red", given) == pytest.approx(expected)


def test_a_blank_answer_is_somebody_whose_answer_is_not_known():
    given = ("red", *[""] * 9)
    assert answers.score("red", given) == pytest.approx(0.3)
    assert answers.score("", given) == 0
    assert answers.agreed(given) == "red"
    assert answers.agreed(("", " ")) is None


@pytest.mark.parametrize(("count", "value"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_targets_grow_with_the_people_who_agree(count, value):
    found, values = answers.targets(("yes",) * count + ("no",) * (10 - count), NUMBERS)
    assert dict(zip(found.tolist(), values.tolist(), strict=True))[0] == pytest.approx(value)
    assert (found.dtype, values.dtype) == (np.int64, np.float32)


def test_a_single_answer_is_wholly_right():
    found, values = answers.targets(("dog",), NUMBERS)
    assert (found.tolist(), values.tolist()) == ([3], [1.0])


@pytest.mark.parametrize(("alike", "expected"), [(False, []), (True, [2])])
def test_answers_are_looked_up_as_given_unless_asked_for(alike, expected):
    assert answers.targets(("Two",) * 10, NUMBERS, alike=alike)[0].tolist() == expected


def test_spellings_of_one_answer_are_counted_together_where_they_are_made_alike():
    given = ("dog",) * 2 + ("the dog",) * 1 + ("cat",) * 7
    assert answers.targets(given, NUMBERS, alike=True)[1].tolist() == pytest.approx([0.9])
    assert answers.targets(given, NUMBERS)[1].tolist() == pytest.approx([0.6])


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("yes", "yes_no"), ("no", "yes_no"), ("12", "number"), ("3.5", "number"), ("2 dogs", "other")],
)
def test_kinds_of_answers(answer, kind):
    assert answers.kind(answer) == kind


def asked(*given):
    return Given(examples=tuple(Example(str(i), text="q", answers=one) for i, one in enumerate(given))).open()


def test_the_vocabulary_counts_the_answer_most_people_gave_and_numbers_by_first_appearance():
    examples = asked(("b",), ("The C", "b", "The C"), ("d", "d", "e"), ("e",), ("c",), ("d",), ())
    assert answers.frequent(examples, 2) == ("c", "d")
    assert answers.frequent(examples, 1) == ("b", "c", "d", "e")


def broken(error):
    def example(row):
        if row == 1:
            raise error
        return Example(str(row), answers=("x",))

    return Opened(range(3), example, "")


def test_questions_that_cannot_be_read_are_passed_over():
    assert answers.frequent(broken(DataError("no")), 2) == ("x",)
    assert [example is None for _, example in answers.readable(broken(DataError("no")))] == [
        False,
        True,
        False,
    ]


def test_changed_data_end_the_reading():
    with pytest.raises(ChangedError, match="other data"):
        answers.frequent(broken(ChangedError("other data")), 1)


def test_the_official_file_of_answers_is_read(tmp_path):
    file = tmp_path / "answer2label.txt"
    file.write_text("".join(json.dumps({"answer": a, "label": i}) + "\n" for i, a in enumerate(("net", ""))))
    assert answers.read_vocabulary(file) == ("net", "")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"answer": "a", "label": 1}'], r"answer2label.txt:1: labels must count lines from 0, found"),
        (['{"answer": "a", "label": 0}', "b"], r'answer2label.txt:2: expected {"answer": "yes", "label": 1}'),
        (['{"answer": 3, "label": 0}'], r"answer2label.txt:1: labels must count"),
        (['{"answer": "a", "label": 0}', '{"answer": "a", "label": 1}'], r":2: 'a' stands in line 1 already"),
    ],
)
def test_a_wrong_file_of_answers_is_refused_with_its_line(tmp_path, lines, message):
    file = tmp_path / "answer2label.txt"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        answers.read_vocabulary(file)


def test_a_missing_file_of_answers_names_the_setting():
    with pytest.raises(DataError, match=r"nowhere.txt: cannot be read .* correct answer_file"):
        answers.read_vocabulary(Path("nowhere.txt"))


def test_a_question_alone_is_answered_by_the_same_words_then_by_ever_fewer():
    said = answers.QuestionOnly(
        [
            (answers.question(Example("x", text=text)), answer)
            for text, answer in [
                ("Is it red?", "no"),
                ("Is it red?", "yes"),
                ("is it red", "yes"),
                ("is it blue?", "no"),
                ("is it blue?", "no"),
                ("is there a dog?", "no"),
                ("What is it?", "dog"),
                ("what is there?", "dog"),
            ]
        ]
    )

    def ask(text):
        return said(answers.question(Example("x", text=text)))

    assert ask("IS IT RED?") == "yes"
    assert ask("Is it red, or so?") == "no"  # 'is it', three no, two yes
    assert ask("What colour?") == "dog"
    assert ask("Where?") == "no"  # four of eight


def test_nothing_was_learnt_from_no_question():
    assert answers.QuestionOnly([])(("is",)) == ""


def test_ids_stand_in_for_words():
    example = Example("x", token_ids=np.array([5, 6]))
    assert answers.question(example) == (5, 6)
