import os
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beitctl.api import Example
from beitctl.data import packing
from beitctl.data.packing import Packed, cuts, sentences
from beitctl.errors import ChangedError, DataError

END = 1


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "cache"))


class Words:
    """Every word is one id."""

    size, fingerprint, end_id = 1 << 30, "words", END

    def __init__(self):
        self.known = {}
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return [2 + self.known.setdefault(word, len(self.known)) for word in text.split()]


@dataclass
class Documents:
    texts: list
    shards: tuple = ()
    fingerprint: str = "documents"

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        if self.texts[index] is None:
            raise DataError(f"{index} is broken")
        return Example(f"d{index}", text=self.texts[index])


def ids_of(packed):
    return [packed[i].token_ids.tolist() for i in range(len(packed))]


def words(found, tokenizer):
    names = {number + 2: word for word, number in tokenizer.known.items()}
    return " ".join("|" if id == END else names[id] for id in found)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "Go." Then he went.', ['He said "Go."', "Then he went."]),
        ("no end", ["no end"]),
        ("3.14 is pi. Really", ["3.14 is pi.", "Really"]),
        ("一。二！「三。」四", ["一。", "二！", "「三。」", "四"]),
        ("a line\nanother\n\n  third ", ["a line", "another", "third"]),
        (" \n ", []),
    ],
)
def test_a_text_is_cut_where_sentences_end(text, parts):
    assert sentences(text) == parts


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab .!?。\n\"')」", max_size=60))
def test_no_character_of_a_text_is_lost_but_white_space(text):
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_sequences_begin_with_sentences_and_go_on_with_the_next_document():
    tokenizer = Words()
    packed = Packed(Documents(["a b c. d e.", "f g. h i j k."]), tokenizer, 6)
    assert [words(found, tokenizer) for found in ids_of(packed)] == ["a b c. d e.", "f g. h i j k."]
    packed = Packed(Documents(["a b c. d e.", "f g. h i j k."]), tokenizer, 8)
    assert [words(found, tokenizer) for found in ids_of(packed)] == ["a b c. d e. | f g.", "h i j k."]


def test_a_sentence_longer_than_a_sequence_is_cut():
    tokenizer = Words()
    packed = Packed(Documents(["x. a b c d e f g h. y"]), tokenizer, 3)
    assert [words(found, tokenizer) for found in ids_of(packed)] == ["x.", "a b c", "d e f", "g h. y"]


def test_ids_of_sequences_name_their_document():
    packed = Packed(Documents(["a b. c d.", "e f."]), Words(), 2)
    assert [packed[i].id for i in range(3)] == ["d0+0.0", "d0+1.0", "d1+0.0"]


texts = st.lists(
    st.none()
    | st.lists(st.sampled_from(["a", "b c", "d.", "e! f", "g h i j k l m", "\n"]), max_size=12).map(" ".join),
    min_size=1,
    max_size=12,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=texts, room=st.integers(1, 12), block=st.integers(1, 5), number=st.integers())
def test_nothing_is_left_out_and_no_sequence_is_too_long(texts, room, block, number):
    tokenizer = Words()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK", block)
        documents = Documents(texts, fingerprint=f"{number}{texts}")
        all_ids = [id for text in texts for id in tokenizer.encode(text or "")]
        if not all_ids:
            with pytest.raises(DataError, match="no text to pack"):
                Packed(documents, tokenizer, room)
            return
        packed = Packed(documents, tokenizer, room)
        found = ids_of(packed)
    assert [id for sequence in found for id in sequence if id != END] == all_ids
    assert all(0 < len(sequence) <= room for sequence in found)
    assert all(sequence[0] != END and sequence[-1] != END for sequence in found)


def test_counting_is_done_once(tmp_path):
    documents = Documents(["a b. c d."] * 20)
    first = Words()
    Packed(documents, first, 6)
    again = Words()
    packed = Packed(documents, again, 6)
    assert (first.calls, again.calls) == (40, 0)
    assert len(packed) == 20


def test_documents_that_cannot_be_read_are_told_and_not_kept_in_the_cache():
    documents = Documents(["a b. c d.", None, "e f."])
    packed = Packed(documents, Words(), 3)
    assert packed.problems == ["1 is broken"]
    assert len(ids_of(packed)) == 3
    documents.texts[1] = "x y."
    again = Packed(documents, Words(), 3)
    assert (len(ids_of(again)), again.problems) == (4, [])


def test_a_block_is_counted_again_when_files_were_touched():
    first, second = Words(), Words()
    documents = Documents(["a b. c d."] * 3)
    Packed(documents, first, 6)
    documents.state = "touched"
    Packed(documents, second, 6)
    assert second.calls == first.calls


def test_the_counts_of_many_blocks_keep_no_file_open(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 2)
    before = len(os.listdir("/proc/self/fd"))
    packed = Packed(Documents(["a b. c d."] * 600), Words(), 2)
    assert len(packed) == 1200
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_ranks_begin_with_blocks_of_their_own(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 2)
    seen = []
    monkeypatch.setattr(Packed, "_block", lambda self, block: seen.append(block) or np.ones((1, 3), np.int64))
    for rank in range(2):
        Packed(Documents(["a"] * 8), Words(), 6, rank=rank, world=2)
    assert seen == [0, 1, 2, 3, 2, 3, 0, 1]


def test_shards_hold_the_sequences_that_begin_in_them():
    packed = Packed(Documents(["a b. c d.", "e f.", "g h."], shards=(1, 2)), Words(), 2)
    assert packed.shards == (2, 2)


def test_text_that_grew_since_it_was_counted_ends_the_run():
    documents = Documents(["a b c."])
    packed = Packed(documents, Words(), 3)
    documents.texts[0] = "a b c d."
    with pytest.raises(ChangedError, match="have 4 ids where at most 3 were counted"):
        packed[0]


def test_documents_without_sentences_make_no_sequence():
    assert cuts([[], [0], [0, 0]], 4).shape == (0, 3)
