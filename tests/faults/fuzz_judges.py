"""What is done with a damaged file: all that training and ``beitctl data check`` do with a whole one."""

import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fuzz_lines import csv, jsonl, text
from fuzz_pictures import CORPORA, cells, mutated
from fuzz_tables import arrow, parquet
from fuzz_tars import tar

from beitctl.api import Example
from beitctl.data.images import Pictures, centre_crop, random_crop
from beitctl.data.loader import Stream, drawn
from beitctl.data.workers import steps
from beitctl.errors import BeitctlError, ChangedError, DataError
from beitctl.inspecting.checking import check
from beitctl.inspecting.finding import find
from beitctl.inspecting.looking import look
from beitctl.inspecting.resizing import prepare
from beitctl_plugins.sources.image_folder import ImageFolder
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.sources.pairs import Pairs
from beitctl_plugins.sources.parquet import Parquet
from beitctl_plugins.sources.path_list import PathList
from beitctl_plugins.sources.text import Text
from beitctl_plugins.sources.webdataset import WebDataset

WORKER_FILES = 50
"""Every so many pictures, that many go through a data-loading process."""
MESSAGE_CHARACTERS = 10_000
"""Longer messages are findings."""
PX = 32
FILES = {"tar": tar, "parquet": parquet, "arrow": arrow, "jsonl": jsonl, "csv": csv, "text": text}


