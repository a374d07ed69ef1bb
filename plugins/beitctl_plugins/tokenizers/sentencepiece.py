"""SentencePiece with the ids of XLM-R, which BEiT-3's text tokenizer has."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import sentencepiece
from pydantic import Field

from beitctl.api import Job, Plugin, Source
from beitctl.engine import dist
from beitctl.errors import DataError, UserError

MODEL_FILE = "tokenizer.spm"
OFFSET = 1
"""A piece with SentencePiece id p >= 3 has id p + 1 (fairseq's layout)."""
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}


class SentencePieceTokenizer:
    """Text to ids: <s> 0, <pad> 1, </s> 2, <unk> 3, pieces from 4, <mask> last."""

    def __init__(self, model: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.model = model
        self.size: int = self.processor.get_piece_size() + OFFSET + 1  # <pad> and <mask> are not pieces
        self.fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without <s> and </s>."""
        return [id + OFFSET if id > 2 else SPECIAL["<unk>"] for id in self.processor.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special ones are left out."""
        pieces = [int(id) - OFFSET for id in ids if SPECIAL["<unk>"] < id < self.size - 1]
        text: str = self.processor.decode(pieces)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """How each id is written, for pictures and logs; a model with more rows may say ids beyond."""
        names = {id: name for name, id in SPECIAL.items()} | {self.size - 1: "<mask>"}
        names |= {int(id): f"<{int(id)}>" for id in ids if id >= self.size}
        return [names.get(int(id)) or self.processor.id_to_piece(int(id) - OFFSET) for id in ids]

    def starts(self, ids: Sequence[int]) -> list[bool]:
        """Whether each id begins a word: its piece has the mark of a space, or it is special."""
        return [
            piece.startswith("▁") or id < OFFSET + 3 for piece, id in zip(self.pieces(ids), ids, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write the model file and the note that says what it is."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model)
        note = {"kind": "sentencepiece", "size": self.size, "fingerprint": self.fingerprint}
        (folder / "tokenizer.json").write_text(json.dumps(note, indent=1))


class SentencePiece(Plugin):
    """A SentencePiece model trained on the captions and the prose of the sources."""

    pieces: int = Field(default=64_000, ge=8)
    """Pieces of the vocabulary; the tokenizer has two ids more, <pad> and <mask>."""
    model: Literal["unigram", "bpe"] = "unigram"
    """Kind of model."""
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    """Share of the characters of the corpus that get a piece of their own."""
    sentences: int = Field(default=5_000_000, ge=1)
    """Most sentences that are read; more are sampled."""

    def plan(self) -> Mapping[str, Any]:
        return {"tokenizer": f"SentencePiece {self.model}, {self.pieces} pieces"}

    def train(self, sources: Sequence[Source], job: Job) -> Mapping[str, Any]:
        ranks = dist.start()
        if ranks.main:
            self._train(sources).save(job.folder / "tokenizer")
        ranks.barrier()
        tokenizer = self.load(job.folder / "tokenizer")
        texts = list(_texts(sources))
        ids = [tokenizer.encode(text) for text in texts]
        count = sum(map(len, ids))
        unknown = sum(row.count(SPECIAL["<unk>"]) for row in ids)
        job.log.table(
            "pieces",
            "How the first texts are cut",
            ("text", "pieces"),
            [(t[:120], " ".join(tokenizer.pieces(row[:40]))) for t, row in zip(texts[:8], ids, strict=False)],
        )
        return {
            "ids": tokenizer.size,
            "texts": len(texts),
            "characters_per_token": sum(map(len, texts)) / max(1, count),
            "unknown_share": unknown / max(1, count),
        }

    @classmethod
    def load(cls, folder: Path) -> SentencePieceTokenizer:
        """Read the tokenizer of a folder, or a bare ``.spm`` / ``.model`` file.

        Raises:
            DataError: it is no SentencePiece model.
        """
        file = folder / MODEL_FILE if folder.is_dir() else folder
        try:
            return SentencePieceTokenizer(file.read_bytes())
        except (RuntimeError, OSError) as error:
            raise DataError(f"{file}: not a SentencePiece model ({error})") from error

    def _train(self: Self, sources: Sequence[Source]) -> SentencePieceTokenizer:
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_texts(sources),
                model_writer=written,
                vocab_size=self.pieces,
                model_type=self.model,
                character_coverage=self.character_coverage,
                input_sentence_size=self.sentences,
                shuffle_input_sentence=True,
                max_sentence_length=1 << 16,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                num_threads=1,  # the result must not depend on the machine
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rpartition("]")[2].strip() or str(error)
            raise UserError(
                f"SentencePiece cannot train {self.pieces} pieces on this corpus: {reason}"
            ) from error
        return SentencePieceTokenizer(written.getvalue())


def _texts(sources: Sequence[Source]) -> Iterator[str]:
    """Every text and caption of the sources.

    Raises:
        DataError: there is none.
    """
    empty = True
    for source in sources:
        examples = source.open()
        for index in range(len(examples)):
            example = examples[index]
            for text in (*example.captions, *([example.text] if example.text else [])):
                empty = False
                yield text
    if empty:
        raise DataError("the sources hold neither text nor captions to train a tokenizer on")
