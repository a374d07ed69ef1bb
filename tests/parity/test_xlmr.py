"""Ids of SentencePiece models against transformers' XLMRobertaTokenizer, which reads the same file.

The models: two of mistral-common (BPE; <unk>, <s>, </s> at 0, 1, 2; with bytes for rare characters), and four
that are trained here on embedded texts.

transformers 5 reads the file into a unigram model of its own. That gives the ids of SentencePiece for a
unigram model without bytes, as ``beit3.spm`` is, on every text below but:

- those with the name of a special token (``<s>``, ``<pad>``, ``</s>``, ``<unk>``, ``<mask>``), which
  transformers makes that token, where SentencePiece spells it out;
- a letter under 30 combining marks, which its normaliser does not compose as SentencePiece's does.

It cuts otherwise, on most texts, what BPE models cut by rank (it takes the best sum of scores), and knows no
bytes: rare characters are <unk>. There the names of all ids are compared with transformers, and the ids of
texts with the rule of its former class, which asked SentencePiece itself: the id of a piece plus 1, 3 for 0.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest

from beitctl_plugins.sources.embedded import Embedded
from beitctl_plugins.tasks.preparing import framed
from beitctl_plugins.tokenizers.corpus import Sample, texts
from beitctl_plugins.tokenizers.sentencepiece import SentencePiece, SentencePieceTokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("google.protobuf", reason="protobuf, with which transformers reads SentencePiece models")
pytest.importorskip("mistral_common", reason="mistral-common, for its SentencePiece models")

MISTRAL = Path(find_spec("mistral_common").origin).parent / "data"
FILES = ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
TRAINED = {
    "unigram": {},
    "unigram-bytes": {"byte_fallback": True},
    "bpe": {"model": "bpe"},
    "bpe-bytes": {"model": "bpe", "byte_fallback": True},
}
PLAIN = [
    "a small boat on the calm sea",
    "  two  spaces before, between   and behind ",
    "\ttabs\tand\nlines\r\nof text\n",
    "",
    "   ",
    "naïve café, Ünïcödé",
    "e\u0301 n\u0303 combined",
    "ﬁ ligature ２３４ ＡＢＣ ½",
    "漢字かな交じり文。漢 字",
    "مرحبا بالعالم",
    "😀 👩‍👩‍👧‍👦 🇩🇪",
    "NUL \0 inside",
    "zero\u200bwidth, no\u00a0break, wide\u3000space, \u2028line",
    "▁marks ▁▁of space",
    "ß ſ İ ı",
    "\ufeffbyte order mark",
    "control \x01 characters \x7f",
    "don't stop!? (really) -- 3.14 & 10%",
    "x" * 500,
    "word " * 2000,
]
NAMED = ["<s> a </s>", "<pad>", "<mask>", "<unk> a"]
STACKED = ["AAA" + "\u0300" * 30]


@pytest.fixture(scope="module")
def trained():
    """Models of 700 pieces by kind, of the captions and a little prose."""
    sources = [Embedded(content="pairs"), Embedded(content="text", limit=150)]
    sample = Sample([text.encode() for text in texts(sources)])
    return {kind: SentencePiece(pieces=700, **settings).fit(sample) for kind, settings in TRAINED.items()}


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory):
    """Our tokenizer and transformers', by the name of a model; each is made once."""
    made = {}

    def find(name):
        if name not in made:
            ours = trained.get(name) or SentencePieceTokenizer((MISTRAL / name).read_bytes())
            folder = tmp_path_factory.mktemp("xlmr")
            (folder / "sentencepiece.bpe.model").write_bytes(ours.model)
            made[name] = ours, transformers.XLMRobertaTokenizer.from_pretrained(folder)
        return made[name]

    return find


@pytest.mark.parametrize("name", [*FILES, *TRAINED])
def test_every_id_stands_for_the_piece_that_it_stands_for_in_transformers(pair, name):
    ours, theirs = pair(name)
    every = list(range(ours.size))
    assert len(theirs) == ours.size
    assert theirs.convert_ids_to_tokens(every) == ours.pieces(every)
    assert theirs.convert_tokens_to_ids(ours.pieces(every)) == every


@pytest.mark.parametrize("name", [*FILES, *TRAINED])
def test_special_ids_are_those_of_transformers_and_of_the_specification(pair, name):
    ours, theirs = pair(name)
    pieces = ours.processor.get_piece_size()
    found = [ours.start_id, ours.pad_id, ours.end_id, ours.unknown_id, ours.mask_id]
    assert found == [0, 1, 2, 3, pieces + 1]  # model-spec 3.3: 64,000 pieces, <mask> 64001, 64002 ids
    assert found == theirs.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    assert ours.size == pieces + 2


@pytest.mark.parametrize("text", PLAIN)
def test_a_text_has_the_ids_of_transformers(pair, text):
    ours, theirs = pair("unigram")
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", [*FILES, *TRAINED])
@pytest.mark.parametrize("text", [*PLAIN, *NAMED, *STACKED])
def test_a_text_has_the_ids_of_the_former_class_of_transformers(pair, name, text):
    ours, _ = pair(name)
    spelled = ours.processor.encode(text, out_type=str)
    former = [
        ours.processor.piece_to_id(piece) + 1 if ours.processor.piece_to_id(piece) else 3 for piece in spelled
    ]
    assert ours.encode(text) == former


@pytest.mark.parametrize("text", NAMED)
def test_the_name_of_a_special_token_in_a_text_is_spelled_out(pair, text):
    ours, theirs = pair("unigram")
    assert not {0, 1, 2, ours.mask_id} & set(ours.encode(text))
    assert {0, 1, 2, 3, ours.mask_id} & set(theirs.encode(text, add_special_tokens=False))


def test_a_text_longer_than_62_ids_is_cut_and_framed_as_by_transformers(pair):
    ours, theirs = pair("unigram")
    text = "a white clock on a red tower by the river " * 8
    cut = framed(ours.encode(text)[:62], ours).tolist()
    assert cut == theirs.encode(text, truncation=True, max_length=64)
    assert len(cut) == 64
