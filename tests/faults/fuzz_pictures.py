"""Small pictures of every kind, and damage that a decoder takes for a picture until late."""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from fuzz_bytes import be32, damaged, damaged_between, extreme, splice
from PIL import Image, PngImagePlugin

SIDES = (0, 1, 7, 7999, 8000, 8001, 16384, 32767, 65500, 65535)


def picture(mode: str = "RGB", width: int = 61, height: int = 43) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 40, (height, width, 3))
    x, y = np.meshgrid(np.linspace(0, 215, width), np.linspace(0, 215, height))
    image = Image.fromarray((np.stack([x, y, 215 - x], -1) + noise).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a picture"
    return exif


@functools.cache
def corpus(kind: str) -> tuple[bytes, ...]:
    """Whole files of a kind."""
    return CORPORA[kind]()


def _jpegs() -> tuple[bytes, ...]:
    image, more = picture(), [picture(width=30)]
    return (
        encoded(image, "JPEG"),
        encoded(image, "JPEG", progressive=True, subsampling=0),
        encoded(picture("L"), "JPEG", quality=30),
        encoded(picture("CMYK"), "JPEG"),
        encoded(image, "JPEG", exif=turned(6), icc_profile=bytes(range(256)) * 20),
        encoded(image, "JPEG", restart_marker_blocks=3, subsampling=2, comment=b"hello"),
        encoded(picture(width=400, height=300), "JPEG", progressive=True),
        encoded(image, "MPO", save_all=True, append_images=more),
        encoded(image, "JPEG", keep_rgb=True),
    )


def _pngs() -> tuple[bytes, ...]:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 200, zip=True)
    info.add_itxt("c", "d", "en", "e", zip=True)
    frames = [picture("RGBA", 30 + n) for n in range(3)]
    palette = picture().quantize(16)
    plain = [encoded(picture(mode), "PNG") for mode in ("1", "L", "LA", "RGB", "RGBA", "I;16")]
    return (
        *plain,
        encoded(palette, "PNG"),
        encoded(palette, "PNG", transparency=bytes(range(16))),
        encoded(picture(), "PNG", transparency=(1, 2, 3)),
        encoded(picture(), "PNG", pnginfo=info, exif=turned(8), icc_profile=bytes(1000), dpi=(72, 72)),
        encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
    )


def _webps() -> tuple[bytes, ...]:
    image, frames = picture(), [picture("RGBA").rotate(90 * n) for n in range(3)]
    return (
        encoded(image, "WEBP"),
        encoded(image, "WEBP", lossless=True),
        encoded(picture("RGBA"), "WEBP"),
        encoded(image, "WEBP", exif=turned(5), icc_profile=bytes(500)),
        encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    )


def _gifs() -> tuple[bytes, ...]:
    frames = [picture(width=61 - n) for n in range(3)]
    return (
        encoded(picture(), "GIF"),
        encoded(picture("L"), "GIF", interlace=True, comment=b"hello"),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=0, disposal=2),
    )


