import io
import struct
import subprocess
import sys
import warnings
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from beitctl.data import images
from beitctl.data.images import Crop, Picture, Pictures, centre_crop, random_crop
from beitctl.data.order import generator
from beitctl.errors import DataError

TURN = Image.Transpose
TURNED = dict(
    enumerate(
        (
            TURN.FLIP_LEFT_RIGHT,
            TURN.ROTATE_180,
            TURN.FLIP_TOP_BOTTOM,
            TURN.TRANSPOSE,
            TURN.ROTATE_90,
            TURN.TRANSVERSE,
            TURN.ROTATE_270,
        ),
        2,
    )
)
"""How the camera stores an upright picture, by EXIF orientation."""


def ramp(width=60, height=40):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_of_size(width, height):
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + head
        + struct.pack(">I", zlib.crc32(head))
        + b"\0\0\1\0IDAT"
    )


def opened(image):
    return Pictures().open(image).pil()


def cropped(image, crop, px):
    return Pictures().crop(Picture(np.asarray(image.convert("RGB"))), crop, px)


def far(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L", "YCbCr"])
def test_modes_without_transparency_open_as_they_look(mode):
    image = ramp().convert(mode)
    found = opened(encoded(image, "JPEG", quality=95))
    assert found.mode == "RGB"
    assert far(found, ramp() if mode != "L" else image.convert("RGB")) < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_are_laid_over_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    found = opened(encoded(image.convert(mode)))
    assert [found.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


@pytest.mark.parametrize("transparent", [0, bytes([0, 255])])
def test_a_palette_with_transparency_is_laid_over_white(transparent):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    found = opened(encoded(image, transparency=transparent))
    assert [found.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (40, 50, 60)]


def test_one_bit_opens_as_black_and_white():
    found = opened(encoded(ramp().convert("1")))
    assert set(np.unique(found)) == {0, 255}


def test_sixteen_bits_keep_their_brightness():
    found = opened(encoded(Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))))
    assert [found.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_floats_open_from_black_to_white(white):
    image = Image.fromarray(np.array([[0, white / 2, white]], np.float32))
    found = opened(encoded(image, "TIFF"))
    assert [found.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_thirty_two_bits_keep_their_brightness():
    image = Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], np.int32))
    found = opened(encoded(image, "TIFF"))
    assert [found.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_open_upright_and_size_agrees(orientation, kind):
    stored = ramp() if orientation == 1 else ramp().transpose(TURNED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif)
    assert far(opened(data), ramp()) == 0
    assert Pictures().size(data) == (60, 40)


def test_the_first_frame_of_an_animation_is_opened():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert opened(data).getpixel((3, 3)) == (255, 0, 0)


def test_a_file_opens_like_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(ramp()))
    assert far(opened(path), opened(path.read_bytes())) == 0


def test_the_pixel_limit_is_checked_before_decoding():
    with pytest.raises(
        DataError, match=r"a\.png: 9000x8000 pixels are more than the limit of 64000000; shrink it"
    ):
        Pictures().open(png_of_size(9000, 8000), "a.png")


def test_a_decompression_bomb_is_a_data_error():
    with pytest.raises(DataError, match=r"bomb: not a readable picture \(Image size .*exceeds limit"):
        Pictures().open(png_of_size(60000, 60000), "bomb")


def test_a_large_picture_within_the_limit_does_not_warn(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with warnings.catch_warnings(record=True) as caught:
        assert Pictures().size(encoded(ramp())) == (60, 40)
    assert not caught


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_cut_off_picture_is_a_data_error_that_names_it(kind):
    data = encoded(Image.fromarray(generator(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), kind)
    with pytest.raises(DataError, match=r"photo_7: not a readable picture \(.+\); replace or remove it"):
        Pictures().open(data[: len(data) // 2], "photo_7")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC or AVIF, which cannot be decoded here: convert it to JPEG"),
        (b"%PDF-1.7", "PDF, which has no pixels: convert it to PNG"),
        (b"<svg></svg>", "SVG, which has no pixels: convert it to PNG"),
    ],
)
def test_what_is_taken_for_a_picture_by_mistake_is_named(tmp_path, data, kind):
    (tmp_path / "a.jpg").write_bytes(data)
    for image in (data, tmp_path / "a.jpg"):
        with pytest.raises(DataError) as caught:
            Pictures().open(image, "a")
        assert f"not a readable picture ({kind}); replace or remove it" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"hello, this is text"])
