"""One set in every layout gives the same examples through every source."""

import functools

import datasets
import layouts
import numpy as np
import pytest
from named_layouts import WNIDS
from one_set import LABELS, PROSE, rows
from source_files import examples, ids

from beitctl.data.images import Pictures
from beitctl.data.loader import Stream
from beitctl.inspecting import finding

PICTURES = [write.__name__ for write in layouts.PICTURES]
TEXTS = [write.__name__ for write in layouts.TEXTS]
NO_CAPTIONS = {"folder_classes", "path_list", "imagenet"}
ONE_CAPTION = {"webdataset_plain"}
NO_LABELS = {"coco", "flickr30k"}
PACKED = {"pack_parquet", "pack_tar"}
"""Pictures in there are JPEGs, so those that were none are only close to what they were."""
KINDS = {
    "folder": "image-folder", "path": "path-list", "parquet": "parquet", "arrow": "parquet",
    "feather": "parquet", "webdataset": "webdataset", "pairs": "pairs", "pairs_parquet": "parquet",
    "hub_parquet": "parquet", "hub_streaming": "parquet", "hub_saved": "hub", "hub_pictures": "image-folder",
    "coco": "coco", "flickr30k": "flickr30k", "imagenet": "imagenet", "pack_parquet": "parquet",
    "pack_tar": "webdataset", "text": "text", "text_parquet": "parquet",
}  # fmt: skip
"""What ``beitctl data`` takes a layout for, by its name or the first word of that."""


def own_id(layout, row):
    """What an example is named by, as far as the layout can say it."""
    if layout in ("coco", "flickr30k"):
        return row.name
    if layout == "imagenet":
        return f"train/{WNIDS[LABELS.index(row.label)]}/{row.name}"
    return row.id.rpartition(".")[0] if layout == "webdataset_plain" else row.id


def place_of(source):
    return getattr(source, "path", None) or source.dataset


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """All layouts, once more elsewhere, and with one picture and one piece that is another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        folder = tmp_path_factory.mktemp("layouts")
        again = layouts.write_all(folder / "again"), layouts.write_all(folder / "changed", changed=True)
        yield layouts.write_all(folder / "set"), *again


@pytest.fixture(scope="module")
def opened(written):
    return {name: source.open() for name, source in written[0].items()}


def decoded(image):
    return np.asarray(Pictures().open(image).pil().convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def matched(opened):
    """For a layout each row of the set with the example that has its picture."""
    pixels = [(row, decoded(row.data)) for row in rows()]

    @functools.cache
    def pairs(layout):
        found = [(example, decoded(example.image)) for example in examples(opened[layout])]
        assert len(found) == len(pixels)
        most = 3 if layout in PACKED else 0
        chosen = []
        for row, wanted in pixels:
            alike = [e for e, shown in found if shown.shape == wanted.shape and near(shown, wanted, most)]
            assert len(alike) == 1
            chosen.append((row, alike[0]))
        return chosen

    return pairs


def near(shown, wanted, most):
    return abs(shown - wanted).mean() <= most


@pytest.mark.parametrize("layout", PICTURES)
def test_every_layout_of_pictures_gives_the_same_examples(layout, opened, matched):
    assert not opened[layout].problems
    pairs = matched(layout)
    kept = 0 if layout in NO_CAPTIONS else 1 if layout in ONE_CAPTION else 9
    assert [e.captions for _, e in pairs] == [
        tuple(" ".join(caption.split()) for caption in row.captions[:kept]) for row, _ in pairs
    ]
    assert [e.label for _, e in pairs] == [None if layout in NO_LABELS else row.label for row, _ in pairs]
    assert {e.text for _, e in pairs} == {None}


@pytest.mark.parametrize("layout", PICTURES)
def test_every_layout_of_pictures_gives_the_same_bytes(layout, matched):
    for row, example in matched(layout):
        data = example.image if isinstance(example.image, bytes) else example.image.read_bytes()
        if layout not in PACKED or row.id.endswith(".jpg"):
            assert data == row.data
        else:
            assert data[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("layout", PICTURES)
def test_ids_are_those_of_the_layout_and_the_same_everywhere(layout, matched):
    found = {row.id: example.id for row, example in matched(layout)}
    if layout == "hub_streaming":
        assert sorted(found.values()) == sorted(f"train[{number}]" for number in range(len(found)))
    else:
        assert found == {row.id: own_id(layout, row) for row in rows()}


@pytest.mark.parametrize("layout", TEXTS)
def test_every_layout_of_prose_gives_the_same_pieces(layout, opened):
    assert not opened[layout].problems
    found = examples(opened[layout])
    assert sorted(example.text for example in found) == sorted(PROSE)
    assert {(e.image, e.captions, e.label) for e in found} == {(None, (), None)}
    assert len(set(ids(opened[layout]))) == len(PROSE)


@pytest.mark.parametrize("layout", PICTURES + TEXTS)
def test_the_fingerprint_changes_with_the_content_alone(layout, written, opened):
    _, again, changed = written
    assert again[layout].open().fingerprint == opened[layout].fingerprint
    assert changed[layout].open().fingerprint != opened[layout].fingerprint


@pytest.mark.parametrize("layout", PICTURES + TEXTS)
def test_beitctl_data_finds_a_source_that_reads_the_same(layout, written, opened):
    source = written[0][layout]
    found = finding.find(str(place_of(source)))
    assert found.kind == KINDS.get(layout) or KINDS[layout.partition("_")[0]]
    assert (found.also, found.warnings) == ((), ())
    assert sorted(map(content, examples(found.open()))) == sorted(map(content, examples(opened[layout])))


def content(example):
    image = example.image
    data = b"" if image is None else image if isinstance(image, bytes) else image.read_bytes()
    return data, example.captions, example.text or ""


@pytest.mark.parametrize("layout", PICTURES + TEXTS)
def test_a_stream_gives_every_example_once_an_epoch(layout, opened):
    order = Stream("s", task=None, examples=opened[layout], samples=3, tools=None).order
    count = len(opened[layout])
    for epoch in range(2):
        places = [order.at(position, 7) for position in range(epoch * count, (epoch + 1) * count)]
        assert sorted(places) == [(epoch, index) for index in range(count)]


def test_the_set_has_what_the_layouts_are_to_carry():
    made = rows()
    assert {len(row.captions) for row in made} == {1, 2, 3}
    assert len({row.id for row in made}) == len({row.name for row in made}) == len(made) == 12
    assert len({row.name.rpartition(".")[2] for row in made}) == 8
    assert sum(a.data != b.data for a, b in zip(made, rows(changed=True), strict=True)) == 1
