"""Every kind of bad data through ``beitctl data check``: a message, an exit code, nothing lost or harmed."""

import gzip
import hashlib
import json
import os
import re

import pytest
from bad_files import (
    LONG,
    PAIR,
    PICTURES,
    beitctl,
    beside,
    bomb,
    closed,
    csv,
    cut_off,
    cut_parquet,
    file,
    jpeg,
    links,
    offline,
    parquet,
    png,
    rows,
    settle,
    tarred,
)


def zipped(data):
    return gzip.compress(data, mtime=0)  # the time would be in the name of the test


MANY = r"1 of 4 rows are unusable, more than max_bad_share \(0.01\) allows; correct them or raise it:\n  "
BROKEN = r"1 of 4 examples \(25.00%\) are broken, more than the 0.10% .*replace or remove those listed above"
DATA, TAR, ROWS, TABLE = ("data",), ("data.tar",), ("data.jsonl",), ("data.csv",)
PARQUET, GZ = ("data.parquet",), ("data.txt.gz",)
HUB = ("no/body", "--kind", "hub")
UNREADABLE = r"x\.jpg: not a readable picture "
# name, how to make it, arguments, exit code, what is said, and examples, broken, left out and ignored ones
CASES = [
    ("zero-byte", beside(("x.jpg", b"")), DATA, 0, r"x.jpg: empty file", (3, 0, 1, 0)),
    ("truncated JPEG", beside(("x.jpg", jpeg()[:999])), DATA, 3, UNREADABLE + r".*truncated", (4, 1, 0, 0)),
    ("truncated PNG", beside(("x.jpg", png()[:60])), DATA, 3, UNREADABLE + r".*truncated", (4, 1, 0, 0)),
    ("cut in the header", beside(("x.jpg", png()[:9])), DATA, 3, UNREADABLE + r"\(unknown", (4, 1, 0, 0)),
    ("bomb", beside(("x.jpg", bomb(9999))), DATA, 3,
     r"9999x9999 pixels are more than the limit of 64000000; shrink it", (4, 1, 0, 0)),
    ("larger bomb", beside(("x.jpg", bomb(60000))), DATA, 3, UNREADABLE + r".*exceeds limit", (4, 1, 0, 0)),
    ("wrong extension", beside(("x.jpg", png(4))), DATA, 0, r"next: beitctl data peek", (4, 0, 0, 0)),
    ("HEIC as JPEG", beside(("x.jpg", b"\0\0\0\x18ftypheic")), DATA, 3,
     UNREADABLE + r"\(HEIC or AVIF, .*convert it to JPEG", (4, 1, 0, 0)),
    ("SVG as JPEG", beside(("x.jpg", b"<?xml?><svg/>")), DATA, 3, UNREADABLE + r"\(SVG", (4, 1, 0, 0)),
    ("PDF as JPEG", beside(("x.jpg", b"%PDF-1.7\n")), DATA, 3, UNREADABLE + r"\(PDF", (4, 1, 0, 0)),
    ("HEIC, SVG, PDF beside", beside(("x.heic", b"x"), ("x.svg", b"x"), ("x.pdf", b"x")), DATA, 0,
     r"ignored: \.heic \.pdf \.svg", (3, 0, 0, 3)),
    ("HEIC alone", file("data/x.heic", b"x"), DATA, 2,
     r"data: no source knows this layout. Found: 1 .heic in 1 folder", None),
    ("symlink loops", links, DATA, 0, r"again: link to a folder that it lies in", (3, 0, 3, 0)),
    ("link to itself", links, DATA, 0, r"self.png: cannot be read \(Too many levels", (3, 0, 3, 0)),
    ("link to nothing", links, DATA, 0, r"gone.png: cannot be read \(No such file", (3, 0, 3, 0)),
    ("unreadable folder inside", closed("closed"), DATA, 0,
     r"closed: folder cannot be read \(Permission denied\)", (3, 0, 1, 0)),
    ("unreadable folder", closed("data"), DATA, 2,
     r"data: cannot be read \(Permission denied\); correct its permissions", None),
    ("names", beside(("ü\n猫.png", png(4)), ("a\nb/ \t.png", png(5))), DATA, 0, r"next: ", (5, 0, 0, 0)),
    ("broken with such a name", beside(("ü\n猫.png", b"x")), DATA, 3,
     r"ü\n猫.png: not a readable picture", (4, 1, 0, 0)),
    ("name not UTF-8", beside(("caf\udce9.png", png(4))), DATA, 0,
     r"caf\\xe9.png: name is not UTF-8", (3, 0, 1, 0)),
    ("no caption", rows(PAIR), ROWS, 3, MANY + r"data.jsonl:4: no 'caption'; the row has image", None),
    ("blank caption", rows(PAIR | {"caption": " "}), ROWS, 3, MANY + r"data.jsonl:4: caption is not", None),
    ("list of captions", rows(PAIR | {"caption": ["a", "b"]}), ROWS, 0, r"next: ", (3, 0, 0, 0)),
    ("empty list", rows(PAIR | {"caption": []}), ROWS, 3, MANY + r".*:4: caption is not text: \[\]", None),
    ("list with others", rows(PAIR | {"caption": ["a", 3]}), ROWS, 3, MANY + r".*:4: caption is", None),
    ("list with a blank one", rows(PAIR | {"caption": ["a", None, " "]}), ROWS, 0, r"next: ", (3, 0, 0, 0)),
    ("caption of 10 MB", rows(PAIR | {"caption": LONG[:-99]}), ROWS, 3,
     MANY + r"data.jsonl:4: caption is longer than 1 MB \(10,485,661 characters\)", None),
    ("row of more", rows(PAIR | {"caption": LONG}), ROWS, 3, MANY + r".*row is longer than 10 MB", None),
    ("not JSON", rows("{"), ROWS, 3, MANY + r"data.jsonl:4: not a JSON object", None),
    ("no picture", rows({"image": "x.png", "caption": "a"}), ROWS, 3, MANY + r".*:4: no picture", None),
    ("some are allowed", rows(PAIR), (*ROWS, "--set", "max_bad_share=0.3"), 0,
     r"data.jsonl:4: no 'caption'", (3, 0, 1, 0)),
    ("CSV, quote not closed", csv('data/0.png,"a'), TABLE, 3,
     r"data.csv:5: a quote that opens in this row is never closed; close it", None),
    ("CSV, from the first row", file("data.csv", b'image,caption\na.png,"a\n'), TABLE, 3,
     r"data.csv:2: a quote that opens in this row is never closed", None),
    ("CSV, quote inside", csv('data/0.png,"a" b'), TABLE, 3, MANY + r"data.csv:5: wrong quoting", None),
    ("CSV, comma inside", csv("data/0.png,a,b"), TABLE, 3, MANY + r"data.csv:5: 3 cells for 2 col", None),
    ("CSV, other encoding", csv("data/0.png,\udce9"), TABLE, 3, r"line 5 is not UTF-8", None),
    ("CSV, NUL byte", csv("data/0.png,a\0"), TABLE, 3, MANY + r"data.csv:5: holds a NUL byte", None),
    ("CSV, caption of 10 MB", csv(f"data/0.png,{LONG}"), TABLE, 3, MANY + r".*longer than 10 MB", None),
    ("CSV, semicolons", file("data.csv", b"image;caption\na;b\n"), TABLE, 3,
     r"no 'image'; the row has image;caption", None),
    ("CSV, empty", file("data.csv", b""), TABLE, 3, r"data.csv: no row; correct 'path'", None),
    ("metadata, picture missing", rows("9.png,a", name="data/metadata.csv"), DATA, 0,
     r"metadata.csv:5: no picture '9.png' in the folder", (3, 0, 1, 0)),
    ("metadata, wrong quoting", rows('0.png,"a', name="data/metadata.csv"), DATA, 3,
     r"metadata.csv:5: a quote that opens in this row is never closed", None),
    ("tar, out of it", tarred(("../../x.png", png())), TAR, 3, MANY + r".*its path leads", None),
    ("tar, from the root", tarred(("/etc/x.png", png())), TAR, 3, MANY + r".*its path leads", None),
    ("tar, broken header", tarred(spoil=True), TAR, 3, r"% of the bytes cannot be.*\n.*'1': broken", None),
    ("tar, cut off", tarred(cut=540), TAR, 3, r"after sample '1': cut off; the rest is left out", None),
    ("tar, empty", file("data.tar", b""), TAR, 3, r"data.tar: nothing usable .*\n.*: empty file", None),
    ("tar, compressed", file("data.tar", zipped(b"x")), TAR, 3, r": compressed.*decompress it", None),
    ("tar, broken picture", tarred(("9.png", b"x")), TAR, 3, r"9: not a readable picture", (4, 1, 0, 0)),
    ("tar, empty picture", tarred(("9.png", b"")), TAR, 3, MANY + r"data.tar:9: the picture is", None),
    ("tar, no UTF-8", tarred(("9.png", png()), ("9.txt", b"\xff")), TAR, 3, r"txt: not UTF-8", (4, 1, 0, 0)),
    ("tar, broken JSON", tarred(("9.png", png()), ("9.json", b"{")), TAR, 3, r"json: not JSON", (4, 1, 0, 0)),
    ("tar, caption of 10 MB", tarred(("9.png", png()), ("9.txt", LONG.encode())), TAR, 3,
     MANY + r"data.tar:9: the caption is longer than 1 MiB", None),
    ("Parquet, other columns", parquet(a=[1], b=["x"]), PARQUET, 3,
     r"data.parquet: no column 'image'; it has a, b. Name one of them instead", None),
    ("Parquet, other types", parquet(a=[1]), (*PARQUET, "--set", 'image="a"'), 3,
     r"column 'a' holds int64; expected bytes, {bytes, path}, or paths", None),
    ("Parquet, no picture", parquet(image=[*PICTURES[1:], None]), PARQUET, 3,
     MANY + r"data.parquet:4: no picture in 'image'", None),
    ("Parquet, broken picture", parquet(image=[*PICTURES[1:], b"x"]), PARQUET, 3, BROKEN, (4, 1, 0, 0)),
    ("Parquet, no caption", parquet(image=PICTURES, caption=["a", "b", "c", ""]),
     (*PARQUET, "--set", 'caption="caption"'), 3, MANY + r"data.parquet:4: no text in 'caption'", None),
    ("Parquet, caption of 10 MB", parquet(image=PICTURES, caption=["a", "b", "c", LONG]), PARQUET, 3,
     MANY + r"data.parquet:4: caption in 'caption' is longer than 1 MB", None),
    ("Parquet, cut off", cut_parquet, PARQUET, 3, r"data.parquet: cannot be read \(.*\); replace", None),
    ("Parquet, empty", file("data.parquet", b""), PARQUET, 3, r"\(Parquet file size is 0", None),
    ("text, empty", file("data.txt", b""), ("data.txt",), 3, r"data.txt: empty corpus", None),
    ("text, other encoding", file("data.txt", b"a\n\xe9\n"), ("data.txt",), 3, r"txt:2: not UTF-8", None),
    ("text, cut off", file("data.txt.gz", zipped(b"a\n" * 99)[:20]), GZ, 3,
     r"data.txt.gz: cannot be read \(Compressed file ended", None),
    ("nothing", beside(), ("none",), 2, r"none: no such file or folder; correct it", None),
    ("Hub, offline", offline, HUB, 3, r"no/body: not downloaded yet, and HF_HUB_OFFLINE is set; unset", None),
    ("Hub, not reached", cut_off, HUB, 3, r"no/body: http://127.0.0.1:9 cannot be reached .*check", None),
]  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    return settle(tmp_path, monkeypatch)


