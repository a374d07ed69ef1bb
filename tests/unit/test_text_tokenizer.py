"""SentencePiece with the ids of XLM-R."""

from dataclasses import dataclass

import pytest

from beitctl.api import Example, Job
from beitctl.checkpoints.native import load_tokenizer
from beitctl.errors import DataError, UserError
from beitctl_plugins.tokenizers.sentencepiece import SentencePiece

SENTENCES = [
    "a small boat on the calm sea",
    "two dogs run over the green field",
    "an old man reads a book by the window",
    "the red car stands in front of the house",
    "white clouds over high mountains",
] * 8


@dataclass
class Lines:
    lines: list
    fingerprint: str = "x"
    problems: tuple = ()

    def open(self):
        return self

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return Example(str(index), text=self.lines[index])


class Silent:
    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    metrics = SentencePiece(pieces=50).train([Lines(SENTENCES)], Job(folder, Silent()))
    return folder, metrics


def test_ids_follow_the_layout_of_xlm_r(trained):
    tokenizer = load_tokenizer(trained[0])
    pieces = [tokenizer.processor.id_to_piece(i) for i in range(tokenizer.processor.get_piece_size())]
    assert tokenizer.size == 52
    assert tokenizer.pieces([0, 1, 2, 3, 4, 51]) == ["<s>", "<pad>", "</s>", "<unk>", pieces[3], "<mask>"]


def test_ids_that_only_a_model_with_more_rows_says_are_written_as_numbers(trained):
    assert load_tokenizer(trained[0]).pieces([0, 52, 70]) == ["<s>", "<52>", "<70>"]


def test_every_piece_from_three_on_is_shifted_by_one(trained):
    tokenizer = load_tokenizer(trained[0])
    raw = tokenizer.processor.encode("a small dog")
    assert tokenizer.encode("a small dog") == [i + 1 if i > 2 else 3 for i in raw]


def test_known_text_comes_back(trained):
    tokenizer = load_tokenizer(trained[0])
    for sentence in SENTENCES[:5]:
        assert tokenizer.decode([0, *tokenizer.encode(sentence), 2]) == sentence


def test_unknown_letters_become_unk(trained):
    assert 3 in load_tokenizer(trained[0]).encode("漢")


def test_training_twice_gives_the_same_file(trained, tmp_path):
    SentencePiece(pieces=50).train([Lines(SENTENCES)], Job(tmp_path, Silent()))
    first, second = ((f / "tokenizer" / "tokenizer.spm").read_bytes() for f in (trained[0], tmp_path))
    assert first == second


def test_more_pieces_than_the_corpus_holds_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot train 5000 pieces on this corpus"):
        SentencePiece(pieces=5000).train([Lines(SENTENCES)], Job(tmp_path, Silent()))


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(DataError, match="neither text nor captions"):
        SentencePiece(pieces=50).train([Lines([])], Job(tmp_path, Silent()))


def test_a_bare_model_file_is_read(trained):
    file = trained[0] / "tokenizer" / "tokenizer.spm"
    assert load_tokenizer(file).encode("a boat") == load_tokenizer(trained[0]).encode("a boat")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.spm").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.spm")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer here; expected tokenizer\.json"):
        load_tokenizer(tmp_path)
