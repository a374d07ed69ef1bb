"""SentencePiece: training, and the ids of any model; those of XLM-R, which BEiT-3's text tokenizer has."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import sentencepiece
from pydantic import Field, field_validator

from beitctl.api import Job, Source
from beitctl.engine import dist
from beitctl.errors import BeitctlError, DataError, UserError
from beitctl_plugins.tokenizers.corpus import Sample, Sampled, measured, split, utf8

MODEL_FILE = "tokenizer.spm"
NOTE = "tokenizer.json"
OFFSET = 1
"""In the layout of XLM-R, a piece with SentencePiece id p >= 3 has id p + 1 (fairseq's layout)."""
NAMES = {
    "start": ("<s>", "[CLS]", "<cls>"),
    "end": ("</s>", "[SEP]", "<sep>"),
    "pad": ("<pad>", "[PAD]"),
    "mask": ("<mask>", "[MASK]"),
}
"""Special tokens that a model may have under these names; the first is the name of one that is added."""
XLM_R = {"start": 0, "pad": 1, "end": 2, "unknown": 3}
RESERVED = "▅".encode()
"""U+2585, with which SentencePiece marks unknown characters in training: it leaves out texts that hold it."""


class SentencePieceTokenizer:
    """Text to ids with any SentencePiece model; its special ids are decided by the model itself.

    ``layout`` says how. ``xlm-r``: <s> 0, <pad> 1, </s> 2, <unk> 3, pieces from 4, <mask> last, for models
    with <unk>, <s>, </s> at 0, 1, 2 and neither <pad> nor <mask>, as ``beit3.spm`` and those trained here.
    ``own``: the ids of the model, for all others; what it lacks of <s>, </s>, <pad> and <mask> follows behind
    its last.

    Raises:
        RuntimeError, ValueError: ``model`` is no SentencePiece model.
    """

    def __init__(self, model: bytes) -> None:
        self.processor = found = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.model = model
        self.fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()
        self.layout, special, self.size = _arranged(found)
        self.start_id, self.end_id = special["start"], special["end"]
        self.pad_id, self.unknown_id, self.mask_id = special["pad"], special["unknown"], special["mask"]
        self.offset = OFFSET if self.layout == "xlm-r" else 0
        pieces = range(found.get_piece_size())
        self._spelled: list[str] = found.id_to_piece(list(pieces))
        first = 3 if self.offset else 0
        silent = {p + self.offset for p in pieces[first:] if found.is_control(p) or found.is_unused(p)}
        self.special_ids = sorted({*special.values()} | silent)
        self._special = frozenset(self.special_ids)
        self._names = {special[role]: names[0] for role, names in NAMES.items() if self._added(special[role])}
        self._names |= {self.unknown_id: "<unk>"} if self.offset else {}
        self._behind = "".join(found.encode("a b", out_type=str)).endswith("▁")

    def _added(self, id: int) -> bool:
        """Whether an id is not that of a piece."""
        return bool(self.offset) or id >= self.processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without <s> and </s>."""
        ids: list[int] = self.processor.encode(utf8(text))
        return [id + OFFSET if id > 2 else self.unknown_id for id in ids] if self.offset else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ones are left out."""
        pieces = [int(id) - self.offset for id in ids if id < self.size and int(id) not in self._special]
        text: str = self.processor.decode(pieces)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """How each id is written, for pictures and logs; a model with more rows may say ids beyond."""
        return [self._piece(int(id)) for id in ids]

    def _piece(self, id: int) -> str:
        if id >= self.size:
            return f"<{id}>"
        return self._names.get(id) or self._spelled[id - self.offset]

    def starts(self, ids: Sequence[int]) -> list[bool]:
        """Whether each id begins a word: its piece has the mark of a space, or it is special."""
        pieces, special = self.pieces(ids), [int(id) in self._special for id in ids]
        if self._behind:  # the mark ends a word
            ends = [True, *(mine or piece.endswith("▁") for mine, piece in zip(special, pieces, strict=True))]
            return [mine or ended for mine, ended in zip(special, ends[:-1], strict=True)]
        return [mine or piece.startswith("▁") for mine, piece in zip(special, pieces, strict=True)]

    def save(self, folder: Path) -> None:
        """Write the model file and the note that says what it is."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model)
        note = {"kind": "sentencepiece", "layout": self.layout, "size": self.size}
        note |= {"start": self.start_id, "end": self.end_id, "pad": self.pad_id}
        note |= {"unknown": self.unknown_id, "mask": self.mask_id, "fingerprint": self.fingerprint}
        (folder / NOTE).write_text(json.dumps(note, indent=1))


class SentencePiece(Sampled):
    """A SentencePiece model trained on the captions and the prose of the sources."""

    pieces: int = Field(default=64_000, ge=8)
    """Pieces of the vocabulary; the tokenizer has two ids more, <pad> and <mask>."""
    model: Literal["unigram", "bpe"] = "unigram"
    """Kind of model."""
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    """Share of the characters of the corpus that get a piece of their own."""
    byte_fallback: bool = False
    """Whether other characters become the bytes of their UTF-8, for which 256 of the pieces are set aside; if
    not, they become <unk>."""
    normalisation: Literal["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"] = "nmt_nfkc"
    """What is done to a text first: NFKC, with rules for white space (nmt), in small letters (cf); or
    nothing. It is part of the model."""
    symbols: list[str] = Field(default_factory=list)
    """Strings that are always one piece, and never part of another."""
    sentence_bytes: int = Field(default=1 << 16, ge=64, le=1 << 30)
    """Longest text in training, in bytes; longer ones are split at white space."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Threads of the training. With more than 1 the result depends on their number."""

    @field_validator("symbols")
    @classmethod
    def _usable(cls, symbols: list[str]) -> list[str]:
        taken = {name for names in NAMES.values() for name in names} | {"<unk>"}
        for symbol in symbols:
            if not symbol or re.search(r"[\s▁▅\0\ud800-\udfff]", symbol):
                raise ValueError(f"a symbol must be a text without white space, got {symbol!r}")
            if symbol in taken:
                raise ValueError(f"'{symbol}' is a special token already; leave it out")
        if len(set(symbols)) < len(symbols):
            raise ValueError("a symbol is named twice; name each once")
        return symbols

    def plan(self) -> Mapping[str, Any]:
        more = ", bytes for rare characters" if self.byte_fallback else ""
        return {"tokenizer": f"SentencePiece {self.model}, {self.pieces} pieces{more}"}

    def train(self, sources: Sequence[Source], job: Job) -> Mapping[str, Any]:
        ranks = dist.start()
        metrics: dict[str, Any] = {}
        if ranks.main:
            sample = self.sample(sources, job.log)
            tokenizer = self.fit(sample, job.log)
            tokenizer.save(job.folder / "tokenizer")
            metrics, counts = measured(tokenizer, sample, job)
            metrics |= _shares(tokenizer, sample, counts)
        found: Mapping[str, Any] = ranks.broadcast_object(metrics)
        return found

    @classmethod
    def load(cls, folder: Path) -> SentencePieceTokenizer:
        """Read the tokenizer of a folder, or a bare ``.spm`` / ``.model`` file.

        Raises:
            DataError: it is no SentencePiece model, has no <unk>, or is not the one that was saved.
        """
        file = folder / MODEL_FILE if folder.is_dir() else folder
        try:
            found = SentencePieceTokenizer(_content(file))
            saved = json.loads((folder / NOTE).read_text()) if folder.is_dir() else {}
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            reason = str(error).rpartition("] ")[2].strip() or str(error)
            raise DataError(f"{file}: not a SentencePiece model ({reason}); copy it again") from error
        if saved.get("fingerprint") not in (None, found.fingerprint):
            raise DataError(f"{file} was changed: its hash is not the one in {NOTE}")
        return found

    def fit(self, sample: Sample, log: Any = None) -> SentencePieceTokenizer:
        """A tokenizer trained on a sample.

        Raises:
            UserError: the sample does not allow this number of pieces; says the largest or smallest possible.
            DataError: the texts hold nothing but white space.
        """
        written = io.BytesIO()
        lines, settings = _Lines(sample.texts, self.sentence_bytes), self._settings()
        if self.sentences <= 100 or any(len(text) > self.sentence_bytes for text in sample.texts):
            # SentencePiece allows no sample as small, and of the parts of long texts it must not draw one
            settings["input_sentence_size"] = 0
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=written, minloglevel=2, **settings
            )
        except RuntimeError as error:
            raise self._refusal(str(error)) from error
        if log and (told := lines.told()):
            log.note(told)
        return SentencePieceTokenizer(written.getvalue())

    def _settings(self) -> dict[str, Any]:
        """What SentencePiece is told; it writes all of it into the model."""
        changed: dict[str, Any] = {}
        if self.byte_fallback:
            changed["byte_fallback"] = True
        if self.normalisation != "nmt_nfkc":
            changed["normalization_rule_name"] = self.normalisation
        if self.symbols:
            changed["user_defined_symbols"] = self.symbols
        return {
            "vocab_size": self.pieces,
            "model_type": self.model,
            "character_coverage": self.character_coverage,
            "input_sentence_size": self.sentences,
            "shuffle_input_sentence": True,
            "max_sentence_length": self.sentence_bytes,
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "pad_id": -1,
            "num_threads": self.threads,
            **changed,
        }

    def _refusal(self, said: str) -> BeitctlError:
        """SentencePiece's refusal in words that say what to change."""
        begin = f"SentencePiece cannot train {self.pieces} pieces on this corpus"
        if found := re.search(r"too high .* <= (\d+)", said):
            most = int(found[1])
            advice = "set pieces to that or less, or give more text" if most >= 8 else "give more text"
            return UserError(f"{begin}: it allows at most {most}; {advice}")
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
            parts = "<unk>, <s>, </s>" + (", 256 bytes" if self.byte_fallback else "")
            parts += f", {len(self.symbols)} symbols" if self.symbols else ""
            return UserError(
                f"{begin}: it needs at least {found[1]} ({parts} and one for each character); set pieces to "
                f"that or more, or lower character_coverage ({self.character_coverage})"
            )
        if "all_chars_count" in said or "sentences_.empty()" in said:
            return DataError("the texts of the sources hold nothing but white space; correct the sources")
        return UserError(f"{begin}: {said.rpartition(']')[2].strip() or said}")


