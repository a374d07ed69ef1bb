"""Training SentencePiece: settings, counts, and corpora that it does not like."""

import io
import re

import pytest
import sentencepiece
from pydantic import ValidationError
from small import Given, Record

from beitctl.api import Example, Job
from beitctl.errors import DataError, UserError
from beitctl_plugins.tokenizers.corpus import Sample
from beitctl_plugins.tokenizers.sentencepiece import SentencePiece

SENTENCES = [
    "a small boat on the calm sea",
    "two dogs run over the green field",
    "an old man reads a book by the window",
    "the red car stands in front of the house",
    "white clouds over high mountains",
] * 8


def source(texts):
    return Given(examples=tuple(Example(str(i), text=text) for i, text in enumerate(texts)))


def fitted(*more, log=None, **settings):
    sample = Sample([text.encode() for text in (*SENTENCES, *more)])
    return SentencePiece(**{"pieces": 50} | settings).fit(sample, log)


def run(folder, texts=SENTENCES, log=None, **settings):
    return SentencePiece(**{"pieces": 50} | settings).train([source(texts)], Job(folder, log or Record()))


def test_a_corpus_that_fits_gives_the_model_of_sentencepiece_with_these_settings(tmp_path):
    run(tmp_path)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=written, vocab_size=50, model_type="unigram",
        character_coverage=0.9995, input_sentence_size=5_000_000, shuffle_input_sentence=True,
        max_sentence_length=1 << 16, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    assert (tmp_path / "tokenizer" / "tokenizer.spm").read_bytes() == written.getvalue()


def test_a_sample_of_a_larger_corpus_is_the_same_every_time(tmp_path):
    texts = [f"{a} {b}" for a in SENTENCES for b in SENTENCES[:5]]
    for name in "ab":
        run(tmp_path / name, texts, sentences=60, pieces=40)
    files = [(tmp_path / name / "tokenizer" / "tokenizer.spm").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_the_result_says_what_was_read_and_how_well_it_is_written(tmp_path):
    found = run(tmp_path, [*SENTENCES, "漢" * 3], character_coverage=0.9975)
    characters = sum(map(len, SENTENCES))
    assert found["texts"] == found["texts_trained_on"] == 41
    assert found["characters"] == characters + 3
    assert found["unknown_share"] > 0 == found["byte_share"]
    # the mark of a space at the start of each text counts as well
    assert found["characters_covered"] == pytest.approx(1 - 3 / (characters + 3 + 41))


def test_bytes_stand_for_rare_characters_if_asked(tmp_path):
    found = run(tmp_path, [*SENTENCES, "漢" * 3], byte_fallback=True, pieces=300, character_coverage=0.99)
    assert found["byte_share"] > 0 == found["unknown_share"]


def test_text_of_bytes_comes_back():
    tokenizer = fitted(byte_fallback=True, pieces=300)
    assert tokenizer.decode(tokenizer.encode("a 漢字 😀 boat")) == "a 漢字 😀 boat"


def test_capital_letters_are_folded_by_the_rule():
    tokenizer = fitted(normalisation="nmt_nfkc_cf")
    assert tokenizer.encode("A Small BOAT") == tokenizer.encode("a small boat")


def test_without_a_rule_characters_stay_as_they_are():
    plain, folded = (
        fitted("２３", normalisation="identity", character_coverage=1),
        fitted("23", character_coverage=1),
    )
    assert plain.unknown_id not in plain.encode("２３")
    assert plain.unknown_id in plain.encode("23")
    assert folded.encode("２３") == folded.encode("23")


def test_a_symbol_is_always_one_piece():
    tokenizer = fitted(symbols=["[IMG]", "the boat", "a,b"][::2])
    ids = tokenizer.encode("see [IMG] and a,b")
    assert {"[IMG]", "a,b"} <= set(tokenizer.pieces(ids))
    assert tokenizer.layout == "xlm-r"


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        (["<mask>"], "'<mask>' is a special token already"),
        (["a b"], "must be a text without white space"),
        ([""], "must be a text without white space"),
        (["x", "x"], "a symbol is named twice"),
    ],
)
def test_symbols_that_cannot_be_are_refused(symbols, message):
    with pytest.raises(ValidationError, match=message):
        SentencePiece(symbols=symbols)


