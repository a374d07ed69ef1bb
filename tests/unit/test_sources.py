import copy
import pickle
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from source_files import ROWS, examples, fill, ids, png, table

from beitctl import registry
from beitctl.data.images import Pictures
from beitctl_plugins.sources.embedded import Embedded
from beitctl_plugins.sources.image_folder import ImageFolder
from beitctl_plugins.sources.pairs import Pairs
from beitctl_plugins.sources.text import Text


@pytest.mark.parametrize(
    ("split", "pictures", "pieces"), [("train", 1203, 1862), ("test", 286, 97), ("all", 1489, 1959)]
)
def test_the_embedded_set_has_its_splits(split, pictures, pieces):
    assert len(Embedded(split=split).open()) == len(Embedded(split=split, content="pairs").open()) == pictures
    assert len(Embedded(split=split, content="text").open()) == pieces


def test_train_and_test_share_no_example():
    for content in ("pictures", "text"):
        train, test = (set(ids(Embedded(split=split, content=content).open())) for split in ("train", "test"))
        assert not train & test


def test_every_embedded_picture_decodes():
    pictures = Pictures()
    assert all(min(pictures.open(e.image, e.id).size) >= 16 for e in examples(Embedded(split="all").open()))


def test_embedded_pictures_have_one_of_26_labels_and_no_caption():
    found = examples(Embedded(split="all").open())
    assert len({e.label for e in found}) == 26
    assert {e.captions for e in found} == {()}


def test_embedded_pairs_have_captions():
    first = Embedded(content="pairs").open()[0]
    assert first.captions == ("a blue and white striped angelfish swimming near the sea floor",)
    assert first.label == "fish"


def test_embedded_text_is_prose():
    first = Embedded(content="text").open()[0]
    assert first.text.startswith("Nevertheless, it may well be believed")
    assert (first.image, first.captions) == (None, ())


def test_kinds_choose_pictures():
    found = ids(Embedded(split="all", kinds=["photo", "museum"]).open())
    assert len(found) == 232 + 153
    assert {id.partition("_")[0] for id in found} == {"photo", "ski", "art"}


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValidationError, match="'photo', 'museum' or 'clipart'"):
        Embedded(kinds=["video"])


def test_kinds_of_text_are_refused():
    with pytest.raises(ValidationError, match="kinds chooses pictures; remove it, or set content"):
        Embedded(content="text", kinds=["photo"])


def test_a_limit_spreads_over_the_set():
    found = ids(Embedded(limit=10).open())
    assert len(found) == 10
    assert {id.partition("_")[0] for id in found} == {"photo", "art", "clip"}


def test_a_limit_above_the_size_keeps_all():
    assert len(Embedded(split="test", content="text", limit=1000).open()) == 97


def test_the_notice_names_author_and_source_of_every_embedded_picture(request):
    notice = " ".join((request.config.rootpath / "NOTICE").read_text().split())
    table = pq.read_table(request.config.rootpath / "plugins/beitctl_plugins/sources/data/embedded.parquet")
    for row in table.select(["id", "author", "source", "license"]).to_pylist():
        source = " ".join(row["source"].split()).removeprefix("openclipart 0.18: openclipart/")
        assert source in notice
        assert " ".join(row["author"].strip(" ,").split()) in notice
        assert row["license"] in notice


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path, "1.png", "2.png", "3.png")


@pytest.fixture
def sources(folder):
    (folder / "a.txt").write_text("one\ntwo")
    return {
        "embedded": Embedded(split="test", limit=20),
        "image-folder": ImageFolder(path=folder),
        "pairs": Pairs(path=table(folder, ROWS)),
        "text": Text(path=folder / "a.txt"),
    }


NAMES = ("embedded", "image-folder", "pairs", "text")


@pytest.mark.parametrize("name", NAMES)
def test_sources_are_installed_under_their_names(sources, name):
    assert registry.get("beitctl.sources", name) is type(sources[name])


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_unique_and_opening_again_gives_the_same(sources, name):
    first, again = sources[name].open(), sources[name].open()
    assert len(set(ids(first))) == len(first) > 0
    assert examples(first) == examples(again)
    assert first.fingerprint == again.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_opened_sources_travel_to_worker_processes(sources, name):
    opened = sources[name].open()
    assert examples(pickle.loads(pickle.dumps(opened))) == examples(opened)


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_a_source_is_an_index_error(sources, name):
    opened = sources[name].open()
    with pytest.raises(IndexError):
        opened[len(opened)]


@pytest.mark.parametrize(("name", "file"), [("image-folder", "1.png"), ("pairs", "1.png"), ("text", "a.txt")])
def test_a_changed_byte_changes_the_fingerprint(sources, folder, name, file):
    before = sources[name].open().fingerprint
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(data)
    assert sources[name].open().fingerprint != before


def test_other_settings_change_the_fingerprint():
    chosen = [
        Embedded(),
        Embedded(split="test"),
        Embedded(content="pairs"),
        Embedded(limit=9),
        Embedded(kinds=["photo"]),
    ]
    assert len({source.open().fingerprint for source in chosen}) == 5


def test_a_moved_folder_keeps_its_fingerprint(folder, tmp_path_factory):
    other = fill(tmp_path_factory.mktemp("other"), "1.png", "2.png", "3.png")
    assert ImageFolder(path=folder).open().fingerprint == ImageFolder(path=other).open().fingerprint


def test_a_large_set_is_hashed_by_names_and_sizes(folder, monkeypatch):
    monkeypatch.setattr("beitctl_plugins.sources.opened.SMALL_BYTES", 0)
    before = ImageFolder(path=folder).open().fingerprint
    (folder / "1.png").write_bytes(bytes(len(png())))
    assert ImageFolder(path=folder).open().fingerprint == before
    (folder / "1.png").write_bytes(b"shorter")
    assert ImageFolder(path=folder).open().fingerprint != before


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_a_recipe(sources, name):
    source = sources[name]
    assert type(source).model_validate(copy.deepcopy(source.model_dump(mode="json"))) == source


def test_sources_import_without_torch():
    code = (
        "import sys; from beitctl_plugins.sources import embedded, image_folder, pairs, text; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
