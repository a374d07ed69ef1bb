"""Where the special ids of a SentencePiece model are: its own arrangement decides."""

import io
import json

import pytest
import sentencepiece
from small import rng, tools

from beitctl.api import Example
from beitctl.checkpoints.native import load_tokenizer
from beitctl.errors import DataError
from beitctl_plugins.tasks.masked import MaskedText
from beitctl_plugins.tasks.preparing import framed
from beitctl_plugins.tokenizers.sentencepiece import SentencePieceTokenizer

SENTENCES = [
    "a small boat on the calm sea",
    "two dogs run over the green field",
    "an old man reads a book by the window in a house",
] * 9
ARRANGED = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
T5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
DEBERTA = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]"}
ALBERT = {
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": -1,
    "eos_id": -1,
    "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
}


def model(**settings):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=written, minloglevel=2,
        **{"vocab_size": 40} | ARRANGED | settings,
    )  # fmt: skip
    return written.getvalue()


def special(tokenizer):
    """Ids of start, end, pad, unknown, mask."""
    return [tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.unknown_id, tokenizer.mask_id]


@pytest.mark.parametrize(
    ("settings", "layout", "expected", "size"),
    [
        ({}, "xlm-r", [0, 2, 1, 3, 41], 42),
        ({"control_symbols": ["[INST]"]}, "xlm-r", [0, 2, 1, 3, 41], 42),
        ({"pad_id": 3}, "own", [1, 2, 3, 0, 40], 41),
        ({"user_defined_symbols": ["<mask>"]}, "own", [1, 2, 40, 0, 3], 41),
        ({"control_symbols": ["<pad>", "<mask>"]}, "own", [1, 2, 3, 0, 4], 40),
        (T5, "own", [40, 1, 0, 2, 41], 42),
        (DEBERTA, "own", [1, 2, 0, 3, 40], 41),
        (ALBERT, "own", [2, 3, 0, 1, 4], 40),
        ({"bos_id": -1, "eos_id": -1, "vocab_size": 36}, "own", [36, 37, 38, 0, 39], 40),
    ],
    ids=["xlm-r", "control", "pad", "mask", "pad and mask", "t5", "deberta", "albert", "nothing but unk"],
)
def test_the_special_ids_are_those_of_the_model(settings, layout, expected, size):
    found = SentencePieceTokenizer(model(**settings))
    assert (found.layout, special(found), found.size) == (layout, expected, size)


@pytest.mark.parametrize("settings", [T5, DEBERTA, ALBERT, {"pad_id": 3}])
def test_other_arrangements_keep_the_ids_of_the_model(settings):
    found = SentencePieceTokenizer(model(**settings))
    assert found.encode("a small dog, 漢") == found.processor.encode("a small dog, 漢")


@pytest.mark.parametrize("settings", [{}, T5, DEBERTA, ALBERT])
def test_text_comes_back_without_special_ids(settings):
    found = SentencePieceTokenizer(model(**settings))
    ids = framed(found.encode("a small boat"), found)
    assert (
        found.decode([*ids, found.pad_id, found.mask_id, found.unknown_id, found.size + 3]) == "a small boat"
    )


def test_added_tokens_have_the_names_of_xlm_r():
    found = SentencePieceTokenizer(model(**T5))
    assert found.pieces([0, 1, 2, 40, 41, 42]) == ["<pad>", "</s>", "<unk>", "<s>", "<mask>", "<42>"]


def test_control_symbols_are_special_too():
    found = SentencePieceTokenizer(model(control_symbols=["[INST]"]))
    assert found.special_ids == [0, 1, 2, 3, 4, 41]


def test_a_learnt_piece_with_the_name_of_a_special_token_is_not_one():
    texts = ["<mask>"] * 99 + SENTENCES
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=written, vocab_size=41, minloglevel=2,
        add_dummy_prefix=False, split_by_unicode_script=False, **ARRANGED,
    )  # fmt: skip
    found = SentencePieceTokenizer(written.getvalue())
    assert "<mask>" in found.pieces(found.encode("<mask>"))
    assert (found.layout, found.mask_id) == ("xlm-r", 42)


@pytest.mark.parametrize("suffix", [False, True])
def test_words_begin_where_the_mark_of_a_space_says(suffix):
    found = SentencePieceTokenizer(model(treat_whitespace_as_suffix=suffix, model_type="bpe"))
    ids = framed(found.encode("boats dogs"), found)
    words, starts = found.pieces(ids), found.starts(ids.tolist())
    text = "".join(("|" if start else "") + word for word, start in zip(words, starts, strict=True))
    assert text.replace("▁", "") == "|<s>|boats|dogs|</s>"


@pytest.mark.parametrize("settings", [T5, DEBERTA, {"pad_id": 3}])
def test_the_masked_task_frames_and_hides_with_the_ids_of_the_model(settings):
    found = SentencePieceTokenizer(model(**settings))
    example = Example("0", text="a small boat")
    for seed in range(20):
        item = MaskedText(mask_ratio=1.0).prepare(example, rng(seed), tools(tokenizer=found))
        assert (item.text[0], item.text[-1]) == (found.start_id, found.end_id)
        fed = set(item.text[1:-1].tolist()) - {found.mask_id}
        assert not fed & set(found.special_ids)


def test_the_note_says_which_layout_it_is(tmp_path):
    SentencePieceTokenizer(model(**T5)).save(tmp_path)
    note = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (note["kind"], note["layout"], note["mask"]) == ("sentencepiece", "own", 41)


def test_a_saved_tokenizer_of_another_arrangement_is_loaded(tmp_path):
    SentencePieceTokenizer(model(**T5)).save(tmp_path)
    assert special(load_tokenizer(tmp_path)) == [40, 1, 0, 2, 41]


def test_a_model_without_an_unknown_piece_is_refused(tmp_path):
    whole = model()
    broken = whole.replace(b"<unk>\x15\0\0\0\0\x18\x02", b"<unk>\x15\0\0\0\0\x18\x01", 1)
    assert broken != whole
    (tmp_path / "x.model").write_bytes(broken)
    with pytest.raises(DataError, match=r"x\.model: not a SentencePiece model \(.*unk is not defined"):
        load_tokenizer(tmp_path / "x.model")


def test_a_piece_that_is_not_utf_8_is_refused(tmp_path):
    whole = model()
    place = whole.index("▁".encode())
    (tmp_path / "x.spm").write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    with pytest.raises(DataError, match=r"x\.spm: not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.spm")


@pytest.mark.parametrize("cut", [0, 1, 500])
def test_a_model_that_was_cut_off_is_refused(tmp_path, cut):
    SentencePieceTokenizer(model()).save(tmp_path)
    file = tmp_path / "tokenizer.spm"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"tokenizer\.spm: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_model_that_was_exchanged_is_refused(tmp_path):
    SentencePieceTokenizer(model()).save(tmp_path)
    (tmp_path / "tokenizer.spm").write_bytes(model(**T5))
    with pytest.raises(DataError, match=r"was changed: its hash is not the one in tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_folder_with_one_model_file_is_read(tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model())
    assert load_tokenizer(tmp_path).size == 42


def test_a_folder_with_two_model_files_is_refused(tmp_path):
    for name in ("a.spm", "b.spm"):
        (tmp_path / name).write_bytes(model())
    with pytest.raises(DataError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
