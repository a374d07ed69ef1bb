"""The .json members of tars, as ``beitctl data pack`` writes them: ids and captions."""

import json

import pytest
from source_files import examples, ids, png, tar

from beitctl.data import tar_keys
from beitctl_plugins.sources.webdataset import WebDataset


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "cache"))


def source(path, **table):
    return WebDataset(path=path, max_bad_share=1, **table)


def packed(id, name=None, **row):
    """A sample as ``beitctl data pack`` writes it."""
    rows = {"id": id, "captions": ["one", "two"], "label": None, "text": None} | row
    name = tar_keys.key(id) if name is None else name
    return [(f"{name}.jpg", png()), (f"{name}.txt", b"one"), (f"{name}.json", json.dumps(rows).encode())]


@pytest.mark.parametrize("id", ["ä b.jpg", "/1", "a/b.c.png", "", "line\nbreak", "%h", "x" * 300, "plain"])
def test_an_example_of_a_pack_has_the_id_that_was_packed(tmp_path, id):
    assert ids(source(tar(tmp_path / "a.tar", packed(id))).open()) == [id]


def test_ids_of_packs_that_repeat_between_tars_get_the_name_of_the_tar(tmp_path):
    for name in "ab":
        tar(tmp_path / "t" / f"{name}.tar", packed("ü.jpg"))
    assert ids(source(tmp_path / "t").open()) == ["a.tar/ü.jpg", "b.tar/ü.jpg"]


@pytest.mark.parametrize(
    ("key", "id"),
    [("1", "one"), ("50%25", "half"), ("a%2eb", "a.b"), ("a%2Eb", 7), ("%h00", "x"), ("%C3", "\udcc3")],
)
def test_an_id_that_the_key_does_not_stand_for_is_not_taken_as_it_may_occur_twice(tmp_path, key, id):
    assert ids(source(tar(tmp_path / "a.tar", packed(id, key))).open()) == [key]


def test_all_captions_are_taken_from_a_list_in_json(tmp_path):
    path = tar(tmp_path / "a.tar", packed("1", captions=["one", "zwei\n drei"], caption="x"))
    assert source(path).open()[0].captions == ("one", "zwei drei")
    assert source(path, caption="txt").open()[0].captions == ("one",)
    assert source(path, caption="json:caption").open()[0].captions == ("x",)


@pytest.mark.parametrize("captions", [[], "several", [1], [["a"]], None])
def test_what_is_no_list_of_captions_leaves_txt(tmp_path, captions):
    assert source(tar(tmp_path / "a.tar", packed("1", captions=captions))).open()[0].captions == ("one",)


def test_json_that_is_no_object_leaves_txt(tmp_path):
    opened = source(
        tar(tmp_path / "a.tar", [("1%25.jpg", png()), ("1%25.txt", b"a cat"), ("1%25.json", b"[1]")])
    ).open()
    assert [(e.id, e.captions) for e in examples(opened)] == [("1%25", ("a cat",))]


def test_prose_of_a_pack_keeps_its_captions(tmp_path):
    path = tar(tmp_path / "a.tar", packed("1", text=" prose ") + packed("2", text="more", captions=[]))
    opened = source(path, text="json:text").open()
    assert [(e.text, e.captions) for e in examples(opened)] == [("prose", ("one", "two")), ("more", ())]
