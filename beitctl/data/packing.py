"""Documents to sequences of a set length: cut between sentences where possible, and nothing left out.

As RoBERTa's FULL-SENTENCES (arXiv:1907.11692, section 4.2): sentences are taken in order until the next one
does not fit; a sequence may go on with the next document, behind the id that ends a text. A sentence longer
than a sequence is cut. Documents are packed in blocks, each on its own, so that ranks share the counting.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beitctl.api import Example, Examples, TextTokenizer
from beitctl.data.arrays import cache_folder, cached
from beitctl.data.order import digest
from beitctl.errors import ChangedError, DataError

BLOCK = 16_384
"""Documents that are packed together."""

_END = re.compile(r"(?<=[.!?…])(?P<close>[\"'”’»)\]]*)\s+|(?<=[。！？।])(?P<wide>[」』”’）]*)\s*|\n+")
"""Where a sentence ends: a mark and a space, a mark of a script that sets none, or a line break."""


def sentences(text: str) -> list[str]:
    """Parts of a text that end where a sentence probably does; white space between them is left out.

    An abbreviation in the middle of a sentence may be taken for its end: sequences may then be cut there.
    """
    found, first = [], 0
    for match in _END.finditer(text):
        end = max(match.end("close"), match.end("wide"), match.start())
        if part := text[first:end].strip():
            found.append(part)
        first = match.end()
    if part := text[first:].strip():
        found.append(part)
    return found


def cuts(documents: Iterable[Sequence[int]], room: int) -> NDArray[np.int64]:
    """Where sequences of at most ``room`` ids begin, (sequences, 3): document, sentence, id in the sentence.

    Args:
        documents: ids in every sentence of every document, in order.
        room: ids in a sequence; between two documents one goes to the id that ends a text.
    """
    found: list[tuple[int, int, int]] = []
    used = room
    for number, counts in enumerate(documents):
        between = 1  # before the first sentence of a document, unless it begins a sequence
        for sentence, count in enumerate(counts):
            if not count:
                continue
            if used + between + count <= room:
                used += between + count
            else:
                pieces = range(0, count, room)
                found += [(number, sentence, piece) for piece in pieces]
                used = count - pieces[-1]
            between = 0
    return np.array(found, np.int64).reshape(-1, 3)


class _UnreadError(Exception):
    """A document of a block cannot be read, so that its counts are not for the cache."""


class Packed:
    """Examples of prose as sequences of ids; speaks the protocol of ``Examples``."""

    def __init__(
        self, documents: Examples, tokenizer: TextTokenizer, room: int, *, rank: int = 0, world: int = 1,
        told: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        """Find where the sequences begin: read and count all documents, or take what was counted before.

        Args:
            documents: examples with ``text``.
            tokenizer: turns sentences into ids.
            room: most ids in a sequence, without start and end.
            rank: of this process; each begins with blocks of its own, and finds those of others done.
            world: number of processes.
            told: called with notes on the progress.

        Raises:
            DataError: there is no text.
        """
        if room < 1:
            raise ValueError(f"room ({room}) must be positive")
        self.documents, self.tokenizer, self.room = documents, tokenizer, room
        self.fingerprint = digest(documents.fingerprint, tokenizer.fingerprint, "packed", room).hex()
        self.state: str = getattr(documents, "state", "")
        self.unread: dict[int, str] = {}
        """Documents that could not be read when they were counted, and why."""
        self.blocks = -(-len(documents) // BLOCK)
        self.problems: list[str] = list(getattr(documents, "problems", []))
        if getattr(documents, "parts", None):
            raise ValueError("pack the parts of a mixture with weights one by one")
        found: dict[int, NDArray[np.int64]] = {}
        for turn in range(self.blocks):
            block = (turn + rank * self.blocks // world) % self.blocks
            found[block] = self._block(block)
            if self.blocks > 1:
                told(f"packing text: {turn + 1} of {self.blocks} blocks of {BLOCK:,} documents")
        self.ends = np.cumsum([len(found[block]) for block in range(self.blocks)], dtype=np.int64)
        self.starts = np.concatenate([found[block] for block in range(self.blocks)])
        if not len(self.starts):
            raise DataError("no text to pack: every document is empty or cannot be read")
        self.shards = self._shards()
        self.window = -(-getattr(documents, "window", 0) * len(self.starts) // len(documents))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        place = range(len(self))[index]
        first, sentence, piece = self.starts[place].tolist()
        block = int(np.searchsorted(self.ends, place, side="right"))
        stop = (min(len(self.documents), (block + 1) * BLOCK), 0, 0)
        if place + 1 < self.ends[block]:
            stop = tuple(self.starts[place + 1].tolist())
        ids: list[int] = []
        for number in range(first, stop[0] + (stop[1:] > (0, 0))):
            if number in self.unread:
                continue
            end = stop[1:] if number == stop[0] else None
            part = self._ids(number, (sentence, piece) if number == first else (0, 0), end)
            ids += [self.tokenizer.end_id, *part] if ids and part else part
        if not 0 < len(ids) <= self.room:
            raise ChangedError(
                f"document {first} and those behind it have {len(ids)} ids where at most {self.room} were "
                "counted: the text has changed since, with its size as it was; remove the folder 'packed' in "
                f"{cache_folder()} and start the run again"
            )
        id = f"{self.documents[first].id}+{sentence}.{piece}"
        return Example(id, token_ids=np.array(ids, np.int64))

    def _ids(self, number: int, begin: tuple[int, int], end: tuple[int, int] | None) -> list[int]:
        """Ids of a document from one place to another, each a sentence and an id in it."""
        parts = self._sentences(number)
        last = len(parts) if end is None else end[0] + (end[1] > 0)
        ids: list[int] = []
        for sentence in range(begin[0], last):
            found = self.tokenizer.encode(parts[sentence])
            stop = end[1] if end is not None and sentence == end[0] else None
            ids += found[begin[1] if sentence == begin[0] else 0 : stop]
        return ids

    def _sentences(self, number: int) -> list[str]:
        return sentences(self.documents[number].text or "")

    def _block(self, block: int) -> NDArray[np.int64]:
        """Where the sequences of a block of documents begin; from the cache if they were counted before."""
        first = block * BLOCK
        numbers = range(first, min(len(self.documents), first + BLOCK))

        unread: dict[int, str] = {}
        key = digest(self.fingerprint, self.state, block, BLOCK).hex()
        with contextlib.suppress(_UnreadError):
            return np.array(cached("packed", key, lambda: self._counted(numbers, first, unread))["starts"])
        # not kept in the cache: what could not be read now may be read the next time
        self.unread |= unread
        self.problems += [f"{reason}" for reason in unread.values()]
        starts = cuts(self._counts(numbers, unread), self.room)
        starts[:, 0] += first
        return starts

    def _counted(self, numbers: range, first: int, unread: dict[int, str]) -> dict[str, NDArray[Any]]:
        starts = cuts(self._counts(numbers, unread), self.room)
        if unread:
            raise _UnreadError
        starts[:, 0] += first
        return {"starts": starts}

    def _counts(self, numbers: Iterable[int], unread: dict[int, str]) -> Iterator[list[int]]:
        """Ids in every sentence of documents; of those that cannot be read none, and why."""
        for number in numbers:
            try:
                parts = [] if number in unread else self._sentences(number)
            except ChangedError:
                raise
            except DataError as error:
                unread[number], parts = str(error), []
            yield [len(self.tokenizer.encode(part)) for part in parts]

    def _shards(self) -> tuple[int, ...]:
        """Sequences that begin in each shard of the documents."""
        shards = getattr(self.documents, "shards", ())
        if not len(shards):
            return ()
        ends = np.cumsum(np.array(shards, np.int64))
        within = np.searchsorted(ends, self.starts[:, 0], side="right")
        return tuple(np.bincount(within, minlength=len(shards)).tolist())
