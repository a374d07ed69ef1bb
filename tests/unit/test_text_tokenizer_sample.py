"""The sample of a corpus that a text tokenizer is trained on."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import Given, Record

from beitctl.api import Example
from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.tokenizers import corpus
from beitctl_plugins.tokenizers.corpus import OBJECT_BYTES, Sampled, split, utf8


def source(*texts):
    return Given(examples=tuple(Example(str(i), text=text) for i, text in enumerate(texts)))


def numbers(count, first=0):
    return source(*(f"text {i}" for i in range(first, first + count)))


def sampled(*sources, log=None, **settings):
    return Sampled(**settings).sample(sources, log or Record())


def test_a_corpus_within_the_limits_stays_whole_and_in_order():
    found = sampled(numbers(50), sentences=50)
    assert found.texts == [f"text {i}".encode() for i in range(50)]


def test_captions_come_before_the_text_of_an_example():
    example = Example("0", captions=("one", "two"), text="three")
    assert sampled(Given(examples=(example,))).texts == [b"one", b"two", b"three"]


def test_a_larger_corpus_gives_as_many_texts_as_asked_for_in_its_order():
    found = sampled(numbers(500), sentences=40)
    places = [int(text.split()[1]) for text in found.texts]
    assert len(places) == 40
    assert all(a < b for a, b in pairwise(places))


def test_all_texts_are_counted_and_not_only_those_of_the_sample():
    found = sampled(source("ab", "cde", "f"), sentences=1)
    assert (found.read, found.characters, len(found.texts)) == (3, 6, 1)


def test_the_sample_depends_on_seed_and_corpus_and_not_on_how_it_is_divided():
    whole = sampled(numbers(200), sentences=30, seed=4).texts
    assert sampled(numbers(120), numbers(80, first=120), sentences=30, seed=4).texts == whole
    assert sampled(numbers(200), sentences=30, seed=5).texts != whole


def test_every_text_has_the_same_chance():
    counts = dict.fromkeys(range(20), 0)
    for seed in range(600):
        for text in sampled(numbers(20), sentences=5, seed=seed).texts:
            counts[int(text.split()[1])] += 1
    assert all(110 <= count <= 190 for count in counts.values())  # 150 expected, 4 standard deviations


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 400_000), min_size=1, max_size=30), st.integers(0, 99))
def test_the_memory_of_the_sample_is_bounded(lengths, seed):
    texts = [chr(97 + i % 26) * n for i, n in enumerate(lengths) if n] or ["a"]
    try:
        found = sampled(source(*texts), sample_mib=1, seed=seed)
    except DataError:
        return
    assert found.size + OBJECT_BYTES * len(found.texts) <= 1 << 20


def test_short_texts_are_not_preferred_when_memory_is_short():
    texts = ["s" * 10_000, "l" * 60_000] * 50
    kept = [text[:1] for seed in range(60) for text in sampled(source(*texts), sample_mib=1, seed=seed).texts]
    assert kept.count(b"l") / len(kept) == pytest.approx(0.5, abs=0.06)


def test_a_limit_below_the_first_text_is_refused():
    with pytest.raises(DataError, match=r"sample_mib \(1\) has no room for a single text"):
        sampled(source("x" * (2 << 20)), sample_mib=1)


def test_the_corpus_is_read_once():
    class Counted:
        reads = 0

        def open(self):
            return self

        def __len__(self):
            return 30

        def __getitem__(self, index):
            Counted.reads += 1
            return Example(str(index), text="text")

    sampled(Counted(), sentences=3)
    assert Counted.reads == 30


def test_a_sample_says_what_it_is_a_sample_of():
    log = Record()
    sampled(numbers(30), sentences=10, seed=3, log=log)
    assert "random sample of 10 of 30 texts" in log.said["note"][0][0]
    assert "seed = 3" in log.said["note"][0][0]


def test_a_whole_corpus_is_not_called_a_sample():
    log = Record()
    sampled(numbers(30), log=log)
    assert "note" not in log.said


def test_reading_a_large_corpus_tells_how_far_it_is(monkeypatch):
    monkeypatch.setattr(corpus, "PROGRESS", 10)
    log = Record()
    sampled(numbers(25), log=log)
    assert [row[0] for row in log.said["note"]] == [
        "10 texts read, 60 characters",
        "20 texts read, 130 characters",
    ]


def broken(*bad, count=10, error=DataError):
    """Texts of which some cannot be read."""

    class Broken(Given):
        def open(self):
            def example(number):
                if number in bad:
                    raise error(f"{number} is broken")
                return Example(str(number), text=f"text {number}")

            return Opened(range(count), example, "broken")

    return Broken(examples=())


def test_a_text_that_cannot_be_read_is_left_out_and_told():
    log = Record()
    assert len(sampled(broken(3), log=log).texts) == 9
    assert [values[1] for values in log.said["warning"]] == ["left out: 3 is broken"]


def test_too_many_texts_that_cannot_be_read_are_refused():
    with pytest.raises(
        DataError, match=r"2 of the first 6 examples of a source cannot be used, .*: 5 is broken"
    ):
        sampled(broken(3, 5))


def test_a_corpus_that_changed_while_it_was_read_is_refused():
    with pytest.raises(ChangedError, match="3 is broken"):
        sampled(broken(3, error=ChangedError))


def test_a_corpus_without_texts_is_refused():
    with pytest.raises(DataError, match="neither text nor captions"):
        sampled(Given(examples=(Example("0"),)))


@pytest.mark.parametrize(
    ("text", "data"),
    [("a", b"a"), ("\ud83d\ude00", "😀".encode()), ("a\ud800b", "a\ufffdb".encode()), ("\0", b"\0")],
)
def test_halves_of_surrogates_are_joined_or_replaced(text, data):
    assert utf8(text) == data


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab é漢😀 \n\t", max_size=300), st.integers(8, 40))
def test_parts_of_a_long_text_fit_and_lose_white_space_alone(text, most):
    parts = split(text.encode(), most)
    assert all(len(part) <= most for part in parts)
    assert "".join("".join(part.decode() for part in parts).split()) == "".join(text.split())


def test_a_long_text_is_cut_between_words_where_it_can_be():
    assert split(b"one two three four", 9) == [b"one two", b"three", b"four"]
