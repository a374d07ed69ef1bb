"""Writes the embedded data set and its NOTICE from the zip that it was collected in.

    python build.py embedded.zip ../../../../NOTICE

The bytes of the pictures stay as they are. Running it again gives the same files.
"""

import gzip
import json
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FIELDS = ("id", "label", "fine", "kind", "split", "license", "author", "source")
CLIPART = "openclipart 0.18: openclipart/"
HEAD = """beitctl

The code is under the MIT licence (see LICENSE). This file names the authors, sources and licences of the data
that ship with it in beitctl_plugins/sources/data. All of it is in the public domain or under CC0.

TEXT (embedded-text.parquet)
Paragraphs of Herman Melville, Moby-Dick (1851), and of the State of the Union addresses of the presidents of
the United States. Public domain.

PICTURES (embedded.parquet)
Photos are scaled to 256 pixels, clip art to 128; colours and content are unchanged.
"""


def main(archive: str, notice: str) -> None:
    """Write embedded.parquet and embedded-text.parquet beside this script, and the NOTICE."""
    here = Path(__file__).parent
    with zipfile.ZipFile(archive) as found:
        rows = [json.loads(line) for line in found.read("data.jsonl").splitlines()]
        pictures = [found.read(row["image"]) for row in rows]
        prose = gzip.decompress(found.read("text.txt.gz")).decode()
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in FIELDS}
    columns["captions"] = [row["captions"] for row in rows]
    columns["image"] = pa.array(pictures, pa.binary())
    packed = dict.fromkeys(FIELDS, "zstd") | {"captions.list.element": "zstd", "image": "none"}
    pq.write_table(pa.table(columns), here / "embedded.parquet", compression=packed, use_dictionary=False)
    paragraphs = [line.strip() for line in prose.split("\n") if line.strip()]
    text = pa.table({"text": paragraphs})
    pq.write_table(text, here / "embedded-text.parquet", compression="zstd", compression_level=19)
    Path(notice).write_text(HEAD + "".join(credits_of(rows)), encoding="utf-8")


def credits_of(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the NOTICE for the pictures; authors of clip art stand in the names of its files."""
    lines = []
    for kind in ("photo", "museum"):
        lines.append(f"\n{kind}: id | author | licence | source\n")
        for row in rows:
            if row["kind"] == kind:
                author = row["author"].strip(" ,") or "unknown"
                lines.append(f"{row['id']} | {author} | {row['license']} | {row['source']}\n")
    clips = [row for row in rows if row["kind"] == "clipart"]
    assert all(row["source"].startswith(CLIPART) and row["license"] == "public domain" for row in clips)
    lines.append(
        f"\nclipart: {clips[0]['id']} to {clips[-1]['id']}, in this order.\n"
        "Open Clip Art Library, release 0.18, public domain. Names of the files, with those of the authors:\n"
    )
    names = ", ".join(row["source"].removeprefix(CLIPART) for row in clips)
    lines.append(textwrap.fill(names, 110, break_on_hyphens=False) + "\n")
    return lines


if __name__ == "__main__":
    main(*sys.argv[1:])
