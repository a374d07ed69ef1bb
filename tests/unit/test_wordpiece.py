"""WordPiece: files of transformers give its ids, own ones are trained, and VLMo's tasks use both."""

import json
import sys
from dataclasses import replace

import pytest
from small import MODEL, Given, Record, rng, tools

from beitctl.api import Example, Job
from beitctl.checkpoints.native import load_tokenizer
from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.tasks.masked import MaskedText
from beitctl_plugins.tasks.preparing import framed
from beitctl_plugins.tokenizers.corpus import Sample
from beitctl_plugins.tokenizers.wordpiece import WordPiece

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

BEGIN = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
"""Ids 0 to 103 of bert-base-uncased."""
WORDS = "the an boat boats men over sea ! , . ? ' - ( ) 1 2 2020 ü é ß 漢 字 中 😀 un ##want ##ed runn ##ing"
LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY = [*BEGIN, *WORDS.split(), *LETTERS, *("##" + letter for letter in [*LETTERS, *"0123456789"])]
NASTY = [
    "The boat, un-wanted; runs over the SEA!",
    "  two  spaces\tand\nlines\r\n",
    "",
    "   ",
    "Ünïcödé café e\u0301 ß",
    "漢字中 kana かな",
    "مرحبا",
    "😀 boat👩‍👧",
    "NUL \0 and \x01 control",
    "no\u00a0break zero\u200bwidth \ufeff \u2028",
    "[MASK] a boat [SEP] [unused3]",
    "x" * 101,
    "word " * 500,
    "##ed a##b",
    "İstanbul ſ ﬁ ２０２０",
]
SENTENCES = [
    "a small boat on the calm sea",
    "two dogs run over the green field",
    "an old man reads a book",
] * 9


def vocabulary_file(folder, lines=VOCABULARY, **config):
    (folder / "vocab.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "vocab.txt"


def sample(texts=SENTENCES):
    return Sample([text.encode() for text in texts], len(texts))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Our tokenizer and transformers', of one vocab.txt."""
    file = vocabulary_file(tmp_path_factory.mktemp("bert"))
    return load_tokenizer(file), transformers.BertTokenizer.from_pretrained(file.parent)


@pytest.mark.parametrize("text", NASTY)
def test_a_text_has_the_ids_of_transformers(bert, text):
    ours, theirs = bert
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", NASTY)
def test_ids_become_the_text_of_transformers(bert, text):
    ours, theirs = bert
    ids = framed(ours.encode(text), ours).tolist()
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_special_ids_are_those_of_bert_base_uncased(bert):
    ours, theirs = bert
    found = [ours.start_id, ours.end_id, ours.pad_id, ours.unknown_id, ours.mask_id]
    assert found == [101, 102, 0, 100, 103]
    assert ours.special_ids == sorted(theirs.all_special_ids) == sorted(found)
    assert ours.size == len(theirs) == len(VOCABULARY)


def test_a_text_longer_than_38_ids_is_cut_and_framed_as_by_transformers(bert):
    ours, theirs = bert
    text = "the boat over the sea, " * 20
    assert framed(ours.encode(text)[:38], ours).tolist() == theirs.encode(
        text, truncation=True, max_length=40
    )


@pytest.mark.parametrize("settings", [{"do_lower_case": False}, {"tokenize_chinese_chars": False}])
def test_settings_beside_the_vocabulary_are_followed(tmp_path, settings):
    file = vocabulary_file(tmp_path, **settings)
    ours, theirs = load_tokenizer(file), transformers.BertTokenizer.from_pretrained(tmp_path)
    texts = ["The Boat 漢字中", "É a"]
    assert [ours.encode(t) for t in texts] == [theirs.encode(t, add_special_tokens=False) for t in texts]


def test_a_vocabulary_with_capital_letters_is_read_with_them(tmp_path):
    cased = load_tokenizer(vocabulary_file(tmp_path, [*VOCABULARY, "Boat"]))
    assert cased.pieces(cased.encode("Boat boat")) == ["▁Boat", "▁boat"]


def test_lines_of_windows_are_read(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(VOCABULARY).encode())
    assert load_tokenizer(tmp_path / "vocab.txt").size == len(VOCABULARY)


@pytest.mark.parametrize("lower", [True, False])
def test_a_folder_of_transformers_is_read(tmp_path, lower):
    vocabulary_file(tmp_path)
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=lower)
    theirs.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved", tmp_path / "saved" / "tokenizer.json"):
        ours = load_tokenizer(path)
        assert [ours.encode(t) for t in NASTY] == [theirs.encode(t, add_special_tokens=False) for t in NASTY]


def test_a_length_that_a_file_sets_does_not_cut_or_fill_texts(bert, tmp_path):
    theirs = bert[1].backend_tokenizer
    theirs.enable_truncation(4)
    theirs.enable_padding(length=8)
    theirs.save(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    assert len(load_tokenizer(tmp_path).encode("a " * 20)) == 20
    assert len(load_tokenizer(tmp_path).encode("a")) == 1


def test_special_tokens_of_other_names_are_found(tmp_path):
    lines = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *LETTERS]
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "cls_token": {"content": "<s>"}, "sep_token": "</s>"}
    found = load_tokenizer(vocabulary_file(tmp_path, lines, mask_token="<mask>", **names))
    assert [found.pad_id, found.unknown_id, found.start_id, found.end_id, found.mask_id] == [0, 1, 2, 3, 4]
    assert found.encode("a 漢 <mask>") == [5, 1, 4]