def test_what_is_no_picture_is_a_data_error(data):
    with pytest.raises(DataError, match=r"^a picture: not a readable picture \(unknown format\)"):
        Pictures().open(data)


def test_a_missing_file_is_a_data_error_that_names_it(tmp_path):
    with pytest.raises(
        DataError, match=r"x \(.*gone\.jpg\): not a readable picture \(No such file or directory\)"
    ):
        Pictures().open(tmp_path / "gone.jpg", "x")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_pictures_open_or_are_data_errors(kind):
    data, draw = encoded(ramp(), kind), generator(kind)
    for _ in range(150):
        broken = bytearray(data)
        for place in draw.integers(0, len(data), 4):
            broken[place] = int(draw.integers(256))
        with suppress(DataError):
            assert opened(bytes(broken)).mode == "RGB"


def test_a_damaged_picture_leaves_nothing_on_stderr():
    samples_per_pixel = b"\x15\x01\x03\x00\x01\x00\x00\x00"
    data = encoded(ramp(), "TIFF").replace(samples_per_pixel + b"\x03\x00", samples_per_pixel + b"\x03\x08")
    code = (
        "from beitctl.data.images import Pictures\nfrom beitctl.errors import DataError\n"
        f"try:\n Pictures().open({data!r})\nexcept DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("a picture: not a readable picture")
    assert done.stderr == ""


def test_a_picture_in_the_cache_is_not_decoded_again(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(ramp()))
    pictures = Pictures(cache_mib=1)
    first = pictures.open(path)
    path.unlink()
    assert pictures.open(path) is first


def test_without_a_cache_nothing_is_kept():
    pictures, data = Pictures(), encoded(ramp())
    assert pictures.open(data) is not pictures.open(data)


def test_pictures_of_one_name_are_kept_apart():
    pictures = Pictures(cache_mib=1)
    pictures.open(encoded(ramp()), "a")
    assert pictures.open(encoded(ramp(20, 20)), "a").size == (20, 20)


def test_a_cache_that_hardly_ever_helps_is_given_up(monkeypatch):
    monkeypatch.setattr(images, "PATIENCE", 20)
    pictures = Pictures(cache_mib=5 * 100 * 100 * 3 / 2**20)
    data = [encoded(Image.new("RGB", (100, 100), (i, 0, 0))) for i in range(40)]
    for one in data[:24]:
        pictures.open(one)
    assert len(pictures._kept) > 0
    for one in data:
        pictures.open(one)
    assert (len(pictures._kept), pictures.cache_bytes) == (0, 0)


def test_the_cache_drops_what_was_not_used_for_longest():
    pictures = Pictures(cache_mib=2.5 * 100 * 100 * 3 / 2**20)
    data = [encoded(Image.new("RGB", (100, 100), (i, 0, 0))) for i in range(3)]
    first, second = pictures.open(data[0]), pictures.open(data[1])
    pictures.open(data[0])
    pictures.open(data[2])
    assert pictures.open(data[0]) is first
    assert pictures.open(data[1]) is not second


def test_a_picture_larger_than_the_cache_drops_nothing():
    pictures = Pictures(cache_mib=0.05)
    small = encoded(ramp())
    first = pictures.open(small)
    pictures.open(encoded(ramp(300, 300)))
    assert pictures.open(small) is first


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_has_channels_first_and_can_become_a_tensor(flip):
    found = cropped(ramp(), Crop(5, 10, 20, 20, flip), 16)
    assert (found.shape, found.dtype) == ((3, 16, 16), np.uint8)
    assert torch.from_numpy(found).shape == (3, 16, 16)


def test_a_crop_shows_its_part_of_the_picture():
    found = cropped(ramp(), Crop(10, 20, 8, 8), 8)
    assert (found == np.asarray(ramp())[10:18, 20:28].transpose(2, 0, 1)).all()


def test_a_crop_at_two_sizes_shows_the_same_part():
    crop = Crop(3, 7, 30, 45, flip=True, brightness=1.2, contrast=0.8, saturation=1.3)
    large, small = (cropped(ramp(), crop, px) for px in (64, 32))
    assert far(large.reshape(3, 32, 2, 32, 2).mean((2, 4)), small) < 1.5


def test_a_flip_swaps_left_and_right():
    plain, flipped = (cropped(ramp(), Crop(0, 0, 40, 60, flip), 24) for flip in (False, True))
    assert (plain[:, :, ::-1] == flipped).all()


@pytest.mark.parametrize(
    ("change", "factor", "expected"),
    [
        ("brightness", 0.5, 50),
        ("contrast", 0.0, 100),
        ("saturation", 0.0, 100),
    ],
)
def test_a_colour_factor_does_what_it_says(change, factor, expected):
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    assert (cropped(grey, Crop(0, 0, 8, 8, **{change: factor}), 4) == expected).all()


def test_brightness_comes_before_contrast():
    two = Image.fromarray(np.array([[[200] * 3, [100] * 3]] * 2, np.uint8))
    found = cropped(two, Crop(0, 0, 2, 2, brightness=2.0, contrast=0.5), 2)
    assert found[0, 0].tolist() == [241, 214]  # 255 and 200, half-way to their mean


@pytest.mark.parametrize("crop", [Crop(0, 0, 41, 10), Crop(0, 55, 10, 6), Crop(-1, 0, 5, 5)])
def test_a_crop_over_the_edge_is_a_data_error(crop):
    with pytest.raises(
        DataError, match="over the edge of a picture of 60x40 pixels: the picture has changed"
    ):
        cropped(ramp(), crop, 8)


def test_random_crops_keep_scale_aspect_and_bounds():
    for i in range(500):
        c = random_crop(320, 200, generator(i), scale=(0.2, 0.6), ratio=(0.5, 2.0))
        assert 0 <= c.top <= 200 - c.height
        assert 0 <= c.left <= 320 - c.width
        assert 0.19 <= c.height * c.width / 64000 <= 0.61
        assert 0.48 <= c.width / c.height <= 2.05


def test_random_crops_reach_every_edge():
    crops = [random_crop(20, 20, generator(i)) for i in range(400)]
    assert min(c.top for c in crops) == min(c.left for c in crops) == 0
    assert max(c.top + c.height for c in crops) == max(c.left + c.width for c in crops) == 20


def test_half_of_the_random_crops_are_flipped():
    assert np.mean([random_crop(64, 64, generator(i)).flip for i in range(1000)]) == pytest.approx(
        0.5, abs=0.05
    )


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (0, 493, 10, 13)), ((10, 1000), (493, 0, 13, 10)), ((1, 1), (0, 0, 1, 1))]
)
def test_a_picture_too_long_for_any_draw_is_cropped_in_the_middle(size, box):
    crop = random_crop(*size, generator(0), scale=(1.0, 1.0))
    assert (crop.top, crop.left, crop.height, crop.width) == box


def test_jitter_draws_three_factors_within_its_range():
    drawn = [random_crop(64, 64, generator(i), jitter=0.4) for i in range(300)]
    factors = np.array([(c.brightness, c.contrast, c.saturation) for c in drawn])
    assert factors.min() == pytest.approx(0.6, abs=0.02)
    assert factors.max() == pytest.approx(1.4, abs=0.02)
    assert (np.std(factors, axis=1) > 0).all()


def test_without_jitter_colours_stay():
    crop = random_crop(64, 64, generator(0))
    assert (crop.brightness, crop.contrast, crop.saturation) == (1.0, 1.0, 1.0)


def test_the_centre_crop_is_the_largest_square():
    assert centre_crop(60, 40) == Crop(0, 10, 40, 40)