class _Lines:
    """The texts as SentencePiece reads them: it leaves out, without a word, what it does not like."""

    def __init__(self, texts: Sequence[bytes], most: int) -> None:
        self.texts, self.most = texts, most
        self.long = self.parts = self.reserved = 0

    def __iter__(self) -> Iterator[bytes]:
        for text in self.texts:
            line = text
            if RESERVED in line:
                self.reserved += 1
                line = line.replace(RESERVED, b" ")
            if len(line) <= self.most:
                yield line
                continue
            parts = split(line, self.most)
            self.long += 1
            self.parts += len(parts)
            yield from parts

    def told(self) -> str:
        """What was done to the texts, as one sentence; empty if nothing was."""
        found = []
        if self.long:
            found.append(
                f"{self.long:,} texts longer than sentence_bytes ({self.most:,}) were split into "
                f"{self.parts:,}"
            )
        if self.reserved:
            found.append(f"U+2585, which SentencePiece reserves, became a space in {self.reserved:,} texts")
        return "; ".join(found)


def _content(file: Path) -> bytes:
    data = file.read_bytes()
    if not data:
        raise ValueError("the file is empty")
    return data


def _arranged(found: Any) -> tuple[Literal["xlm-r", "own"], dict[str, int], int]:
    """Layout of a model, its special ids, and the number of ids."""
    pieces = found.get_piece_size()
    own = {role: _first(found, names) for role, names in NAMES.items()}
    own |= {
        role: id
        for role, id in (("start", found.bos_id()), ("end", found.eos_id()), ("pad", found.pad_id()))
        if id >= 0
    }
    if (found.unk_id(), own["start"], own["end"], own["pad"], own["mask"]) == (0, 1, 2, -1, -1):
        return "xlm-r", XLM_R | {"mask": pieces + OFFSET}, pieces + OFFSET + 1  # two ids are no pieces
    for role in NAMES:
        if own[role] < 0:
            own[role], pieces = pieces, pieces + 1
    return "own", own | {"unknown": found.unk_id()}, pieces