def test_texts_that_are_too_long_are_split_and_counted_and_not_dropped():
    log = Record()
    tokenizer = fitted("quiz " * 40, log=log, sentence_bytes=64, character_coverage=1)
    assert tokenizer.unknown_id not in tokenizer.encode("quiz")
    assert log.said["note"] == [("1 texts longer than sentence_bytes (64) were split into 4",)]


def test_parts_of_long_texts_may_be_more_than_the_sample(tmp_path):
    words = [f"{SENTENCES[i % 5]} " * 4 + "q" * (i == 7) for i in range(10)]
    run(tmp_path, words, sentences=10, sentence_bytes=64, pieces=40, character_coverage=1)
    tokenizer = SentencePiece.load(tmp_path / "tokenizer")
    assert tokenizer.unknown_id not in tokenizer.encode("q")


def test_texts_with_the_character_that_sentencepiece_reserves_are_not_dropped():
    log = Record()
    tokenizer = fitted("quiz ▅ quiz", log=log, character_coverage=1)
    assert tokenizer.unknown_id not in tokenizer.encode("quiz")
    assert log.said["note"] == [("U+2585, which SentencePiece reserves, became a space in 1 texts",)]


@pytest.mark.parametrize("text", ["q\0q", "q\nq\r\nq", "\x01q\x1b", "\tq", "q\u2028q", "\ufeffq", "q\ud800"])
def test_texts_with_strange_characters_are_trained_on(tmp_path, text):
    run(tmp_path, [*SENTENCES, text], character_coverage=1)
    tokenizer = SentencePiece.load(tmp_path / "tokenizer")
    assert tokenizer.unknown_id not in tokenizer.encode("q")


@pytest.mark.parametrize(
    "text", ["", "\0", "\n", "a\ud800", "\ud83d\ude00", "▅", "\u2047", "<s></s><pad><mask>", "x" * 10**6]
)
def test_any_text_is_encoded_and_never_to_a_frame_or_a_mask(text):
    tokenizer = fitted()
    ids = tokenizer.encode(text)
    assert not {0, 1, 2, tokenizer.mask_id} & set(ids)
    tokenizer.decode(ids)


@pytest.mark.parametrize("settings", [{}, {"byte_fallback": True}, {"model": "bpe"}])
def test_the_largest_possible_vocabulary_is_named_and_can_be_trained(settings):
    with pytest.raises(UserError, match="cannot train 5000 pieces on this corpus: it allows at most") as told:
        fitted(pieces=5000, **settings)
    most = int(re.search(r"at most (\d+)", str(told.value))[1])
    assert fitted(pieces=most, **settings).size == most + 2


@pytest.mark.parametrize("settings", [{}, {"byte_fallback": True}, {"symbols": ["[A]"]}])
def test_the_smallest_possible_vocabulary_is_named_and_can_be_trained(settings):
    with pytest.raises(UserError, match="cannot train 8 pieces on this corpus: it needs at least") as told:
        fitted(pieces=8, **settings)
    least = int(re.search(r"at least (\d+)", str(told.value))[1])
    assert fitted(pieces=least, **settings).size == least + 2


@pytest.mark.parametrize("texts", [["a"], ["aaaa aaaa"] * 9])
def test_a_corpus_of_one_character_is_refused_with_what_it_allows(tmp_path, texts):
    with pytest.raises(UserError, match=r"it allows at most \d; give more text"):
        run(tmp_path, texts, pieces=60)


@pytest.mark.parametrize("text", [" ", "\n", "\t \u3000"])
def test_a_corpus_of_white_space_is_refused(tmp_path, text):
    with pytest.raises(DataError, match="nothing but white space"):
        run(tmp_path, [text])


def test_the_plan_says_that_bytes_are_used():
    assert SentencePiece(byte_fallback=True, pieces=300).plan() == {
        "tokenizer": "SentencePiece unigram, 300 pieces, bytes for rare characters"
    }