def _tiffs() -> tuple[bytes, ...]:
    compressions = ("raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "zstd", "lzma")
    packed = [encoded(picture(), "TIFF", compression=name) for name in compressions]
    plain = [encoded(picture(mode), "TIFF") for mode in ("L", "RGBA", "CMYK", "F", "I", "I;16", "LAB", "P")]
    return (
        *packed,
        *plain,
        encoded(picture("1"), "TIFF", compression="group4"),
        encoded(picture(), "TIFF", save_all=True, append_images=[picture("L")]),
        encoded(picture(), "TIFF", exif=turned(7), big_tiff=True),
    )


def _others() -> tuple[bytes, ...]:
    kinds = (
        "BMP",
        "DIB",
        "PPM",
        "TGA",
        "PCX",
        "SGI",
        "ICO",
        "ICNS",
        "JPEG2000",
        "DDS",
        "AVIF",
        "IM",
        "QOI",
        "EPS",
    )
    found = [encoded(picture(), kind) for kind in kinds]
    return (
        *found,
        encoded(picture("1"), "XBM"),
        encoded(picture("1"), "MSP"),
        encoded(picture("F"), "SPIDER"),
    )


@functools.cache
def cells() -> tuple[bytes, ...]:
    """Pictures that do not compress, so that pages and members that hold them are long."""
    kinds = ("PNG", "JPEG", "WEBP")
    return tuple(encoded(picture(width=30 + n, height=40), kinds[n % 3]) for n in range(8))


CORPORA: dict[str, Callable[[], tuple[bytes, ...]]] = {
    "jpeg": _jpegs, "png": _pngs, "webp": _webps, "gif": _gifs, "tiff": _tiffs, "other": _others,
}  # fmt: skip


def mutated(kind: str, draw: random.Random) -> bytes:
    """One damaged picture."""
    data = draw.choice(corpus(kind))
    way = draw.random()
    if way < 0.5 and kind in OWN:
        data = OWN[kind](draw, data)
        return damaged(draw, data, 1) if draw.random() < 0.15 else data
    if way < 0.58:
        return splice(draw, data, draw.choice(corpus(draw.choice([kind, kind, *CORPORA]))))
    if way < 0.7:  # the header stays, so that the decoder is reached
        return damaged_between(draw, data, min(len(data) // 2, 200), len(data))
    return damaged(draw, data)


# PNG


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents."""
    place, found = 8, []
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    return found


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = (
        be32(len(content)) + name + content + be32(zlib.crc32(name + content)) for name, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png_bomb(draw: random.Random, mode: bytes = b"") -> bytes:
    """A picture of one colour that is as large as is allowed; now and then it is larger."""
    depth, colour, channels = draw.choice(
        ((8, 2, 3), (8, 6, 4), (16, 0, 1), (16, 2, 3), (1, 0, 1), (8, 3, 1), (8, 4, 2))
    )
    width, height = draw.choice(((8000, 8000), (8000, 7000), (60000, 1000), (7000, 9000), (3000, 2000)))
    row = 1 + width * channels * depth // 8
    packer = zlib.compressobj(6)
    block = packer.compress(bytes(row * 50)) + b"".join(
        packer.compress(bytes(row * 50)) for _ in range(height // 50 - 1)
    )
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", block + packer.flush()), (b"IEND", b"")]
    if colour == 3:
        chunks.insert(1, (b"PLTE", bytes(range(48))))
    if draw.random() < 0.3 and colour in (2, 3):
        chunks.insert(-2, (b"tRNS", bytes(6) if colour == 2 else bytes(16)))
    return png_of(chunks)


def _png(draw: random.Random, data: bytes) -> bytes:
    if draw.random() < 0.03:
        return png_bomb(draw)
    chunks = png_chunks(data)
    spot = draw.randrange(len(chunks))
    name, content = chunks[spot]
    way = draw.randrange(8)
    if way <= 1:
        width, height = (draw.choice(SIDES) if draw.random() < 0.7 else 61 for _ in range(2))
        more = bytes(draw.choice((n, draw.randrange(256))) for n in chunks[0][1][8:])
        chunks[0] = (b"IHDR", struct.pack(">II", width, height) + draw.choice((chunks[0][1][8:], more)))
    elif way == 2:
        chunks[spot:spot] = [chunks[spot]] * draw.choice((1, 2, 300))
    elif way == 3:
        del chunks[spot]
    elif way == 4:
        chunks.insert(draw.randrange(len(chunks) + 1), chunks.pop(spot))
    elif way == 5:
        chunks[spot] = (name, damaged(draw, content, 2))  # with the right checksum
    elif way == 6:
        bomb = (
            zlib.compress(bytes(80 * 2**20), 1)
            if draw.random() < 0.1
            else zlib.compress(draw.randbytes(3000))
        )
        bombs = (
            (b"zTXt", b"a\0\0" + bomb),
            (b"iCCP", b"a\0\0" + bomb),
            (b"iTXt", b"a\0\1\0\0\0" + bomb),
            (b"IDAT", bomb),
        )
        chunks.insert(draw.randrange(1, len(chunks)), draw.choice(bombs))
    else:
        whole = png_of(chunks)
        start = len(png_of(chunks[:spot]))
        return whole[:start] + extreme(draw, 4, "big") + whole[start + 4 :]
    return png_of(chunks)


# JPEG


def jpeg_segments(data: bytes) -> list[bytes]:
    """Marker segments; what is coded behind a start of scan belongs to it."""
    found, place = [], 0
    while place < len(data):
        if place + 4 > len(data) or data[place + 1] in (0xD8, 0xD9):
            end = place + 2
        else:
            end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1 : place + 2] == b"\xda":
            while end < len(data) and not (
                data[end] == 0xFF and data[end + 1 : end + 2] not in (b"\0", *RESTARTS)
            ):
                end += 1
        found.append(data[place:end])
        place = end
    return found


RESTARTS = tuple(bytes([0xD0 + n]) for n in range(8))


def _sized(draw: random.Random, segments: list[bytes]) -> None:
    """Another size in the frame header."""
    for place, segment in enumerate(segments):
        if segment[1:2] in (b"\xc0", b"\xc2"):
            height, width = (draw.choice(SIDES) if draw.random() < 0.7 else 61 for _ in range(2))
            segments[place] = segment[:5] + struct.pack(">HH", height, width) + segment[9:]


@functools.cache
def _large_scans() -> list[bytes]:
    """A picture of one colour, of which a scan is a few bytes."""
    return jpeg_segments(encoded(Image.new("L", (7900, 7900), 128), "JPEG", progressive=True))


def jpeg_scans(draw: random.Random) -> list[bytes]:
    """A large picture with the same scan again and again, which takes a decoder long."""
    segments = _large_scans()
    scans = [segment for segment in segments if segment[1:2] == b"\xda"]
    return segments[:-1] + [draw.choice(scans)] * draw.choice((10, 50, 100, 1000)) + segments[-1:]


def _jpeg(draw: random.Random, data: bytes) -> bytes:
    segments = jpeg_segments(data)
    spot = draw.randrange(len(segments))
    way = draw.randrange(9)
    if way <= 1:
        _sized(draw, segments)
    elif way == 2:
        segments[spot:spot] = [segments[spot]] * draw.choice((1, 2, 300))
    elif way == 3:
        del segments[spot]
    elif way == 4:
        segments.insert(draw.randrange(len(segments) + 1), segments.pop(spot))
    elif way == 5:
        segments[spot] = segments[spot][:4] + damaged(draw, segments[spot][4:], 2)
    elif way == 6:
        segments[spot] = segments[spot][:2] + extreme(draw, 2, "big") + segments[spot][4:]
    elif way == 7:
        other = jpeg_segments(draw.choice(corpus("jpeg")))
        segments.insert(spot, draw.choice(other))
    elif draw.random() < 0.1:
        segments = jpeg_scans(draw)
    else:
        segments[spot] = bytes([0xFF, draw.randrange(0xC0, 0x100)]) + segments[spot][2:]
    return b"".join(segments)


# WebP, GIF, TIFF


def webp_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    place, found = 12, []
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        found.append((data[place : place + 4], data[place + 8 : place + 8 + size]))
        place += 8 + size + size % 2
    return found


def webp_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(n + struct.pack("<I", len(c)) + c + b"\0" * (len(c) % 2) for n, c in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _webp(draw: random.Random, data: bytes) -> bytes:
    chunks = webp_chunks(data)
    spot = draw.randrange(len(chunks))
    name, content = chunks[spot]
    way = draw.randrange(6)
    width, height = draw.choice(SIDES), draw.choice(SIDES)
    if way == 0:
        start = {b"VP8X": 4, b"VP8 ": 6, b"VP8L": 1, b"ANMF": 6}.get(name, 0)
        if name == b"VP8X":
            size = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
        elif name == b"VP8L":
            size = struct.pack("<I", (width & 0x3FFF) | (height & 0x3FFF) << 14 | draw.getrandbits(4) << 28)
        else:
            size = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
        chunks[spot] = (name, content[:start] + size + content[start + len(size) :])
    elif way == 1:
        chunks[spot:spot] = [chunks[spot]] * draw.choice((1, 2, 300))
    elif way == 2:
        chunks.insert(draw.randrange(len(chunks)), chunks.pop(spot))
    elif way == 3:
        chunks[spot] = (name, damaged(draw, content, 2))
    elif way == 4:
        del chunks[spot]
    else:
        whole = webp_of(chunks)
        start = len(webp_of(chunks[:spot])) + 4 if draw.random() < 0.7 else 4
        return whole[:start] + extreme(draw, 4, "little") + whole[start + 4 :]
    return webp_of(chunks)


def _gif(draw: random.Random, data: bytes) -> bytes:
    width, height = (draw.choice((*SIDES, 61)) for _ in range(2))
    size = struct.pack("<HH", width, height)
    screen = data[:6] + size + data[10:]
    descriptor = data.find(b",", 13)
    image = data[: descriptor + 5] + size + data[descriptor + 9 :]
    both = screen[: descriptor + 5] + size + data[descriptor + 9 :]
    code = data[: descriptor + 10] + bytes([draw.randrange(256)]) + data[descriptor + 11 :]
    return draw.choice((screen, image, both, code))


def _tiff(draw: random.Random, data: bytes) -> bytes:
    """Another value, count, type or tag in the directory."""
    changed = bytearray(data)
    big = data[2:3] == b"\x2b"
    first = struct.unpack_from("<Q" if big else "<I", data, 8 if big else 4)[0]
    count = struct.unpack_from("<Q" if big else "<H", data, first)[0]
    entry, start = (20, first + 8) if big else (12, first + 2)
    for _ in range(draw.randint(1, 2)):
        spot = start + entry * draw.randrange(count)
        offset, size = draw.choice(((8, 4), (8, 4), (8, 2), (4, 4), (2, 2), (0, 2)))
        value = struct.pack("<I", draw.choice(SIDES)) if draw.random() < 0.5 else extreme(draw, 4, "little")
        changed[spot + offset : spot + offset + size] = value[:size]
    if draw.random() < 0.2:
        changed[start + entry * count : start + entry * count + 4] = struct.pack(
            "<I", first
        )  # follows itself
    return bytes(changed)


OWN: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "jpeg": _jpeg, "png": _png, "webp": _webp, "gif": _gif, "tiff": _tiff,
}  # fmt: skip
