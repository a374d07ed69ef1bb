"""Samples in tar files."""

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from beitctl.api import Example, Plugin
from beitctl.data import tar_keys
from beitctl.errors import DataError
from beitctl.report.naming import printable
from beitctl_plugins.sources.opened import Opened, check_share
from beitctl_plugins.sources.reading import tar_index
from beitctl_plugins.sources.reading.hashing import FileHash
from beitctl_plugins.sources.reading.metadata import CAPTION_BYTES, captions_in
from beitctl_plugins.sources.reading.names import PICTURES
from beitctl_plugins.sources.reading.rows import Files, UnusableError, encoded
from beitctl_plugins.sources.reading.shards import Shard, shards

MOST_TEXT_BYTES = 16 * 2**20
MOST_PICTURE_BYTES = 512 * 2**20
JSON = "json:"
GUESS_FILES = 1000
GUESS_MEMBERS = 12


class WebDataset(Plugin):
    """Samples in tar files, as img2dataset and webdataset write them.

    Members whose paths are the same up to the first dot of the name form a sample: ``000.jpg``, ``000.txt``
    and ``000.json``. Members with hidden names, and files next to the tars, are not looked at. Nothing is
    ever extracted. The tars are indexed at first use, which reads only their headers, and the index is kept
    in the cache folder.

    An example is named by its key, or by the ``id`` in its .json where ``beitctl data pack`` made the key of
    that; by tar and key where several tars use the same keys.
    """

    path: Path
    """A .tar file, a folder of them, a pattern with ``*``, or one such as ``data/{00000..00041}.tar``."""
    caption: str = ""
    """Member with the caption: ``txt``, or ``json:title`` for a key of the .json member. Samples without are
    unusable then. Empty: every text of the list ``captions`` in the .json member; without that and ``text``
    also ``txt``, else ``json:caption``; else none."""
    label: str = ""
    """Member with the class: ``cls``, or ``json:key`` for a key of the .json member; empty: there is none."""
    text: str = ""
    """Member with prose, such as ``txt``, or ``json:key``; a sample needs no picture then."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Largest share of unusable samples to go on with."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("caption", "label", "text"):
            value = getattr(self, name)
            if value.startswith(".") or value == JSON or value != value.strip():
                raise ValueError(
                    f"{name} = {value!r}: expected the ending of a member, such as 'txt', or 'json:key'"
                )
        if self.text and self.caption == self.text:
            raise ValueError(f"caption and text are both {self.text!r}; remove one of them")
        return self

    @classmethod
    def guess(cls, path: Path) -> tuple[int, dict[str, Any]] | None:
        """A tar, or a folder with tars at its top."""
        tar: Path | None = path if path.is_file() and path.name.lower().endswith(".tar") else None
        if path.is_dir():
            with os.scandir(path) as found:
                names = [entry.name for entry in itertools.islice(found, GUESS_FILES)]
            tars = sorted(name for name in names if name.lower().endswith(".tar") and name[0] != ".")
            tar = path / tars[0] if tars else None
        if tar is None:
            return None
        table: dict[str, Any] = {"path": str(path)}
        names = tar_index.first_names(tar, GUESS_MEMBERS)
        endings = {name.rpartition("/")[2].partition(".")[2].lower() for name in names}
        if "cls" in endings:
            table["label"] = "cls"
        if "txt" in endings and not endings.intersection(PICTURES):
            table["text"] = "txt"
        return 6, table

    def open(self) -> Opened:
        """Index the tars, or read their index.

        Raises:
            DataError: there is no tar, nothing usable in them, or too many unusable samples.
        """
        if self.path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise DataError(
                f"{self.path}: compressed, but samples are read from any place in it; decompress it first"
            )
        tars = shards(self.path, (".tar",))
        members = tar_index.index(tars)
        samples = self._samples(tars, members)
        _check_unread(self.path, members, tars, self.max_bad_share)
        check_share(self.path, samples.problems, len(samples.rows), self.max_bad_share)
        firsts = np.cumsum([0, *members.counts])
        settings = self.model_dump_json(exclude={"path", "max_bad_share"})
        reader = _Reader(self, tars, members, firsts, Files(str(tar.path) for tar in tars))
        hashed = FileHash.of(reader.files, [tar.name for tar in tars])
        spoken = self.caption or self.text or not {"txt", "json"}.isdisjoint(members.kinds)
        return Opened(
            samples.rows,  # type: ignore[arg-type]
            reader.example,
            hashed.key(settings),
            samples.problems,
            np.diff(np.searchsorted(samples.rows, firsts)).tolist(),
            samples.lengths,
            reader.label if self.label else None,
            worded=reader.words if spoken else None,
            state=hashed.state(),
        )

    def _samples(self, tars: Sequence[Shard], members: tar_index.Members) -> "_Samples":
        """Which samples can be used, judged by the names and sizes of their members."""
        columns = _Columns(members)
        reasons = np.zeros(len(members.keys), np.int8)
        texts = ["txt", "json"] if not self.caption else [_member(self.caption)]
        needed = [name for name in (self.caption, self.label, self.text) if name]
        for reason, bad in (
            (1, np.zeros(0, bool) if self.text else columns.size(*PICTURES) < 0),
            (2, columns.size(*PICTURES) == 0),
            (3, columns.size(*PICTURES) > MOST_PICTURE_BYTES),
            *((4 + place, columns.size(_member(name)) <= 0) for place, name in enumerate(needed)),
            (7, columns.largest({*texts, *map(_member, needed)}) > MOST_TEXT_BYTES),
            (8, columns.size(*(set(texts) - {"json", _member(self.text)})) > CAPTION_BYTES),
        ):
            if len(bad):
                reasons[bad & (reasons == 0)] = reason
        words = {
            1: f"no picture (.{', .'.join(PICTURES)})",
            2: "the picture is empty",
            3: f"the picture is larger than {MOST_PICTURE_BYTES >> 20} MiB",
            **{4 + place: f"no .{_member(name)}, or an empty one" for place, name in enumerate(needed)},
            7: f"a text is larger than {MOST_TEXT_BYTES >> 20} MiB",
            8: f"the caption is longer than {CAPTION_BYTES >> 20} MiB",
        }
        tar_of = np.searchsorted(np.cumsum(members.counts), np.flatnonzero(reasons), "right")
        problems = [
            f"{tars[tar].name}:{printable(members.keys[place])}: {words[int(reasons[place])]}"
            for tar, place in zip(tar_of.tolist(), np.flatnonzero(reasons).tolist(), strict=True)
        ]
        rows = np.flatnonzero(reasons == 0)
        lengths = columns.size(*([_member(self.text)] if self.text else texts))[rows]
        return _Samples(
            rows, [*members.problems, *problems], np.maximum(lengths, 0) if (lengths > 0).any() else None
        )


@dataclass(frozen=True)
class _Samples:
    rows: NDArray[np.int64]
    problems: list[str]
    lengths: NDArray[np.int64] | None


class _Columns:
    """Sizes of the members of all samples, by ending."""

    def __init__(self, members: tar_index.Members) -> None:
        self.members = members
        self.kinds = list(members.kinds)
        self.samples = np.repeat(np.arange(len(members.keys)), np.diff(members.starts))

    def size(self, *endings: str) -> NDArray[np.int64]:
        """Size of the first member that a sample has, or -1."""
        sizes = np.full(len(self.members.keys), -1, np.int64)
        for ending in reversed(endings):
            if ending in self.kinds:
                chosen = self.members.endings == self.kinds.index(ending)
                sizes[self.samples[chosen]] = self.members.sizes[chosen]
        return sizes

    def largest(self, endings: set[str]) -> NDArray[np.int64]:
        """Size of the largest member with one of these endings, or -1."""
        return functools.reduce(np.maximum, (self.size(ending) for ending in sorted(endings)))


def _member(setting: str) -> str:
    return "json" if setting.startswith(JSON) else setting.lower()


def _check_unread(path: Path, members: tar_index.Members, tars: Sequence[Shard], limit: float) -> None:
    share = members.unread / max(sum(tar.size for tar in tars), 1)
    if share > max(limit, 0.001) and len(members.keys):
        lines = "".join(f"\n  {line}" for line in members.problems[:5])
        raise DataError(
            f"{path}: {share:.1%} of the bytes cannot be read, more than max_bad_share ({limit:g}) allows; "
            f"replace the broken tars or raise it:{lines}"
        )


@dataclass
class _Reader:
    """Reads samples; several threads and forked processes may do so at once."""

    source: WebDataset
    tars: Sequence[Shard]
    members: tar_index.Members
    firsts: NDArray[np.int64]
    files: Files
    kinds: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.kinds = list(self.members.kinds)

    def example(self, row: int) -> Example:
        """Example of one sample.

        Raises:
            ChangedError: the tar is not what it was.
            DataError: the sample cannot be used.
        """
        sample, tar, key = self._sample(int(row))
        # of several in a sample the first of the endings is taken
        picture = next((sample.parts[kind] for kind in PICTURES if kind in sample.parts), None)
        source = self.source
        name = sample.name(key)
        return Example(
            f"{tar.name}/{name}" if self.members.repeated else name,
            sample.read(*picture) if picture else None,
            sample.captions(source.caption, prose=bool(source.text)),
            sample.words(source.text).strip() if source.text else None,
            self._label(sample),
        )

    def label(self, row: int) -> str | None:
        """Class of one sample; reads no more than its member.

        Raises:
            ChangedError: the tar is not what it was.
            DataError: it cannot be used.
        """
        return self._label(self._sample(int(row))[0])

    def words(self, row: int) -> tuple[str, ...]:
        """Captions and text of one sample; reads no more than their members.

        Raises:
            ChangedError: the tar is not what it was.
            DataError: it cannot be used.
        """
        source, sample = self.source, self._sample(int(row))[0]
        text = [sample.words(source.text).strip()] if source.text else []
        return (*sample.captions(source.caption, prose=bool(source.text)), *text)

    def _label(self, sample: "_Sample") -> str | None:
        label = self.source.label
        return " ".join(sample.words(label).split()) if label else None

    def _sample(self, place: int) -> tuple["_Sample", Shard, str]:
        number = int(np.searchsorted(self.firsts, place, "right")) - 1
        tar, key = self.tars[number], self.members.keys[place]
        self.files.unchanged(number)
        return _Sample(self, number, place, f"{tar.path}:{printable(key)}"), tar, key


class _Sample:
    """The members of one sample."""

    def __init__(self, reader: _Reader, tar: int, place: int, where: str) -> None:
        members = reader.members
        first, last = (int(members.starts[place + more]) for more in (0, 1))
        self.reader, self.tar, self.where = reader, tar, where
        self.parts = {
            reader.kinds[members.endings[part]]: (int(members.offsets[part]), int(members.sizes[part]))
            for part in range(first, last)
        }

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of a member."""
        return self.reader.files.read(self.tar, offset, offset + size)

    @functools.cached_property
    def json(self) -> Any:
        """Content of the .json member; None where there is none, or an empty one."""
        if not self.parts.get("json", (0, 0))[1]:
            return None
        try:
            return json.loads(self.read(*self.parts["json"]))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where}.json: not JSON ({error})") from error

    def cell(self, key: str) -> Any:
        """A value in the .json member; None where there is none."""
        return self.json.get(key) if isinstance(self.json, dict) else None

    def name(self, key: str) -> str:
        """The id that the key stands for, as ``beitctl data pack`` writes it, or the key itself.

        Other ids could occur twice, which only reading every .json would tell.
        """
        if "%" in key and self.parts.get("json", (0, 0))[1] <= MOST_TEXT_BYTES:
            found = self.cell("id")
            with contextlib.suppress(UnicodeEncodeError):  # half a character, as JSON allows
                if isinstance(found, str) and tar_keys.key(found) == key:
                    return found
        return key

    def words(self, setting: str) -> str:
        """Text of a member or of a key in the .json member, not blank."""
        if setting.startswith(JSON):
            if not isinstance(self.json, dict):
                raise DataError(f"{self.where}.json: expected an object, found {str(self.json)[:60]}")
            name = f"{self.where}.json: '{setting.removeprefix(JSON)}'"
            value = self.cell(setting.removeprefix(JSON))
            found = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
            if not isinstance(found, str):
                raise DataError(f"{name}: expected text, found {str(value)[:60]}")
        else:
            name = f"{self.where}.{setting}"
            try:
                found = self.read(*self.parts[setting.lower()]).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(f"{name}: not UTF-8 ({error.reason})") from error
        if not found.strip():
            raise DataError(f"{name}: blank")
        try:
            encoded(found)
        except UnusableError as error:
            raise DataError(f"{name}: {error}") from error
        return found

    def captions(self, setting: str, prose: bool) -> tuple[str, ...]:
        """The caption of a setting, or of the usual places; beside prose only the list in the .json."""
        try:
            if setting:
                return captions_in(self.words(setting))
            several = self.cell("captions")
            if (
                isinstance(several, list)
                and several
                and all(isinstance(text, str | None) for text in several)
            ):
                return captions_in(several)
            if self.parts.get("txt", (0, 0))[1] and not prose:
                return captions_in(self.words("txt"))
            return captions_in(self.words("json:caption")) if self.cell("caption") and not prose else ()
        except UnusableError as error:
            raise DataError(f"{self.where}: {error}") from error
