"""RandAugment of pictures, and the views that tasks see in training and evaluation."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from small import MODEL, rng, tools
from timm.data import create_transform
from torchvision.transforms import v2

from beitctl.api import Example
from beitctl_plugins.tasks import augmenting
from beitctl_plugins.tasks.augmenting import OPERATIONS, Augment, augmented
from beitctl_plugins.tasks.preparing import middle, view_of

TIMM = "rand-m9-mstd0.5-inc1"
POLICIES = ("beit3", TIMM)


def noise(height=32, width=32, seed=0):
    return rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Always:
    """A generator whose next number in 0..1 is known: below 0.5 the sign is plus."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


PLUS, MINUS = Always(0.1), Always(0.9)


def done(name, pixels, draw=PLUS):
    return np.array(OPERATIONS[name](Image.fromarray(pixels), draw))


@pytest.mark.parametrize("policy", POLICIES)
def test_equal_draws_give_equal_pictures_and_others_do_not(policy):
    found = [augmented(noise(), policy, rng(seed), "half").tobytes() for seed in (*range(8), *range(8))]
    assert found[:8] == found[8:]
    assert len(set(found)) > 3


@pytest.mark.parametrize("policy", POLICIES)
def test_the_global_generators_are_left_as_they_were(policy):
    random.seed(5)
    np.random.seed(5)
    python, legacy = random.getstate(), np.random.get_state()
    for seed in range(4):
        augmented(noise(), policy, rng(seed))
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), legacy, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_global_generators_change_nothing(policy):
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        found.append(augmented(noise(), policy, rng(3)))
    assert np.array_equal(*found)


@pytest.mark.parametrize("policy", POLICIES)
def test_shape_and_type_stay_and_the_picture_given_is_not_changed(policy):
    pixels = noise(20, 28)
    before = pixels.copy()
    for seed in range(6):
        found = augmented(pixels, policy, rng(seed))
        assert (found.shape, found.dtype) == ((20, 28, 3), np.uint8)
    assert np.array_equal(pixels, before)


def test_without_a_policy_nothing_is_done_and_nothing_drawn():
    draw, pixels = rng(), noise()
    assert augmented(pixels, "", draw) is pixels
    assert draw.random() == rng().random()


def test_about_a_quarter_of_pictures_and_those_with_identity_are_left_alone():
    pixels = noise() // 2 + 60
    same = sum(np.array_equal(augmented(pixels, "beit3", rng(s)), pixels) for s in range(1000))
    assert same / 1000 == pytest.approx((0.5 + 0.5 / 10) ** 2, abs=0.04)


def test_the_ten_operations_are_drawn_alike(monkeypatch):
    counts = dict.fromkeys(OPERATIONS, 0)

    def counted(name):
        def operation(picture, draw):
            counts[name] += 1
            return picture

        return operation

    monkeypatch.setattr(augmenting, "OPERATIONS", {name: counted(name) for name in OPERATIONS})
    for seed in range(2000):
        augmented(noise(4, 4), "beit3", rng(seed))
    assert len(counts) == 10
    assert sum(counts.values()) == pytest.approx(2000, rel=0.06)
    assert all(150 < count < 250 for count in counts.values())


def test_brightness_multiplies_by_the_factor_and_cuts_at_white():
    pixels = np.zeros((1, 3, 3), np.uint8) + np.array([0, 100, 200], np.uint8)[None, :, None]
    assert done("Brightness", pixels)[0, :, 0].tolist() == [0, 136, 255]


def test_sharpness_leaves_edges_and_even_areas_and_deepens_steps():
    pixels = np.full((5, 6, 3), 100, np.uint8)
    pixels[:, 3:] = 150
    row = done("Sharpness", pixels)[2, :, 0].tolist()
    assert row[0] == row[1] == 100
    assert row[4] == row[5] == 150
    assert row[2] < 100 < 150 < row[3]


def test_autocontrast_stretches_every_channel():
    pixels = np.stack([np.full((2, 2), c, np.uint8) for c in (50, 60, 70)], -1)
    pixels[0] += 100
    found = done("AutoContrast", pixels)
    assert (found[0] >= 254).all()
    assert (found[1] == 0).all()


def test_equalize_makes_the_values_even():
    pixels = np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8, 1), 3, 2).repeat(4, 0).repeat(4, 1)
    found = np.unique(done("Equalize", pixels))
    assert (found.min(), found.max()) == (0, 255)
    assert set(np.diff(found.astype(int)).tolist()) <= {4, 5, 6}


def test_identity_does_nothing():
    assert np.array_equal(done("Identity", noise()), noise())


@pytest.mark.parametrize(("draw", "source"), [(PLUS, slice(7, 32)), (MINUS, slice(0, 25))])
def test_translations_are_seven_pixels_and_the_rest_is_grey(draw, source):
    pixels = noise()
    into = slice(0, 25) if draw is PLUS else slice(7, 32)
    rest = slice(25, 32) if draw is PLUS else slice(0, 7)
    across, down = done("TranslateX", pixels, draw), done("TranslateY", pixels, draw)
    assert np.array_equal(across[:, into], pixels[:, source])
    assert np.array_equal(down[into], pixels[source])
    assert (across[:, rest] == 128).all()
    assert (down[rest] == 128).all()