def tree(folder):
    """Every file and what is in it."""
    found = {}
    for path in folder.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        found[os.fsencode(path)] = hashlib.sha256(data).digest()
    return found


@pytest.mark.parametrize(
    ("make", "words", "code", "says", "counts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_data_has_its_message_and_exit_code(place, monkeypatch, capsys, make, words, code, says, counts):
    with monkeypatch.context() as patch:
        make(patch)
        before = {} if "Permission" in says else tree(place)
        found, out, err = beitctl(capsys, "data", "check", *words, "--json")
    report = json.loads(out) if out else None
    said = err
    if report:
        reasons = [f"{row['id']}: {row['reason']}" for row in report["broken"]["first"]]
        said += "\n".join([*reasons, *report["left_out"]["first"]])
        said += f"\nignored: {' '.join(report['ignored'])}"
    assert found == code, said
    assert re.search(says, said), said[:2000]
    assert counts == (report and counted(report))
    assert not before or tree(place) == before


def counted(report):
    listed = report["broken"], report["left_out"]
    assert all(part["count"] == len(part["first"]) for part in listed)
    return (report["examples"], *(part["count"] for part in listed), sum(report["ignored"].values()))


def test_a_line_break_in_a_name_does_not_break_the_line_of_the_report(capsys, monkeypatch):
    beside(("a\nb.png", b"x"))(monkeypatch)
    code, out, _ = beitctl(capsys, "data", "check", "data")
    assert (code, "  first        a\\nb.png: not a readable picture" in out) == (3, True)
