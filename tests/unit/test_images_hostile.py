"""Pictures that fuzzing found to do harm, and what was done about them."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from beitctl.data import images
from beitctl.data.images import MOST_SCANS, Pictures
from beitctl.errors import DataError

SOS, EOI = b"\xff\xda", b"\xff\xd9"


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(mode):
    values = np.random.default_rng(0).integers(0, 256, (29, 17, 4), dtype=np.uint8)
    deep = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in deep:
        return Image.fromarray(values[..., 0].astype(deep[mode]) * 200)
    image = Image.fromarray(values)
    return image.convert("RGB").convert(mode) if mode in ("P", "CMYK", "1") else image.convert(mode)


def scans(count, behind=b""):
    whole = encoded(Image.new("L", (64, 64), 77), "JPEG", progressive=True)
    head, last = whole[: whole.rindex(SOS)], whole[whole.rindex(SOS) : -2]
    return head + last * (count - whole.count(SOS) + 1) + EOI + behind


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {"transparency": bytes(range(256))}),
        ("RGB", "PNG", {"transparency": (1, 2, 3)}),
        ("1", "PNG", {}),
        ("I;16", "PNG", {}),
        ("I", "TIFF", {}),
        ("F", "TIFF", {}),
        ("CMYK", "TIFF", {}),
        ("CMYK", "JPEG", {}),
    ],
)
def test_a_picture_converted_in_strips_is_the_same(mode, kind, options, monkeypatch):
    data = encoded(noise(mode), kind, **options)
    whole = Pictures().open(data).pixels
    monkeypatch.setattr(images, "STRIP_PIXELS", 17 * 4)  # 29 rows: the last strip is shorter
    assert np.array_equal(Pictures().open(data).pixels, whole)


def test_sixteen_bits_need_no_copy_in_floats(monkeypatch):
    monkeypatch.setattr(images, "STRIP_PIXELS", 2**16)
    data = encoded(Image.fromarray(np.zeros((1500, 2000), np.uint16)))
    tracemalloc.start()
    Pictures().open(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 14 * 1500 * 2000, "bytes a pixel"


def test_a_palette_before_the_header_is_a_data_error():
    data = encoded(noise("P"))
    palette = data.index(b"PLTE") - 4
    with pytest.raises(DataError, match="not a readable picture"):
        Pictures().open(data[:8] + data[palette:])


def test_a_jpeg_with_very_many_scans_is_refused_before_it_takes_minutes():
    with pytest.raises(DataError, match=f"more than {MOST_SCANS} scans"):
        Pictures().open(scans(MOST_SCANS + 1))


def test_as_many_scans_as_are_allowed_open():
    assert Pictures().open(scans(MOST_SCANS)).size == (64, 64)


def test_what_lies_behind_a_jpeg_counts_no_scans():
    data = scans(10, behind=SOS * 1000)  # such as the film of a phone's motion photo
    assert Pictures().open(data).size == (64, 64)


def test_postscript_is_not_run():
    with pytest.raises(DataError, match="EPS is a program: convert it to PNG"):
        Pictures().open(encoded(Image.new("RGB", (4, 4)), "EPS"))
