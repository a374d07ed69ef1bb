"""Small files for the tests of sources."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(colour=(255, 0, 0)):
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(stream, "PNG")
    return stream.getvalue()


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    return folder


def ids(opened):
    return [opened[i].id for i in range(len(opened))]


def examples(opened):
    return [opened[i] for i in range(len(opened))]


ROWS = [
    {"image": "1.png", "caption": "one", "split": "train", "class": "a"},
    {"image": "2.png", "caption": ["two", " zwei\n drei "], "split": "train", "class": "b"},
    {"image": "3.png", "caption": "three", "split": "test", "class": "a"},
]


def table(folder, rows, kind="jsonl"):
    path = folder / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def tar(path, members, form=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as opened:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path