@pytest.mark.parametrize("draw", [PLUS, MINUS], ids=["plus", "minus"])
def test_shears_move_rows_by_their_number_times_the_slope(draw):
    ramp = np.repeat(np.arange(0, 100, 2, dtype=np.uint8)[None, :, None], 50, 0).repeat(3, 2)
    sign = -1 if draw is PLUS else 1
    found = done("ShearX", ramp, draw)[:, :, 0].astype(float)
    for row, column in ((0, 25), (10, 25), (40, 25)):
        assert found[row, column] == pytest.approx(2 * (column + sign * 0.21 * row), abs=1)
    turned = done("ShearY", ramp.transpose(1, 0, 2), draw)[:, :, 0]
    assert np.array_equal(turned.T, found)


@pytest.mark.parametrize(("draw", "sign"), [(PLUS, 1), (MINUS, -1)], ids=["plus", "minus"])
def test_rotation_is_by_21_degrees_about_the_middle(draw, sign):
    pixels = np.full((64, 64, 3), 10, np.uint8)
    pixels[30:35, 50:55] = 250
    found = done("Rotate", pixels, draw)[:, :, 0]
    rows, columns = np.nonzero((found > 130) & (found != 128))
    angle = np.degrees(np.arctan2(32 - rows.mean(), columns.mean() - 32))
    assert angle == pytest.approx(sign * 21, abs=1.5)
    assert (found[0, 0], found[32, 32]) == (128, 10)


def test_a_policy_of_timm_is_what_timm_does_with_the_same_seeds():
    steps = create_transform(
        32, is_training=True, auto_augment="rand-m7-mstd0.5-inc1", interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
    ).transforms  # fmt: skip
    (transform,) = (step for step in steps if type(step).__name__ == "RandAugment")
    for seed in range(12):
        draw = rng(seed)
        random.seed(int(draw.integers(2**63)))
        np.random.seed(int(draw.integers(2**32)))
        expected = np.array(transform(Image.fromarray(noise())))
        found = augmented(noise(), "rand-m7-mstd0.5-inc1", rng(seed), "imagenet")
        assert np.array_equal(found, expected)


def test_the_magnitude_that_keeps_no_bits_does_not_end_training():
    found = [augmented(noise(), "rand-m10-p1-inc1", rng(seed)) for seed in range(40)]
    assert any(not pixels.any() for pixels in found)


@pytest.mark.parametrize(
    "policy",
    ["", "beit3", TIMM, "rand", "rand-n3-m15-p0.8-mmax30-inc0", "rand-mstd101-tweights", "rand-t3aw-p1"],
)
def test_policies_are_read(policy):
    assert TypeAdapter(Augment).validate_python(policy) == policy
    augmented(noise(8, 8), policy, rng())


@pytest.mark.parametrize(
    "policy",
    ["randaug", "Beit3", "rand-", "rand-x9", "rand-m0.5", "rand-p2", "rand-tw", "augmix-m3", "rand-n0"],
)
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(ValidationError, match=r"no augmentation: .* \"rand-m9-mstd0\.5-inc1\""):
        TypeAdapter(Augment).validate_python(policy)


def view(pixels, seed=0, *, train=False, **settings):
    return view_of(Example("x", png(pixels)), rng(seed), tools(train=train), (0.5, 1.0), **settings)


@pytest.mark.parametrize("policy", POLICIES)
def test_training_views_are_augmented_behind_the_crop(policy):
    for seed in range(6):
        draw = rng(seed)
        plain = view_of(Example("x", png(noise(40, 50))), draw, tools(), (0.5, 1.0))
        expected = augmented(plain.transpose(1, 2, 0), policy, draw, "half").transpose(2, 0, 1)
        found = view(noise(40, 50), seed, train=True, augment=policy)
        assert found.shape == (3, 16, 16)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("test", ["centre", "squash"])
def test_evaluation_views_are_never_augmented_cropped_or_flipped_at_random(test):
    found = {view(noise(40, 50), seed, test=test, augment="beit3").tobytes() for seed in range(5)}
    assert len(found) == 1


@pytest.mark.parametrize("size", [(40, 50), (33, 20), (24, 24), (90, 31)], ids=str)
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.95])
def test_the_centre_is_that_of_torchvision(size, crop_pct):
    pixels = np.sort(noise(*size), axis=1)
    official = v2.Compose(
        [v2.Resize(int(16 / crop_pct), interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)]
    )
    expected = np.array(official(Image.fromarray(pixels))).astype(int)
    found = view(pixels, crop_pct=crop_pct).transpose(1, 2, 0)
    assert np.abs(found - expected).max() <= 1


def test_a_squashed_view_shows_all_of_the_picture():
    pixels = np.sort(noise(40, 90), axis=1)
    expected = np.array(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(view(pixels, test="squash").transpose(1, 2, 0) - expected).max() <= 1


def test_the_middle_of_a_very_long_picture_takes_little_memory():
    pixels = np.zeros((1, 2_000_000, 3), np.uint8)
    pixels[:, 1_000_000 - 8 : 1_000_000 + 8] = 200
    found = middle(pixels, 224, 1.0)
    assert found.shape == (224, 224, 3)
    assert (found[112, 112] == 200).all()


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="must be square here"):
        view_of(
            Example("x", png(noise())),
            rng(),
            tools(model=replace(MODEL, image_px=(16, 32))),
            (0.5, 1.0),
        )
