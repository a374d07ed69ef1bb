"""Small tars, and headers that should never be."""

import gzip
import json
import random
import tarfile

from fuzz_bytes import damaged, damaged_text, extreme, nested
from fuzz_pictures import cells, mutated


def _members(draw: random.Random) -> list[tuple[str, bytes]]:
    found = []
    for number, data in enumerate(cells()):
        key = draw.choice((f"{number:04}", f"folder/{number:04}"))
        if draw.random() < 0.05:
            key = "long" * 80 + key
        caption = json.dumps({"caption": f"caption {number}", "title": "ä", "label": number}).encode()
        words = f"caption {number}".encode()
        if draw.random() < 0.2:
            data = mutated(draw.choice(("jpeg", "png", "webp")), draw)
        if draw.random() < 0.15:
            words, caption = damaged_text(draw, words), damaged_text(draw, caption)
        if draw.random() < 0.05:
            caption = nested(draw).encode()
        found += [(f"{key}.{draw.choice(('jpg', 'PNG', 'webp'))}", data), (f"{key}.txt", words)]
        found += [(f"{key}.json", caption), (f"{key}.cls", b"7")]
    return found


def _header(draw: random.Random, name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(
        draw.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT))
        if len(name) < 90
        else tarfile.GNU_FORMAT
    )


def _summed(block: bytes) -> bytes:
    """A header block with its right checksum."""
    total = 256 + sum(block[:148]) + sum(block[156:512])
    return block[:148] + f"{total:06o}\0 ".encode() + block[156:]


def _strange_block(draw: random.Random, block: bytes) -> bytes:
    """A header with another field; mostly with the right checksum."""
    changed = bytearray(block)
    start, size = draw.choice(
        (
            (124, 12),
            (124, 12),
            (124, 12),
            (156, 1),
            (0, 100),
            (257, 8),
            (345, 155),
            (136, 12),
            (329, 16),
            (157, 100),
        )
    )
    if start == 124:
        numbers = (
            b"77777777777\0",
            b"-0000000001\0",
            b"\x80" + bytes(11),
            b"\x80" + b"\xff" * 11,
            b"\xff" * 12,
            b"\xff" + bytes(11),
        )
        more = (
            b"\x80" + bytes(3) + extreme(draw, 8, "big"),
            f"{draw.randrange(2**33):011o}\0".encode(),
            b" " * 12,
            b"00000000008\0",
            bytes(12),
        )
        value = draw.choice(numbers + more)
    elif start == 156:
        value = draw.choice(b"01234567LKxgSDMNVXA\0\xff").to_bytes(1, "big")
    else:
        names = (
            b"/etc/passwd",
            b"../../up.jpg",
            b"a\nb.jpg",
            b"\xff\xfe.jpg",
            b"." * 100,
            b"",
            b"/",
            b"a.b.c.d.jpg",
            draw.randbytes(size),
        )
        value = draw.choice(names)[:size].ljust(size, b"\0")
    changed[start : start + size] = value[:size]
    return _summed(bytes(changed)) if draw.random() < 0.8 else bytes(changed)


def _special(draw: random.Random) -> bytes:
    """Headers that describe the member behind them, with too much or nonsense in them."""
    records = (
        b"%d size=99999999999999\n", b"%d size=-5\n", b"%d size=1\n", b"%d path=x/../../y.jpg\n",
        b"%d path=\n", b"%d linkpath=a\n",
        b"%d GNU.sparse.major=1\n", b"%d GNU.sparse.map=0,1,5\n",
        b"%d GNU.sparse.size=9\n", b"%d GNU.sparse.map=a\n",
        b"%d mtime=nan\n", b"%d uid=99999999999999999999999\n", b"%d hdrcharset=BINARY\n",
        b"%d comment=\xff\xfe\n", b"%d size=9e9\n",
        b"%d GNU.sparse.realsize=999999999999\n%d GNU.sparse.major=1\n%d GNU.sparse.minor=0\n",
        b"%d GNU.sparse.name=a.jpg\n",
    )  # fmt: skip
    record = draw.choice(records)
    parts = [part + b"\n" for part in record.split(b"\n") if part]
    body = b"".join(
        part.replace(
            b"%d", str(draw.choice((len(part) + 1, len(part) + 1, len(part) + 1, 0, 1, 99999, -3))).encode()
        )
        for part in parts
    )
    if draw.random() < 0.1:
        body = draw.choice((b"x" * 2**21, b"9" * 5000 + body, body * 20000, b"\0" * 600))
    claimed = draw.choice((len(body), len(body), len(body), 2**20, 2**33 - 1, 0))
    kind = draw.choice(
        (
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_SPARSE,
        )
    )
    times = draw.choice((1, 1, 1, 1, 3, 3, 2000))
    return (_header(draw, "././@LongLink", claimed, kind) + body + bytes(-len(body) % 512)) * (
        times if len(body) < 1000 else 1
    )


def tar(draw: random.Random) -> tuple[str, bytes]:
    odd = draw.random()
    blocks = []
    for name, content in _members(draw):
        head = _header(draw, name, len(content))
        way = draw.random()
        if odd < 0.6 and way < 0.08:
            head = head[:-512] + _strange_block(draw, head[-512:])
        elif odd < 0.6 and way < 0.14:
            head = _special(draw) + head
        blocks.append(head + content + bytes(-len(content) % 512))
        if odd < 0.6 and draw.random() < 0.02:
            blocks.append(draw.choice((bytes(512), bytes(1024), draw.randbytes(512), blocks[0])))
    data = b"".join(blocks) + bytes(1024)
    if 0.6 <= odd < 0.7:
        data = gzip.compress(data, 1, mtime=0)
    return ".tar", damaged(draw, data) if odd >= 0.5 else data
