"""Bad data of every kind, in the working folder: three good examples, and others beside them.

Each function returns, or is, a function that writes files; it takes pytest's monkeypatch.
"""

import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from beitctl import cli


def png(number=0, px=20):
    stream = io.BytesIO()
    Image.new("RGB", (px, px), (40 * number, 90, 0)).save(stream, "PNG")
    return stream.getvalue()


def jpeg():
    stream = io.BytesIO()
    Image.effect_noise((90, 90), 60).save(stream, "JPEG")
    return stream.getvalue()


def bomb(side):
    """A PNG of a hundred bytes that says it is huge."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def write(name, data):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data)


def beside(*bad):
    """A folder ``data`` of three good pictures, and other files."""

    def make(_):
        for name, data in [(f"{number}.png", png(number)) for number in range(3)] + list(bad):
            write(f"data/{name}", data)

    return make


def links(patch):
    beside()(patch)
    for name, target in (("again", "."), ("self.png", "self.png"), ("gone.png", "nowhere.png")):
        os.symlink(target, f"data/{name}")


def closed(folder):
    """Pictures in two folders, one of which may not be listed; root may always, so that is made up."""

    def make(patch):
        beside(("closed/a.png", png(4)))(patch)
        scan = os.scandir

        def scandir(path="."):
            if str(path).rstrip("/").endswith(folder):
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        patch.setattr(os, "scandir", scandir)

    return make


def rows(*bad, name="data.jsonl"):
    """Pairs, of which the first three are good, as JSONL or as lines of CSV."""

    def make(patch):
        beside()(patch)
        if name.endswith(".jsonl"):
            good = [{"image": f"data/{n}.png", "caption": f"c{n}"} for n in range(3)]
            lines = [row if isinstance(row, str) else json.dumps(row) for row in [*good, *bad]]
        else:
            head = "file_name" if "metadata" in name else "image"
            place = "" if "metadata" in name else "data/"
            lines = [f"{head},caption", *(f"{place}{n}.png,c{n}" for n in range(3)), *bad]
        write(name, "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))

    return make


def csv(*bad):
    return rows(*bad, name="data.csv")


def tarred(*bad, cut=None, spoil=False):
    """Three good samples, and other members."""

    def make(_):
        with tarfile.open("data.tar", "w") as opened:
            for name, data in [(f"{number}.png", png(number)) for number in range(3)] + list(bad):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                opened.addfile(member, io.BytesIO(data))
        with tarfile.open("data.tar") as opened:
            last = opened.getmember("2.png").offset
        if cut is not None:
            os.truncate("data.tar", last + cut)
        if spoil:
            with open("data.tar", "r+b") as file:
                file.seek(last)
                file.write(b"\xff" * 300)

    return make


def parquet(**columns):
    """Four rows."""
    return lambda _: pq.write_table(pa.table(columns), "data.parquet")


def file(name, data):
    return lambda _: write(name, data)


PICTURES = [png(number) for number in range(4)]
PAIR = {"image": "data/0.png"}
LONG = "a" * 10 * 2**20


def offline(patch):
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def cut_off(patch):
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def cut_parquet(patch):
    parquet(image=PICTURES)(patch)
    os.truncate("data.parquet", 300)


def beitctl(capsys, *words):
    """Exit code, stdout and stderr of a command, which has no traceback and names every error as one."""
    code = cli.execute(words)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "a fault of beitctl" not in err
    assert ("\nerror: " in f"\n{err}") == (code != 0)
    return code, out, err


def settle(folder, monkeypatch):
    """Be in an empty folder, with a cache beside it."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BEITCTL_DEBUG", "")
    monkeypatch.delenv("BEITCTL_RUNS", raising=False)
    monkeypatch.setenv("BEITCTL_CACHE", str(folder.parent / f"{folder.name}-cache"))
    return folder
