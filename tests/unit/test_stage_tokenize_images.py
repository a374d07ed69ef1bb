"""The stage tokenize-images: a store of fixed views, whatever is unreadable or interrupted."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small import Given, Letters, Record, coloured, png
from torch import nn

from beitctl.api import Example, Job
from beitctl.data.images import Pictures, random_crop
from beitctl.data.order import generator
from beitctl.data.store import TokenStore
from beitctl.errors import ChangedError, DataError, UserError
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.stages.tokenize_images import TokenizeImages


class Reds:
    """A tokenizer of 2 x 2 codes: the code is how red a quarter is, 0 to 7."""

    codes, grid, image_px, fingerprint = 8, 2, 8, "reds"
    model = nn.Identity()

    def __init__(self):
        self.seen = 0

    def encode(self, images):
        self.seen += len(images)
        red = nn.functional.avg_pool2d(images[:, 0].float(), 4)
        return (red / 32).long().clamp(0, 7).flatten(1)

    def closest(self, images):
        """The redder, the closer."""
        red = nn.functional.avg_pool2d(images[:, 0].float(), 4).flatten(1)
        return (red / 32).long().clamp(0, 7), red


@pytest.fixture
def tokenizer(monkeypatch):
    found = Reds()
    monkeypatch.setattr("beitctl.checkpoints.native.load_tokenizer", lambda path: found)
    return found


def source(*bad, count=5):
    """Pictures p0, p1 ...; those that are ``bad`` cannot be read."""
    pictures = [png((40 * i, 0, 0)) if i not in bad else b"no picture" for i in range(count)]
    return Given(examples=tuple(Example(f"p{i}", picture) for i, picture in enumerate(pictures)))


def stage(*sources, **settings):
    made = {"tokenizer": ".", "sources": list(sources), "views": 2, "shard_pictures": 2} | settings
    return TokenizeImages(**made)


def run(folder, made, **options):
    log = Record()
    return made.run(Job(folder, log, **options)), log


def record(folder):
    """What the store says about itself, but for who made it."""
    found = json.loads((folder / "tokens" / "store.json").read_text())
    del found["made"]
    return found


def test_every_view_of_every_picture_has_its_codes(tokenizer, tmp_path):
    metrics, _ = run(tmp_path, stage(source()))
    store = TokenStore.open(tmp_path / "tokens")
    assert store.ids == ["p0", "p1", "p2", "p3", "p4"]
    assert [store.view("p4", view)[1].tolist() for view in range(2)] == [[5] * 4] * 2
    assert (metrics["pictures"], metrics["views"], metrics["skipped"], tokenizer.seen) == (5, 10, 0, 10)


def test_the_codes_are_those_of_the_crop_that_is_stored(tokenizer, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    example = Example("noise", stream.getvalue())
    run(tmp_path, stage(Given(examples=(example,)), crop_scale=(0.2, 0.6)))
    store, pictures = TokenStore.open(tmp_path / "tokens"), Pictures()
    for number in range(2):
        crop, codes = store.view("noise", number)
        pixels = torch.from_numpy(pictures.crop(pictures.open(example.image), crop, 8))
        assert tokenizer.encode(pixels[None])[0].tolist() == codes.tolist()


def test_the_store_says_what_made_it(tokenizer, tmp_path):
    run(tmp_path, stage(source()))
    store = TokenStore.open(tmp_path / "tokens")
    assert (store.tokenizer, store.codes, store.grid, store.views, store.source) == ("reds", 8, 2, 2, "given")


def test_usage_of_the_codes_is_measured(tokenizer, tmp_path):
    metrics, log = run(tmp_path, stage(source(count=2)))
    assert metrics["codebook_used"] == 2
    assert metrics["codebook_perplexity"] == pytest.approx(2)
    assert [figure[0] for figure in log.said["figure"]] == ["codes"]


def test_a_patch_stands_for_every_used_code(tokenizer, tmp_path):
    run(tmp_path, stage(source()))
    patches = np.load(tmp_path / "tokens" / "patches.npy")
    assert patches.shape == (8, 3, 4, 4)
    assert patches[[1, 2, 3, 5], 0, 0, 0].tolist() == [40, 80, 120, 160]


def test_a_corrupt_picture_is_skipped_counted_and_told(tokenizer, tmp_path):
    metrics, log = run(tmp_path, stage(source(3)))
    assert TokenStore.open(tmp_path / "tokens").ids == ["p0", "p1", "p2", "p4"]
    assert metrics["skipped"] == 1
    ((code, message, fix),) = log.said["warning"]
    assert (code, fix) == ("W301", "look at the file, or remove it")
    assert message.startswith("skipped p3: ")


def test_an_example_without_a_picture_is_skipped(tokenizer, tmp_path):
    made = Given(examples=(Example("p", png()), Example("words", text="words")))
    metrics, _ = run(tmp_path, stage(made))
    assert metrics["skipped"] == 1
    assert TokenStore.open(tmp_path / "tokens").skipped == ["words: no picture"]


def test_more_corrupt_pictures_than_the_share_are_named_with_the_setting(tokenizer, tmp_path):
    with pytest.raises(
        DataError,
        match=r"2 of 5 pictures cannot be read \(max_bad_share = 0.001; remove them, or raise it\): p1.*p3",
    ):
        run(tmp_path, stage(source(1, 3)))
    assert not (tmp_path / "tokens" / "store.json").exists()


def test_the_share_can_be_raised(tokenizer, tmp_path):
    assert run(tmp_path, stage(source(1, 3), max_bad_share=0.4))[0]["skipped"] == 2


def test_a_run_that_failed_for_corrupt_pictures_fails_again_when_it_is_resumed(tokenizer, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match="2 of 5 pictures cannot be read"):
            run(tmp_path, stage(source(1, 3)))


def test_it_goes_on_after_the_last_whole_shard(tokenizer, tmp_path):
    run(tmp_path, stage(source()))
    whole = record(tmp_path)
    (tmp_path / "tokens" / "store.json").unlink()
    (tmp_path / "tokens" / "tokens-00001.parquet").unlink()
    tokenizer.seen = 0
    metrics, _ = run(tmp_path, stage(source()))
    assert tokenizer.seen == 4
    assert metrics["pictures"] == 5
    assert record(tmp_path) == whole


def test_without_resume_everything_is_encoded_again(tokenizer, tmp_path):
    run(tmp_path, stage(source()))
    tokenizer.seen = 0
    run(tmp_path, stage(source()), resume=False)
    assert tokenizer.seen == 10


def test_views_do_not_depend_on_the_size_of_shards(tokenizer, tmp_path):
    stores = []
    for size in (1, 5):
        run(tmp_path / str(size), stage(source(), shard_pictures=size))
        stores.append(TokenStore.open(tmp_path / str(size) / "tokens"))
    views = [[str(store.view(id, n)) for id in store.ids for n in range(2)] for store in stores]
    assert views[0] == views[1]


def test_ids_that_repeat_among_sources_are_refused_before_anything_is_encoded(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"sources 0 and 1 both have a picture named 'p0'"):
        run(tmp_path, stage(source(count=2), source(count=2)))
    assert tokenizer.seen == 0


def test_ids_that_repeat_within_a_source_are_refused(tokenizer, tmp_path):
    twice = Given(examples=source(count=2).examples * 2)
    with pytest.raises(DataError, match="'p0' is in it twice; ids of a source must be unique"):
        run(tmp_path, stage(twice))


class Gone(Given):
    """Pictures in a shard that is removed meanwhile."""

    def open(self):
        def example(number):
            raise ChangedError("0.tar: removed since it was opened")

        return Opened(range(3), example, "gone")


def test_a_shard_that_is_gone_ends_the_stage(tokenizer, tmp_path):
    with pytest.raises(ChangedError, match=r"0\.tar: removed"):
        run(tmp_path, stage(Gone(examples=())))


def test_nothing_but_corrupt_pictures_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"the token store holds no picture; check the source"):
        run(tmp_path, stage(source(0, count=1)))


def test_the_plan_counts_views(tokenizer):
    made = stage(coloured("red", "blue"), source(), views=3, tokenizer="@train-tokenizer.image")
    assert made.plan() == {"pictures": 7, "views": 21, "tokenizer": "@train-tokenizer.image"}


def test_a_code_is_shown_by_the_patch_closest_to_it(tmp_path, tokenizer):
    pictures = tuple(Example(f"p{i}", png((red, 0, 0))) for i, red in enumerate((0, 70, 90, 80)))
    run(tmp_path, stage(Given(examples=pictures)))
    patches = np.load(tmp_path / "tokens" / "patches.npy")
    assert patches.shape == (8, 3, 4, 4)
    assert patches[2, 0].min() == patches[2, 0].max() == 90
    assert not patches[5].any()


def picture_file(mode, kind, **options):
    """A picture of 20 px whose red is 200, as a file of a kind and mode."""
    stream, picture = io.BytesIO(), Image.new("RGB", (20, 20), (200, 200, 200))
    if mode == "I;16":
        picture = Image.fromarray(np.full((20, 20), 200 * 257, np.uint16))
    else:
        picture = picture.convert(mode)
    if options.pop("frames", 0):
        options |= {"save_all": True, "append_images": [Image.new(mode, (20, 20))]}
    picture.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("L", "PNG", {}),
        ("CMYK", "JPEG", {"quality": 100}),
        ("I;16", "PNG", {}),
        ("P", "GIF", {"frames": 2}),
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("RGB", "WEBP", {"lossless": True}),
    ],
)
def test_grey_cmyk_16_bit_animated_and_alpha_pictures_have_codes_of_what_they_show(
    tokenizer, tmp_path, mode, kind, options
):
    example = Example("p", picture_file(mode, kind, **options))
    run(tmp_path, stage(Given(examples=(example,))))
    assert TokenStore.open(tmp_path / "tokens").view("p", 0)[1].tolist() == [6] * 4


def test_a_picture_cut_off_in_the_middle_is_skipped_by_name(tokenizer, tmp_path):
    whole = picture_file("RGB", "JPEG")
    examples = (Example("good", whole), Example("half", whole[: len(whole) // 2]))
    run(tmp_path, stage(Given(examples=examples)))
    store = TokenStore.open(tmp_path / "tokens")
    assert store.ids == ["good"]
    assert [line.startswith("half: not a readable picture") for line in store.skipped] == [True]


def test_the_job_ends_as_soon_as_too_many_pictures_are_bad(tokenizer, tmp_path):
    with pytest.raises(DataError, match="2 of 40 pictures cannot be read"):
        run(tmp_path, stage(source(0, 1, count=40)))
    assert len(list((tmp_path / "tokens").glob("*.parquet"))) < 5


def test_a_picture_file_that_went_away_is_named_with_its_path(tokenizer, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    examples = (Example("a", tmp_path / "a.png"), Example("b", tmp_path / "b.png"))
    run(tmp_path, stage(Given(examples=examples)))
    (line,) = TokenStore.open(tmp_path / "tokens").skipped
    assert line.startswith(f"b ({tmp_path}/b.png): not a readable picture (No such file or directory)")


def test_the_store_knows_the_bytes_of_every_picture(tokenizer, tmp_path):
    (tmp_path / "a.png").write_bytes(png((9, 9, 9)))
    run(tmp_path, stage(Given(examples=(Example("a", tmp_path / "a.png"), Example("b", png())))))
    store = TokenStore.open(tmp_path / "tokens")
    assert store.picture("a") == hashlib.blake2b(png((9, 9, 9)), digest_size=16).digest()
    assert store.picture("b") == hashlib.blake2b(png(), digest_size=16).digest()


def test_views_are_those_of_the_seed_and_the_id(tokenizer, tmp_path):
    run(tmp_path, stage(source(), seed=3, crop_scale=(0.1, 0.5), jitter=0.3))
    store, rng = TokenStore.open(tmp_path / "tokens"), generator(3, "views", "p2")
    drawn = [random_crop(20, 20, rng, scale=(0.1, 0.5), jitter=0.3) for _ in range(2)]
    assert [store.view("p2", number)[0] for number in range(2)] == drawn


def test_a_run_without_resume_clears_what_other_settings_left(tokenizer, tmp_path):
    run(tmp_path, stage(source(), shard_pictures=1))
    run(tmp_path, stage(source(), shard_pictures=4), resume=False)
    assert len(list((tmp_path / "tokens").glob("*.parquet"))) == 2
    assert len(TokenStore.open(tmp_path / "tokens").ids) == 5


@pytest.mark.parametrize(
    ("change", "told"),
    [({"jitter": 0.4}, "jitter was 0.0, is 0.4"), ({"precision": "bf16"}, 'precision was "fp32", is "bf16"')],
)
def test_a_stopped_run_with_other_settings_is_refused_by_name(tokenizer, tmp_path, change, told):
    run(tmp_path, stage(source(), precision="fp32"))
    with pytest.raises(UserError, match=f"of a store with other settings: {told}"):
        run(tmp_path, stage(source(), **{"precision": "fp32"} | change))


def test_a_tokenizer_of_texts_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("beitctl.checkpoints.native.load_tokenizer", lambda path: Letters())
    with pytest.raises(UserError, match=r"tokenizer: \. is no image tokenizer"):
        run(tmp_path, stage(source()))


def test_an_unknown_setting_of_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer_settings: unknown head; known: heads"):
        run(tmp_path, stage(source(), tokenizer_settings={"head": 3}))
