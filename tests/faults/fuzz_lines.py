"""Small files of lines: JSON, CSV, prose, lists of paths."""

import gzip
import json
import random

from fuzz_bytes import LONG, damaged, damaged_text, nested


def _captions(draw: random.Random) -> list[dict[str, object]]:
    rows = []
    for number in range(12):
        row = {
            "image": f"images/{number % 6}.png",
            "caption": f"a caption ä {number}",
            "text": f"prose {number}",
            "label": "a",
        }
        row["file_name"] = f"{number % 6}.png"
        if draw.random() < 0.2:
            values = (
                None,
                "",
                " ",
                [],
                [[]],
                ["a", 1],
                {"bytes": "x"},
                5,
                1e308,
                True,
                "\ud800",
                "x\0y",
                ["a", "b"],
                "\x1b[31m",
                10**30,
                {"a": {"b": []}},
            )
            row[draw.choice(list(row))] = draw.choice(values)
        rows.append(row)
    return rows


def jsonl(draw: random.Random) -> tuple[str, bytes]:
    rows = _captions(draw)
    ending = draw.choice((".jsonl", ".jsonl", ".json"))
    lines = [json.dumps(row, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass") for row in rows]
    for _ in range(draw.choice((0, 1, 1, 3))):
        spot = draw.randrange(len(lines))
        lines[spot] = damaged_text(draw, lines[spot])
    if draw.random() < 0.1:
        lines.insert(draw.randrange(len(lines)), nested(draw).encode())
    if draw.random() < 0.03:
        lines[draw.randrange(len(lines))] = (
            b'{"image": "images/1.png", "text": "' + b"x" * LONG + b'", "caption": "b"}'
        )
    joint = draw.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"\n\0"))
    data = joint.join(lines) if ending == ".jsonl" else b"[" + b",\n".join(lines) + b"]"
    if draw.random() < 0.1:
        data = draw.choice(
            (b"\xef\xbb\xbf" + data, data.decode(errors="replace").encode("utf-16"), data[:-1])
        )
    return ending, damaged(draw, data) if draw.random() < 0.3 else data


def csv(draw: random.Random) -> tuple[str, bytes]:
    ending = draw.choice((".csv", ".csv", ".tsv"))
    comma = "\t" if ending == ".tsv" else ","
    names = ["image", "caption", "text", "label", "file_name"]
    quote = draw.choice(('"', '"', ""))
    lines = [comma.join(names).encode()]
    for row in _captions(draw):
        cells = (str(row[name]).replace('"', '""') for name in names)
        lines.append(comma.join(f"{quote}{cell}{quote}" for cell in cells).encode(errors="surrogatepass"))
    for _ in range(draw.choice((0, 1, 1, 3))):
        spot = draw.randrange(len(lines))
        lines[spot] = damaged_text(draw, lines[spot])
    data = draw.choice((b"\n", b"\n", b"\r\n", b"\r")).join(lines)
    if draw.random() < 0.1:
        data = draw.choice(
            (
                b"\xef\xbb\xbf" + data,
                data.decode(errors="replace").encode("utf-16"),
                data * (1 + 2**20 // len(data)),
            )
        )
    return ending, damaged(draw, data) if draw.random() < 0.3 else data


def text(draw: random.Random) -> tuple[str, bytes]:
    """Prose, a list of paths, or JSON lines, packed or not."""
    ending = draw.choice((".txt", ".txt", ".txt.gz", ".jsonl.gz"))
    if draw.random() < 0.5:
        lines = [f"images/{n}.png\tclass {n % 2}".encode() for n in range(6)]
    else:
        lines = [f"Some prose, line {n}. ".encode() * 3 for n in range(30)]
    for _ in range(draw.choice((0, 1, 2))):
        spot = draw.randrange(len(lines))
        lines[spot] = damaged_text(draw, lines[spot])
    data = draw.choice((b"\n", b"\n\n", b"\r\n", b"\r")).join(lines)
    if ending == ".jsonl.gz":
        data = jsonl(draw)[1]
    if ending.endswith(".gz"):
        content = bytes(draw.choice((2**20, 300 * 2**20))) if draw.random() < 0.03 else data
        data = gzip.compress(content, 1, mtime=0)
        return ending, damaged(draw, data) if draw.random() < 0.7 else data
    return ending, damaged(draw, data) if draw.random() < 0.4 else data
