"""WordPiece, BERT's text tokenizer, which VLMo has: files of transformers are read, own ones trained."""

import hashlib
import importlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from beitctl.api import Job, Source
from beitctl.engine import dist
from beitctl.errors import DataError, SetupError, UserError
from beitctl_plugins.tokenizers.corpus import Sample, Sampled, measured, utf8

MODEL_FILE = "wordpiece.json"
NOTE = "tokenizer.json"
VOCABULARY = "vocab.txt"
CONFIG = "tokenizer_config.json"
NAMES = {"pad": "[PAD]", "unknown": "[UNK]", "start": "[CLS]", "end": "[SEP]", "mask": "[MASK]"}
"""Special tokens, in the order of the ids that a trained tokenizer gives them."""
KEYS = {
    "pad": "pad_token",
    "unknown": "unk_token",
    "start": "cls_token",
    "end": "sep_token",
    "mask": "mask_token",
}
"""Their keys in transformers' ``tokenizer_config.json``."""
INSIDE = "##"
"""Begins a piece that goes on with a word."""
PARALLEL = "TOKENIZERS_PARALLELISM"


class WordPieceTokenizer:
    """Text to ids with BERT's algorithm: the longest piece of the vocabulary first, word by word.

    Args:
        source: a tokenizer as the library ``tokenizers`` writes it (JSON).
        names: the special tokens by role, as ``NAMES``.

    Raises:
        DataError: it is no WordPiece, or a special token is not in its vocabulary.
        SetupError: the library is not installed.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        model = _model(source)
        self.inside = str(model.get("continuing_subword_prefix", INSIDE))
        self.tokenizer = _parsed(source)
        self.source, self.names = source, dict(names)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        missing = [name for name in self.names.values() if name not in vocabulary]
        if model["unk_token"] not in self.tokenizer.get_vocab(with_added_tokens=False):
            missing.append(str(model["unk_token"]))
        if missing:
            raise DataError(
                f"the special tokens {', '.join(dict.fromkeys(missing))} are not in the vocabulary"
            )
        special = {role: int(vocabulary[name]) for role, name in self.names.items()}
        self.size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.blake2b(
            (source + json.dumps(self.names)).encode(), digest_size=16
        ).hexdigest()
        self.start_id, self.end_id, self.mask_id = special["start"], special["end"], special["mask"]
        self.pad_id, self.unknown_id = special["pad"], special["unknown"]
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = sorted({*special.values()} | {id for id, token in added.items() if token.special})
        self._special = frozenset(self.special_ids)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without [CLS] and [SEP]."""
        ids: list[int] = self.tokenizer.encode(utf8(text).decode(), add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ones are left out."""
        text: str = self.tokenizer.decode([int(id) for id in ids if int(id) not in self._special])
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """How each id is written, for pictures and logs: words begin with ▁, as with SentencePiece."""
        return [self._piece(int(id)) for id in ids]

    def _piece(self, id: int) -> str:
        token: str | None = self.tokenizer.id_to_token(id)
        if token is None:
            return f"<{id}>"
        if id in self._special:
            return token
        return f"▁{token}" if self._begins(token) else token.removeprefix(self.inside)

    def _begins(self, token: str) -> bool:
        return not token.startswith(self.inside) or token == self.inside

    def starts(self, ids: Sequence[int]) -> list[bool]:
        """Whether each id begins a word: its piece does not begin with ##, or it is special."""
        return [self._begins(self.tokenizer.id_to_token(int(id)) or "") for id in ids]

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the note that says what it is."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_text(self.source, encoding="utf-8")
        note = {"kind": "wordpiece", "size": self.size, "names": self.names, "fingerprint": self.fingerprint}
        (folder / NOTE).write_text(json.dumps(note, indent=1))


class WordPiece(Sampled):
    """A WordPiece tokenizer (BERT, VLMo) trained on the captions and the prose of the sources.

    A published one is not trained but read: name its ``vocab.txt`` or folder as ``text_tokenizer``.
    """

    pieces: int = Field(default=30_522, ge=8)
    """Ids of the vocabulary, the five special ones included."""
    lowercase: bool = True
    """Whether texts are read in small letters and without accents (BERT's uncased models)."""
    alphabet: int = Field(default=1000, ge=1)
    """Most characters that get pieces of their own, two each; a word with another one is [UNK]."""
    min_frequency: int = Field(default=2, ge=1)
    """How often two pieces must stand side by side to become one."""

    def plan(self) -> Mapping[str, Any]:
        return {"tokenizer": f"WordPiece, {self.pieces} pieces"}

    def train(self, sources: Sequence[Source], job: Job) -> Mapping[str, Any]:
        _library()
        ranks = dist.start()
        metrics: dict[str, Any] = {}
        if ranks.main:
            sample = self.sample(sources, job.log)
            tokenizer = self.fit(sample)
            tokenizer.save(job.folder / "tokenizer")
            metrics, _ = measured(tokenizer, sample, job)
        found: Mapping[str, Any] = ranks.broadcast_object(metrics)
        return found

    @classmethod
    def load(cls, folder: Path) -> WordPieceTokenizer:
        """Read a tokenizer that beitctl saved, a folder of transformers, or its vocabulary alone.

        A ``vocab.txt`` does not say whether texts are read in small letters. ``tokenizer_config.json`` beside
        it does; without one they are unless the vocabulary has capital letters itself.

        Raises:
            DataError: a file is missing, damaged, changed, or of another kind of tokenizer.
            SetupError: the library ``tokenizers`` is not installed.
        """
        file = folder if folder.is_file() else folder / (NOTE if (folder / NOTE).is_file() else VOCABULARY)
        _library()
        try:
            if file.suffix != ".json":
                return _of_vocabulary(file)
            note = json.loads(file.read_text(encoding="utf-8"))
            if "kind" not in note:
                return _of_library(file)
            found = WordPieceTokenizer((folder / MODEL_FILE).read_text(encoding="utf-8"), note["names"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{file}: not a readable WordPiece tokenizer ({error})") from error
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
        if note.get("fingerprint") != found.fingerprint:
            raise DataError(f"{folder / MODEL_FILE} was changed: its hash is not the one in {NOTE}")
        return found

    def fit(self, sample: Sample) -> WordPieceTokenizer:
        """A tokenizer trained on a sample.

        The library numbers characters as they come out of a hash table, and breaks ties by these numbers.
        Here all characters are given beforehand, in order, so that the result is always the same.

        Raises:
            UserError: the sample does not allow this number of pieces; says the largest or smallest possible.
            DataError: the texts hold nothing but white space.
        """
        library = _library()
        letters = self._letters(sample)
        fixed = [*NAMES.values(), *letters, *(INSIDE + letter for letter in letters)]
        begin = f"WordPiece cannot train {self.pieces} pieces on this corpus"
        if len(fixed) > self.pieces:
            raise UserError(
                f"{begin}: it needs at least {len(fixed)} (five special ones and two for each of "
                f"{len(letters)} characters); set pieces to that or more, or lower alphabet ({self.alphabet})"
            )
        trainer = library.trainers.WordPieceTrainer(
            vocab_size=self.pieces, min_frequency=self.min_frequency, special_tokens=fixed,
            initial_alphabet=letters, limit_alphabet=len(letters), show_progress=False,
        )  # fmt: skip
        made = built({name: id for id, name in enumerate(fixed)}, lowercase=self.lowercase)
        with _one_thread():
            made.train_from_iterator((data.decode() for data in sample.texts), trainer)
        vocabulary = made.get_vocab(with_added_tokens=True)
        if len(vocabulary) < self.pieces:
            raise UserError(
                f"{begin}: it allows at most {len(vocabulary)} with min_frequency = {self.min_frequency}; "
                "set pieces to that or less, or give more text"
            )
        return WordPieceTokenizer(built(vocabulary, lowercase=self.lowercase).to_str(), NAMES)

    def _letters(self, sample: Sample) -> list[str]:
        """The most frequent characters, sorted."""
        normalise = built({}, lowercase=self.lowercase).normalizer.normalize_str
        counts = Counter[str]()
        for data in sample.texts:
            counts.update(normalise(data.decode()))
        del counts[" "]
        if not counts:
            raise DataError("the texts of the sources hold nothing but white space; correct the sources")
        return sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[: self.alphabet])


def built(
    vocabulary: Mapping[str, int], *, lowercase: bool, accents: bool | None = None, chinese: bool = True,
    names: Mapping[str, str] = NAMES,
) -> Any:  # fmt: skip
    """A tokenizer of the library ``tokenizers`` as transformers' ``BertTokenizer`` sets it up.

    Args:
        vocabulary: ids by piece.
        lowercase: whether texts are read in small letters.
        accents: whether accents are taken off; None: if ``lowercase``.
        chinese: whether every Chinese character is a word.
        names: the special tokens; in a text they stand for themselves.
    """
    library = _library()
    made = library.Tokenizer(library.models.WordPiece(dict(vocabulary), unk_token=names["unknown"]))
    made.normalizer = library.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=chinese, strip_accents=accents, lowercase=lowercase
    )
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    made.decoder = library.decoders.WordPiece(prefix=INSIDE)
    made.add_special_tokens([name for name in names.values() if name in vocabulary])
    return made


def _of_vocabulary(file: Path) -> WordPieceTokenizer:
    """The tokenizer of a ``vocab.txt``: one piece a line, numbered from 0."""
    lines = file.read_text(encoding="utf-8").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    vocabulary = {piece: id for id, piece in enumerate(lines)}
    if len(vocabulary) < len(lines):
        twice = next(id for id, piece in enumerate(lines) if vocabulary[piece] != id)
        raise DataError(f"line {twice + 1}: {lines[twice]!r} stands in the vocabulary twice; copy it again")
    config = _config(file)
    names = _names(config)
    capital = any(letter.isupper() for piece in vocabulary if piece[:1] != "[" for letter in piece)
    made = built(
        vocabulary, lowercase=_flag(config, "do_lower_case", not capital), names=names,
        accents=_flag(config, "strip_accents", None), chinese=_flag(config, "tokenize_chinese_chars", True),
    )  # fmt: skip
    return WordPieceTokenizer(made.to_str(), names)


def _of_library(file: Path) -> WordPieceTokenizer:
    """The tokenizer of a ``tokenizer.json`` of transformers; it cuts texts as that file says."""
    source = file.read_text(encoding="utf-8")
    _model(source)
    made = _parsed(source)
    made.no_truncation()
    made.no_padding()
    return WordPieceTokenizer(made.to_str(), _names(_config(file)))


def _config(file: Path) -> dict[str, Any]:
    """What ``tokenizer_config.json`` beside a file says; nothing if there is none."""
    beside = file.parent / CONFIG
    found = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    if not isinstance(found, dict):
        raise DataError(f"{beside} holds no table of settings")
    return found


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role; each is a text, or a table with ``content``."""
    found: dict[str, Any] = {}
    for role, name in NAMES.items():
        value = config.get(KEYS[role]) or name
        found[role] = value.get("content") if isinstance(value, dict) else value
        if not isinstance(found[role], str):
            raise DataError(f"{CONFIG}: {KEYS[role]} is {value!r:.80}; it must be a text")
    return found


def _flag(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A switch of the configuration: true, false, or null, which is the default."""
    value = config.get(key)
    if not isinstance(value, bool | None):
        raise DataError(f"{CONFIG}: {key} is {value!r:.80}; it must be true or false")
    return default if value is None else value


def _parsed(source: str) -> Any:
    """The tokenizer of a text of JSON."""
    try:
        return _library().Tokenizer.from_str(source)
    except SetupError:
        raise
    except Exception as error:  # the library has no class of its own for this
        raise DataError(f"damaged ({error}); copy it again") from error


def _model(source: str) -> Mapping[str, Any]:
    """The vocabulary in a text of JSON, and how it is used.

    Raises:
        DataError: it is that of another kind of tokenizer.
    """
    model: Mapping[str, Any] = json.loads(source)["model"]
    kind = model.get("type") or ("WordPiece" if "max_input_chars_per_word" in model else "unknown")
    if kind != "WordPiece":
        raise DataError(
            f"a tokenizer of type {kind!r:.80}, not WordPiece; of SentencePiece give the file .model or .spm"
        )
    return model


def _library() -> Any:
    """The library ``tokenizers``, which transformers' own tokenizers are made of.

    Raises:
        SetupError: it is not installed.
    """
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise SetupError(
            f"WordPiece tokenizers need the packages of the extra hf ({error}): pip install 'beitctl[hf]'"
        ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread unless the environment says otherwise: after more, forked data workers warn."""
    if PARALLEL in os.environ:
        yield
        return
    os.environ[PARALLEL] = "false"
    try:
        yield
    finally:
        del os.environ[PARALLEL]
