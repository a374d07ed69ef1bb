"""The texts that a text tokenizer is trained on: read once, and a sample of them that fits in memory."""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from beitctl.api import Job, Log, Plugin, Source
from beitctl.data.labels import words
from beitctl.data.opening import opened
from beitctl.data.order import generator
from beitctl.errors import ChangedError, DataError

PROGRESS = 1_000_000
"""Texts between two notes in the log."""
OBJECT_BYTES = 160
"""What Python needs for a text of the sample besides its UTF-8."""
DRAWS = 4096
UNUSABLE = 0.001
"""Share of the examples of a source that may be unusable; one always may."""
TOLD = 20
"""Unusable examples that are told one by one."""
MEASURED = 1_000_000
"""Most texts that a finished tokenizer is measured on."""
GAPS = (b" ", b"\n", b"\t", b"\r")


@dataclass
class Sample:
    """The texts to train on, and what was counted on the way to them."""

    texts: list[bytes] = field(default_factory=list)
    """UTF-8, in the order of the corpus."""
    read: int = 0
    """Texts in the corpus."""
    characters: int = 0
    """Characters in the corpus."""

    @property
    def size(self) -> int:
        """Bytes of the sample."""
        return sum(map(len, self.texts))

    @property
    def measured(self) -> list[bytes]:
        """The texts, or as many from all over it as a tokenizer is measured on."""
        return self.texts[:: -(-len(self.texts) // MEASURED)]


class Sampled(Plugin):
    """The settings of a text tokenizer that say how much of the sources it is trained on."""

    sentences: int = Field(default=5_000_000, ge=1)
    """Most texts that are trained on; of a larger corpus a random sample of this size is read."""
    sample_mib: int = Field(default=2048, ge=1)
    """Most memory of that sample in MiB; the training itself takes several times as much."""
    seed: int = Field(default=0, ge=0)
    """Chooses the sample, and nothing else."""

    def sample(self, sources: Sequence[Source], log: Log) -> Sample:
        """Read every text and caption once, and keep a random sample.

        Every text gets a random number from the seed and its place in the corpus, and those with the smallest
        numbers stay: as many as the two limits allow, whatever their lengths. A corpus within the limits
        stays whole.

        Raises:
            DataError: there is no text, or the first one drawn is larger than the memory allowed.
        """
        found, kept = Sample(), _Smallest(self.sentences, self.sample_mib << 20)
        chances = _chances(self.seed)
        for text in texts(sources, log):
            data = utf8(text)
            kept.offer(next(chances), found.read, data)
            found.read += 1
            found.characters += len(text)
            if found.read % PROGRESS == 0:
                log.note(f"{found.read:,} texts read, {found.characters:,} characters")
        if not found.read:
            raise DataError("the sources hold neither text nor captions to train a tokenizer on")
        found.texts = kept.in_order()
        held = len(found.texts)
        if not held:
            raise DataError(
                f"sample_mib ({self.sample_mib}) has no room for a single text of this corpus; raise it, or "
                "split the texts"
            )
        if held < found.read:
            log.note(
                f"trained on a random sample of {held:,} of {found.read:,} texts ({found.size / 2**20:,.0f} "
                f"MiB; sentences = {self.sentences:,}, sample_mib = {self.sample_mib:,}, seed = {self.seed})"
            )
        return found


class _Smallest:
    """The texts with the smallest numbers, within a limit of count and one of bytes."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.held = count, size, 0
        self.heap: list[tuple[float, int, bytes]] = []  # the largest number first
        self.bound = 2.0  # a text that had to go, and all above it, never come back

    def offer(self, chance: float, place: int, data: bytes) -> None:
        """Keep one more text, and let go of those with the largest numbers if it is too much."""
        if chance >= self.bound:
            return
        heapq.heappush(self.heap, (-chance, place, data))
        self.held += len(data) + OBJECT_BYTES
        while len(self.heap) > self.count or self.held > self.size:
            negative, _, gone = heapq.heappop(self.heap)
            self.held -= len(gone) + OBJECT_BYTES
            self.bound = -negative

    def in_order(self) -> list[bytes]:
        """The texts in the order of the corpus."""
        return [data for _, _, data in sorted(self.heap, key=lambda row: row[1])]


def texts(sources: Sequence[Source], log: Log | None = None) -> Iterator[str]:
    """Every caption and text of the sources, one at a time, without the pictures where a source can.

    Raises:
        DataError: more than ``UNUSABLE`` of the examples of a source cannot be used.
    """
    for source in sources:
        examples = opened(source)
        problems = 0
        for index in range(len(examples)):
            try:
                yield from words(examples, index)
            except ChangedError:
                raise
            except DataError as error:
                problems += 1
                if problems > max(1, UNUSABLE * len(examples)):
                    raise DataError(
                        f"{problems} of the first {index + 1} examples of a source cannot be used, more than "
                        f"{UNUSABLE:g} of all: {error}"
                    ) from error
                if log is not None and problems <= TOLD:
                    log.warning("W301", f"left out: {error}", "replace it, or leave it: the run goes on")


def measured(tokenizer: Any, sample: Sample, job: Job) -> tuple[dict[str, Any], Counter[int]]:
    """How well a tokenizer writes its own sample, and how often each id is used; draws how it cuts texts."""
    counts, characters = Counter[int](), 0
    used = sample.measured
    for data in used:
        text = data.decode()
        characters += len(text)
        counts.update(tokenizer.encode(text))
    shown = [data.decode() for data in used[:8]]
    job.log.table(
        "pieces",
        "How the first texts are cut",
        ("text", "pieces"),
        [(text[:120], " ".join(tokenizer.pieces(tokenizer.encode(text)[:40]))) for text in shown],
    )
    count = max(1, counts.total())
    metrics = {
        "ids": tokenizer.size,
        "texts": sample.read,
        "characters": sample.characters,
        "texts_trained_on": len(sample.texts),
        "characters_per_token": characters / count,
        "unknown_share": counts[tokenizer.unknown_id] / count,
    }
    return metrics, counts


def utf8(text: str) -> bytes:
    """A text as UTF-8. Halves of surrogate pairs are joined, a half alone becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def split(data: bytes, most: int) -> list[bytes]:
    """Parts of a text of at most ``most`` bytes, cut at white space, or between characters if there is none.

    Nothing is lost but the white space at the cuts.
    """
    parts, first = [], 0
    while len(data) - first > most:
        last = first + most
        cut = max(data.rfind(gap, first, last + 1) for gap in GAPS)
        if cut <= first:
            cut = last
            while cut > first + 1 and data[cut] & 0xC0 == 0x80:  # inside a character
                cut -= 1
        parts.append(data[first:cut])
        first = cut
        while first < len(data) and data[first : first + 1] in GAPS:
            first += 1
    return [*parts, data[first:]] if first < len(data) or not parts else parts


def _chances(seed: int) -> Iterator[float]:
    """Endless random numbers in 0..1."""
    draw = generator(seed, "text sample")
    while True:
        yield from draw.random(DRAWS)