def _first(found: Any, names: Sequence[str]) -> int:
    """The first of some names that is a symbol of the model, and not a piece that was learnt; -1 for none."""
    for name in names:
        id: int = found.piece_to_id(name)
        ordinary = found.is_unknown(id) or found.is_byte(id) or found.is_unused(id)
        if not ordinary and (found.is_control(id) or found.get_score(id) == 0):
            return id
    return -1


def _shares(tokenizer: SentencePieceTokenizer, sample: Sample, counts: Counter[int]) -> dict[str, float]:
    """Share of the ids that are bytes, and of the characters (after normalisation) that the pieces hold."""
    processor, letters = tokenizer.processor, Counter[str]()
    for data in sample.measured:
        letters.update(processor.normalize(data.decode()))
    learnt = [p for p in range(processor.get_piece_size()) if _learnt(processor, p)]
    known = set("".join(processor.id_to_piece(p) for p in learnt))
    bytes_ = sum(n for id, n in counts.items() if processor.is_byte(id - tokenizer.offset))
    return {
        "byte_share": bytes_ / max(1, counts.total()),
        "characters_covered": sum(letters[c] for c in known) / max(1, letters.total()),
    }


def _learnt(processor: Any, piece: int) -> bool:
    """Whether a piece stands for characters, and not for a byte or for nothing."""
    return not (
        processor.is_unknown(piece)
        or processor.is_control(piece)
        or processor.is_unused(piece)
        or processor.is_byte(piece)
    )
