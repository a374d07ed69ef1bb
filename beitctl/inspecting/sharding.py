"""``beitctl data pack``: usable examples of a source, made small, in shards that are read fast.

Where a shard ends follows from the examples in it alone: it is full with the one that takes it to the wanted
size. So a pack that was interrupted goes on after its last complete shard, and ends with the same bytes.
"""

import contextlib
import errno
import functools
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import PIL
import pyarrow
import torchvision
from PIL import features

from beitctl.api import Examples
from beitctl.data.images import Pictures
from beitctl.data.lock import locked
from beitctl.errors import CapacityError, DataError, Interrupted
from beitctl.failures import FULL
from beitctl.inspecting.finding import Found
from beitctl.inspecting.journal import LEFT_OUT, VERSION, Entry, Journal, refuse_others
from beitctl.inspecting.looking import Seen
from beitctl.inspecting.ordered import in_order
from beitctl.inspecting.resizing import prepare
from beitctl.inspecting.shards import Hashed, ParquetShard, Ready, Shard, TarShard
from beitctl.report.bars import Bar
from beitctl.report.events import plain
from beitctl.report.naming import printable

MANY = 1000
"""So many broken examples end a pack at once if they are too large a share of the source already."""


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the shards, besides the data."""

    px: int = 256
    """Larger pictures are shrunk until their short side has so many pixels."""
    quality: int = 90
    """Of JPEG."""
    format: Literal["parquet", "tar"] = "parquet"
    shard_bytes: int = 256 * 2**20
    """A shard is full when its examples have so many bytes."""


@dataclass(frozen=True)
class Limits:
    """What changes nothing in the shards."""

    workers: int = 2
    """Threads that decode and encode."""
    max_bad_share: float = 0.001
    """Largest share of broken examples."""
    quiet: bool = False
    """Draw no bar."""


def write(
    found: Found, examples: Examples, out: Path, settings: Settings, limits: Limits = Limits()
) -> dict[str, Any]:
    """Write all usable examples in order; returns what ``packed.json`` says.

    Raises:
        UserError: the folder holds something else, or examples have parts that shards cannot hold.
        DataError: nothing is usable, or too much is not; the shards so far stay, to go on with.
        CapacityError: the disk is full.
        Interrupted: by Ctrl-C.
    """
    try:
        refuse_others(out)
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            journal = Journal(out, _identity(found, examples, settings))
            if journal.done is not None:
                return journal.done
            _write_missing(journal, examples, settings, limits)
            return _finished(journal, examples, limits)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the same command goes on after the last complete shard in {out}"
        ) from None
    except OSError as error:
        if error.errno not in (*FULL, errno.EFBIG):
            raise
        raise CapacityError(
            f"{out}: {error.strerror}; free some space, then give the same command again: it goes on after "
            "the last complete shard"
        ) from error


def _identity(found: Found, examples: Examples, settings: Settings) -> dict[str, Any]:
    return {
        "version": VERSION,
        "source": {"kind": found.kind, **plain(found.table)},
        "fingerprint": examples.fingerprint,
        "examples": len(examples),
        "settings": asdict(settings),
        "software": {
            "pillow": PIL.__version__,
            "libjpeg": str(features.version("jpg")),
            "pyarrow": pyarrow.__version__,
            "torchvision": torchvision.__version__,
        },
    }


def _write_missing(journal: Journal, examples: Examples, settings: Settings, limits: Limits) -> None:
    """Write the shards that are not there yet."""
    total = len(examples)
    one = functools.partial(
        prepare,
        examples,
        px=settings.px,
        quality=settings.quality,
        pictures=Pictures(),
        words_only=settings.format == "parquet",
    )
    rest = range(journal.stop, total)
    with (
        contextlib.closing(in_order(one, rest, limits.workers)) as stream,
        Bar("packing", total, quiet=limits.quiet, done=journal.stop) as bar,
    ):
        while journal.stop < total:
            draft = _Draft(journal.folder, len(journal.shards), settings)
            try:
                for item in stream:
                    draft.add(item)
                    bar.advance()
                    bad = journal.bad + len(draft.left_out)
                    if bad >= MANY and bad > limits.max_bad_share * total:
                        raise _too_many(journal, examples, limits, draft.left_out)
                    if draft.filled >= settings.shard_bytes:
                        break
                journal.add(draft.complete(journal.stop))
            finally:
                draft.abandon()


def _finished(journal: Journal, examples: Examples, limits: Limits) -> dict[str, Any]:
    """The summary of a pack whose shards are all there."""
    if journal.bad > limits.max_bad_share * len(examples) or not journal.shards:
        raise _too_many(journal, examples, limits, [])
    return journal.finish(_problems(examples))


def _problems(examples: Examples) -> list[str]:
    return list(getattr(examples, "problems", ()))


def _too_many(journal: Journal, examples: Examples, limits: Limits, more: list[dict[str, str]]) -> DataError:
    """The error that ends a pack with too many broken examples; lists them in the folder."""
    bad = [*journal.left_out, *more]
    journal.write_left_out(_problems(examples), more)
    lines = [f"\n  {printable(row['id'])}: {printable(row['reason'])}" for row in bad[:5]]
    first = "".join([*lines, "\n  ..."] if len(bad) > 5 else lines)
    where, total = f"{journal.folder}: ", len(examples)
    listed = f"{journal.folder / LEFT_OUT} lists them"
    if len(bad) == total:
        return DataError(f"{where}none of {total:,} examples can be used; {listed}:{first}")
    share = math.ceil(1000 * len(bad) / total) / 1000
    return DataError(
        f"{where}{len(bad):,} of {total:,} examples are broken, more than the {limits.max_bad_share:.2%} "
        f"that are allowed; {listed}. Replace them, remove the folder and pack again, or go on without them: "
        f"the same command with --max-bad-share {share:g}{first}"
    )


class _Draft:
    """A shard in the making, under a name of its own until it is complete."""

    def __init__(self, folder: Path, number: int, settings: Settings) -> None:
        tar = settings.format == "tar"
        self.name = f"{number:05d}.tar" if tar else f"data-{number:05d}.parquet"
        self._place, self._path = folder / f".{self.name}.tmp", folder / self.name
        self._file = self._place.open("wb")
        self._hashed = Hashed(self._file)
        self._shard: Shard = TarShard(self._hashed) if tar else ParquetShard(self._hashed)
        self.taken = self.examples = self.filled = 0
        self.having: Counter[str] = Counter()
        self.left_out: list[dict[str, str]] = []

    def add(self, item: Ready | Seen) -> None:
        """Write an example, or note why it is broken."""
        self.taken += 1
        if isinstance(item, Seen):
            self.left_out.append({"id": item.id, "reason": item.reason})
            return
        self._shard.add(item)
        self.examples += 1
        for name in ("image", "captions", "label", "text", "copied"):
            self.having[name] += getattr(item, name) not in (None, (), False)
        self.filled += item.size

    def complete(self, first: int) -> Entry:
        """Give the shard its name, unless nothing is in it."""
        stop = first + self.taken
        if not self.examples:
            return Entry(stop, left_out=self.left_out)
        self._shard.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._place.replace(self._path)
        hashed = self._hashed
        return Entry(
            stop, self.name, self.examples, dict(self.having), hashed.size, hashed.hexdigest(), self.left_out
        )

    def abandon(self) -> None:
        """Remove what is not complete."""
        if not self._file.closed:
            self._hashed.abandon()
            with contextlib.suppress(Exception):  # only so that its writer does not try again later
                self._shard.close()
            with contextlib.suppress(OSError):  # of a full disk, again
                self._file.close()
        self._place.unlink(missing_ok=True)
