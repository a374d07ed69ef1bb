"""Mutations of any file, and the damage to numbers and texts that the mutations of formats use."""

import random
import struct

EXTREMES = (0, 1, 2, *(2**bits + more for bits in (7, 8, 15, 16, 31, 32, 62, 63, 64) for more in (-1, 0)))
LONG = 10 * 2**20
"""Bytes of a line that is far too long."""


def extreme(draw: random.Random, size: int, order: str = "") -> bytes:
    """A whole number at the edge of its type, in so many bytes."""
    value = draw.choice(EXTREMES) & (2 ** (8 * size) - 1)
    return value.to_bytes(size, order or draw.choice(("little", "big")))


def place(draw: random.Random, data: bytes) -> int:
    return draw.randrange(len(data) + 1)


def part(draw: random.Random, data: bytes) -> tuple[int, int]:
    """Where a run begins and ends, mostly a short one."""
    start = place(draw, data)
    longest = draw.choice((8, 64, 512, len(data)))
    return start, min(len(data), start + draw.randint(1, max(1, longest)))


def flip(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def overwrite(draw: random.Random, data: bytes) -> bytes:
    start, end = part(draw, data)
    size = end - start
    run = draw.choice((bytes(size), b"\xff" * size, b" " * size, draw.randbytes(size)))
    return data[:start] + run + data[end:]


def number(draw: random.Random, data: bytes) -> bytes:
    size, start = draw.choice((1, 2, 4, 8)), place(draw, data)
    return data[:start] + extreme(draw, size) + data[start + size :]


def cut(draw: random.Random, data: bytes) -> bytes:
    return data[: place(draw, data)]


def remove(draw: random.Random, data: bytes) -> bytes:
    start, end = part(draw, data)
    return data[:start] + data[end:]


def insert(draw: random.Random, data: bytes) -> bytes:
    start = place(draw, data)
    return data[:start] + draw.randbytes(draw.choice((1, 3, 16, 512, 5000))) + data[start:]


def repeat(draw: random.Random, data: bytes) -> bytes:
    start, end = part(draw, data)
    times = min(draw.choice((1, 2, 100)), 2**20 // max(1, end - start) + 1)
    return data[:end] + data[start:end] * times + data[end:]


def copy(draw: random.Random, data: bytes) -> bytes:
    """A run laid over another place."""
    start, end = part(draw, data)
    target = place(draw, data)
    return data[:target] + data[start:end] + data[target + end - start :]


GENERIC = (flip, flip, overwrite, number, number, cut, remove, insert, repeat, copy)


def splice(draw: random.Random, first: bytes, second: bytes) -> bytes:
    """The beginning of one file and the end of another."""
    return first[: place(draw, first)] + second[place(draw, second) :]


def damaged(draw: random.Random, data: bytes, most: int = 3) -> bytes:
    """Several mutations, one after the other."""
    for _ in range(draw.randint(1, most)):
        data = draw.choice(GENERIC)(draw, data)
    return data


def damaged_between(draw: random.Random, data: bytes, start: int, end: int) -> bytes:
    """Damage that leaves everything outside a part where it is, and so the length."""
    changed = damaged(draw, data[start:end])
    size = end - start
    return data[:start] + changed[:size] + bytes(max(0, size - len(changed))) + data[end:]


def be32(value: int) -> bytes:
    return struct.pack(">I", value & 0xFFFFFFFF)


def nested(draw: random.Random) -> str:
    """JSON that is deeper than a parser likes."""
    depth = draw.choice((50, 900, 1100, 5000, 100_000))
    start, end = draw.choice((("[", "]"), ('{"caption":', "}")))
    closed = draw.choice((depth, depth, 0, depth - 1))
    return start * depth + ("1" if end == "}" else "") + end * closed


def strange_text(draw: random.Random) -> bytes:
    """Something that stands where a word of a text file should be; seldom ten megabytes."""
    if draw.random() < 0.05:
        return draw.choice((b"x", b"\xc3\xa4", b'"', b" ", b"[", b"9", b"a,", b"\\u0041")) * (LONG // 2)
    return draw.choice(
        (
            b"\0", b"\0" * 100, b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf",
            b"\\ud800", b"\\udfff\\ud800", b"\\u0000", b"\\", b'"', b'""', b"'", b",", b"\t",
            b"\r", b"\n", b"\r\n",
            b"\n" * 1000, b"\x1a", b"\x85", "\u2028".encode(), "\u202e".encode(), b"NaN",
            b"-Infinity", b"1e999",
            b"9" * 400, b"9" * 5000, b"-" + b"1" * 100_000, b"1." + b"0" * 50_000,
            b"null", b"true", b"{}", b"[]",
            b"{", b"}", b"[", b"]", b":", b'{"a":1,"a":2}', b'"\\x"', b"// x", b"=cmd()", b"../../etc/passwd",
            b"/dev/zero", b"/proc/self/mem", b"/dev/stdin", b"a" * 300, b"a/" * 3000, b"\x1f\x8b\x08\0",
        )
    )  # fmt: skip


def damaged_text(draw: random.Random, data: bytes) -> bytes:
    """Strange words in place of words, or between them."""
    for _ in range(draw.randint(1, 3)):
        if len(data) > LONG // 2:
            return data
        start, end = part(draw, data)
        end = draw.choice((start, end, min(len(data), start + 5)))
        word = nested(draw).encode() if draw.random() < 0.15 else strange_text(draw)
        data = data[:start] + word + data[end:]
    return data