class Judge:
    """Judges files of all kinds in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for number in range(6):
            (folder / "images" / f"{number}.png").write_bytes(cells()[number])
        _picture(cells()[1], random.Random(0))  # what is imported and started at first use is no file's fault

    def file(self, kind: str, seed: int, number: int) -> Path:
        """Make a damaged file."""
        ending, data = damaged_file(kind, draw_of(kind, seed, number))
        path = self.folder / f"fuzz{ending}"
        path.write_bytes(data)
        return path

    def judged(self, kind: str, seed: int, number: int, path: Path) -> str:
        """``accepted`` or ``refused``; whatever else comes out is a finding."""
        try:
            if kind in CORPORA:
                found = _picture(path.read_bytes(), draw_of(kind, seed, number))
                if number % WORKER_FILES == WORKER_FILES - 1:
                    _in_a_worker(kind, seed, number)
            else:
                found = self._table(kind, path, draw_of(kind, seed, number))
        finally:
            path.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        return "accepted" if found else "refused"

    def _table(self, kind: str, path: Path, draw: random.Random) -> bool:
        accepted = False
        for source in self._sources(kind, path, draw):
            try:
                examples = source.open()
            except ChangedError:
                raise
            except BeitctlError as error:
                _worded(error)
                continue
            _told(examples.problems)
            outcomes = _read(examples)
            accepted |= "" in outcomes
            assert _read_in_threads(examples) == [outcomes, outcomes], "threads read otherwise"
        for copied in (self.folder / "images").glob("metadata.*"):
            copied.unlink()
        _checked(path)
        return accepted

    def _sources(self, kind: str, path: Path, draw: random.Random) -> list[object]:
        share = {"max_bad_share": 1.0}
        documents = draw.choice(("lines", "paragraphs", "files"))
        if kind == "tar":
            caption = draw.choice(("", "txt", "json:title"))
            label, text = draw.choice(("", "cls", "json:label")), draw.choice(("", "", "json:caption"))
            return [WebDataset(path=path, caption=caption, label=label, text=text, **share)]
        if kind in ("parquet", "arrow"):
            names = {"label": draw.choice(("", "label")), "text": draw.choice(("", "text"))}
            where = draw.choice(({}, {}, {"split": "train"}, {"label": "1"}))
            found: list[object] = [Parquet(path=path, where=where, **names, **share)]
            return found + (
                [Pairs(path=path, **share), Text(path=path, **share)] if kind == "parquet" else []
            )
        if kind == "text" or path.suffix == ".gz":
            listed = PathList(path=path, labels=draw.choice(("none", "column", "folders")), **share)
            return [Text(path=path, documents=documents, **share), listed]
        (self.folder / "images" / f"metadata{path.suffix}").write_bytes(path.read_bytes())
        table = f"metadata{path.suffix}" if path.suffix not in (".csv", ".jsonl") else ""
        found = [Pairs(path=path, **share), ImageFolder(path=self.folder / "images", metadata=table)]
        return found + ([Text(path=path, **share)] if path.suffix == ".jsonl" else [])


def damaged_file(kind: str, draw: random.Random) -> tuple[str, bytes]:
    """Ending and content of one damaged file."""
    return FILES[kind](draw) if kind in FILES else (".bin", mutated(kind, draw))


def draw_of(kind: str, seed: int, number: int) -> random.Random:
    """The randomness of one file."""
    return random.Random(f"{kind} {seed} {number}")


def _worded(error: BaseException) -> str:
    text = str(error)
    assert len(text) <= MESSAGE_CHARACTERS, f"a message of {len(text)} characters: {text[:300]}"
    assert text.isascii() or text.encode(), "a message that cannot be printed"
    return text


def _told(problems: list[str]) -> None:
    for line in problems:
        assert len(line) <= MESSAGE_CHARACTERS, f"a problem of {len(line)} characters: {line[:300]}"
        line.encode()


def _read(examples: Opened) -> list[str]:
    """Of every example: why it cannot be used, or nothing."""
    outcomes, opener = [], Pictures()
    for index in range(len(examples)):
        try:
            example = examples[index]
            _usable(example)
            if example.image is not None:
                opener.open(example.image, example.id)
            outcomes.append("")
        except ChangedError:
            raise
        except DataError as error:
            outcomes.append(_worded(error))
    return outcomes


def _usable(example: Example) -> None:
    for words in (example.id, example.text, example.label, *example.captions):
        assert words is None or isinstance(words, str), f"{type(words)} in place of text"
        (words or "").encode()
    assert example.id, "no id"


def _read_in_threads(examples: Opened) -> list[object]:
    found: list[object] = [None, None]

    def read(place: int) -> None:
        try:
            found[place] = _read(examples)
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=read, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return found


def _checked(path: Path) -> None:
    """What ``beitctl data check`` does."""
    try:
        found = find(str(path))
        assert not found.warnings, found.warnings
        report = check(found, found.open(), workers=2, quiet=True)
        _told([broken["reason"] for broken in report["broken"]["first"]])
    except ChangedError:
        raise
    except BeitctlError as error:
        _worded(error)


# pictures


def _picture(data: bytes, draw: random.Random) -> bool:
    """Open, size, crop, and what data check and data pack do; they must agree."""
    opener, rng = Pictures(), np.random.default_rng(draw.randrange(2**32))
    one = Opened([data], lambda image: Example("a", image), "")
    try:
        found = opener.open(data, "a")
    except DataError as error:
        _worded(error)
        if draw.random() < 0.2:
            assert look(one, 0, opener).reason, "look takes what open refuses"
        try:
            opener.size(data)
        except DataError as error:
            _worded(error)
        return False
    assert found.pixels.dtype == np.uint8
    assert found.pixels.shape == (found.height, found.width, 3)
    assert opener.size(data) == found.size, f"size {opener.size(data)}, opened {found.size}"
    for crop in (centre_crop(*found.size), random_crop(*found.size, rng, jitter=0.4)):
        assert opener.crop(found, crop, PX).shape == (3, PX, PX)
    large = found.width * found.height > 2**22
    if not large or draw.random() < 0.3:
        del found
        seen = look(one, 0, opener)
        assert not seen.reason, seen.reason
        prepare(one, 0, px=48, quality=80, pictures=opener, words_only=False)
    return True


class _Pixels:
    """A task that decodes and crops."""

    layout = "image"

    def prepare(self, example: Example, draw: np.random.Generator, tools: object) -> int:
        opener = Pictures()
        found = opener.open(example.image, example.id)
        return int(opener.crop(found, random_crop(*found.size, draw), PX).sum())


class _Steps:
    """Damaged pictures, one a step, as a data-loading process makes them ready."""

    def __init__(self, kind: str, seed: int, first: int) -> None:
        self.kind, self.seed, self.first = kind, seed, first

    def __getitem__(self, step: int) -> tuple[str, int]:
        data = damaged_file(self.kind, draw_of(self.kind, self.seed, self.first + step))[1]
        rows = [data] + [cells()[0]] * 3
        examples = Opened(range(4), lambda row: Example(f"{self.first + step}:{row}", rows[row]), "x")
        stream = Stream("images", _Pixels(), examples, 1, SimpleNamespace())
        return [drawn(stream, position, 0)[:2] for position in range(4)][step % 4]


def _in_a_worker(kind: str, seed: int, last: int) -> None:
    data = _Steps(kind, seed, last - WORKER_FILES + 1)
    count = sum(1 for _ in steps(data, 0, WORKER_FILES, 1, lambda worker: None))
    assert count == WORKER_FILES, f"{count} steps of {WORKER_FILES} from a data-loading process"
