"""A source that tests make up, and pictures for it."""

import io
import types
from importlib.metadata import EntryPoint

import numpy as np
from PIL import Image

from beitctl import cli, registry
from beitctl.api import Example, Plugin
from beitctl.errors import DataError
from beitctl.inspecting.finding import Found

MADE = {}
"""Examples, or errors in place of them, by the file that stands for them."""


class Opened:
    """What is opened."""

    def __init__(self, rows, **others):
        self.rows, self.fingerprint = rows, "f" * 32
        self.__dict__.update(others)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(self.rows[index], BaseException):
            raise self.rows[index]
        return self.rows[index]


class Made(Plugin):
    """Made-up examples."""

    path: str
    """A file that ends in .made."""
    size: int = 1

    @classmethod
    def guess(cls, path):
        return (5, {"path": str(path)}) if path.suffix == ".made" else None

    def open(self):
        return MADE[self.path]


class Also(Made):
    """The same, and as sure."""


class Sure(Plugin):
    """Knows everything."""

    path: str

    @classmethod
    def guess(cls, path):
        return 9, {"path": str(path)}

    def open(self):
        return Opened([])


class Faulty(Made):
    """Fails when it is asked."""

    @classmethod
    def guess(cls, path):
        raise RuntimeError("oh")


class Named(Plugin):
    """Reads no path."""

    name: str

    def open(self):
        return Opened([])


def install(monkeypatch, **sources):
    entries = tuple(
        EntryPoint(
            name.replace("_", "-"), f"inspected:{value}" if ":" not in value else value, "beitctl.sources"
        )
        for name, value in sorted(sources.items())
    )
    monkeypatch.setattr(registry, "_entries", lambda group: entries if group == "beitctl.sources" else ())


def found(rows, **others):
    """A source and what it opens to."""
    opened = Opened(rows, **others)
    return Found("made", {"path": "x.made"}, types.SimpleNamespace(open=lambda: opened)), opened


def beitctl(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    code = cli.execute([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def picture(width=40, height=30, kind="JPEG", seed=0, mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def examples(count, **others):
    return [
        Example(
            f"{number}.jpg", picture(seed=number), (f"caption {number}",), label="ab"[number % 2], **others
        )
        for number in range(count)
    ]


BROKEN = DataError("#1: not a readable picture (cut off); replace or remove it")