def test_words_begin_where_no_mark_says_that_they_go_on(bert):
    ours, _ = bert
    ids = framed(ours.encode("unwanted boats!"), ours).tolist()
    assert ours.starts(ids) == [True, True, False, False, True, True, True]
    assert ours.pieces(ids) == ["[CLS]", "▁un", "want", "ed", "▁boats", "▁!", "[SEP]"]


def test_ids_that_only_a_model_with_more_rows_says_are_written_as_numbers(bert):
    assert bert[0].pieces([101, 5000]) == ["[CLS]", "<5000>"]


def test_whole_words_are_framed_hidden_and_never_swapped_for_special_ids(bert):
    ours, _ = bert
    task, example = MaskedText(mask_ratio=0.5, whole_words=True), Example("0", text="unwanted boats, men!")
    given = tools(tokenizer=ours, model=replace(MODEL, vocabulary=ours.size))
    for seed in range(40):
        item = task.prepare(example, rng(seed), given)
        assert (item.text[0], item.text[-1]) == (101, 102)
        hidden = (item.text_targets >= 0)[1:4]
        assert hidden.all() or not hidden.any()
        assert not set(item.text[1:-1].tolist()) - {103} & set(ours.special_ids)


def test_halves_of_surrogates_are_no_reason_to_stop(bert):
    assert bert[0].encode("a \ud800 boat") == bert[0].encode("a \ufffd boat")


def test_a_saved_tokenizer_comes_back(bert, tmp_path):
    ours, _ = bert
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.fingerprint, again.special_ids, again.size) == (
        ours.fingerprint,
        ours.special_ids,
        ours.size,
    )
    assert [again.encode(text) for text in NASTY] == [ours.encode(text) for text in NASTY]


def test_a_tokenizer_that_was_changed_is_refused(bert, tmp_path):
    bert[0].save(tmp_path)
    file = tmp_path / "wordpiece.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"boat"', '"goat"'), encoding="utf-8")
    with pytest.raises(DataError, match=r"was changed: its hash is not the one in tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (VOCABULARY[:103], r"vocab\.txt: the special tokens \[MASK\] are not in the vocabulary"),
        ([*VOCABULARY, "boat"], r"vocab\.txt: line \d+: 'boat' stands in the vocabulary twice"),
    ],
)
def test_vocabularies_that_cannot_be_are_refused(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        load_tokenizer(vocabulary_file(tmp_path, lines))


def test_a_vocabulary_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match=r"vocab\.txt: not a readable WordPiece tokenizer"):
        load_tokenizer(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"type": "BPE", "vocab": {}},
            "a tokenizer of type 'BPE', not WordPiece; of SentencePiece give the file",
        ),
        ({"type": "WordPiece"}, "not a readable WordPiece tokenizer|damaged"),
        ({}, "a tokenizer of type 'unknown'"),
    ],
)
def test_other_files_named_tokenizer_json_are_refused(tmp_path, model, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(DataError, match=rf"tokenizer\.json: .*({message})"):
        load_tokenizer(tmp_path)


def test_a_setting_of_another_type_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json: do_lower_case is 'no'; it must be true or false"
    ):
        load_tokenizer(vocabulary_file(tmp_path, do_lower_case="no"))


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(SetupError, match=r"pip install 'beitctl\[hf\]'"):
        load_tokenizer(vocabulary_file(tmp_path))


def test_training_gives_a_tokenizer_with_special_ids_first(tmp_path):
    source = Given(examples=tuple(Example(str(i), text=text) for i, text in enumerate(SENTENCES)))
    found = WordPiece(pieces=60).train([source], Job(tmp_path, Record()))
    tokenizer = load_tokenizer(tmp_path)
    assert (found["ids"], found["texts"], found["unknown_share"]) == (60, 27, 0)
    assert tokenizer.pieces(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]


def test_training_gives_the_same_tokenizer_every_time():
    assert len({WordPiece(pieces=75).fit(sample()).fingerprint for _ in range(6)}) == 1


def test_a_trained_tokenizer_has_the_ids_of_transformers_with_its_vocabulary():
    ours = WordPiece(pieces=80).fit(sample())
    theirs = transformers.BertTokenizer(ours.tokenizer.get_vocab())
    texts = [*NASTY, "Boats of the Seaman"]
    assert [ours.encode(text) for text in texts] == [
        theirs.encode(t, add_special_tokens=False) for t in texts
    ]


def test_capital_letters_stay_if_asked():
    cased = WordPiece(pieces=60, lowercase=False).fit(sample([f"{text} A" for text in SENTENCES]))
    assert cased.pieces(cased.encode("A a")) == ["▁A", "▁a"]


def test_words_with_a_character_outside_of_the_alphabet_are_unknown():
    found = WordPiece(pieces=50, alphabet=15).fit(sample([*SENTENCES, "漢"]))
    assert found.pieces(found.encode("a 漢")) == ["▁a", "[UNK]"]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (5000, r"cannot train 5000 pieces on this corpus: it allows at most (\d+)"),
        (20, r"it needs at least (\d+)"),
    ],
)
def test_a_vocabulary_that_the_corpus_does_not_allow_is_refused_with_one_that_it_does(pieces, message):
    with pytest.raises(UserError, match=message) as told:
        WordPiece(pieces=pieces).fit(sample())
    possible = int(told.value.args[0].split("at most " if pieces == 5000 else "at least ")[1].split()[0])
    assert WordPiece(pieces=possible).fit(sample()).size == possible


def test_a_corpus_of_white_space_is_refused():
    with pytest.raises(DataError, match="nothing but white space"):
        WordPiece(pieces=60).fit(sample([" ", "\t"]))
