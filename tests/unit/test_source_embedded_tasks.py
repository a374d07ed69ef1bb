"""Questions, statements and scenes made from the embedded pictures."""

import functools
import io
import pickle
from collections import Counter, defaultdict
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from source_files import examples, ids

from beitctl.data.order import digest
from beitctl_plugins.sources.embedded import TWINS, Embedded
from beitctl_plugins.sources.making.concepts import CONCEPTS, concept
from beitctl_plugins.sources.making.questions import questions
from beitctl_plugins.sources.making.scenes import CLASSES, box_of, run_lengths
from beitctl_plugins.sources.making.statements import statements


@functools.cache
def opened(content, split="test", **more):
    return Embedded(content=content, split=split, **more).open()


def decoded(rle):
    """A mask from its run lengths, by the definition of COCO."""
    values = np.repeat(np.arange(len(rle["counts"])) % 2, rle["counts"])
    return values.reshape(rle["size"], order="F").astype(bool)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("content", "split", "count"),
    [
        ("questions", "train", 3933), ("questions", "test", 924), ("statements", "train", 1202),
        ("statements", "test", 286), ("objects", "train", 600), ("objects", "test", 150),
        ("objects", "all", 750),
    ],
)  # fmt: skip
def test_what_is_made_has_its_size(content, split, count):
    assert len(opened(content, split)) == count


@pytest.mark.parametrize("content", ["questions", "statements", "objects"])
def test_the_same_is_made_again_and_in_worker_processes(content):
    first, second = (Embedded(content=content, split="test", limit=12).open() for _ in range(2))
    again = examples(second)
    assert len(again) == 12
    assert examples(first) == again == examples(pickle.loads(pickle.dumps(first)))
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("content", ["questions", "statements"])
def test_train_and_test_share_no_picture(content):
    used = []
    for split in ("train", "test"):
        found = examples(opened(content, split))
        used.append({e.image for e in found} | {e.second for e in found if e.second})
    assert not used[0] & used[1]
    assert set(ids(opened(content, "all"))) == {i for s in ("train", "test") for i in ids(opened(content, s))}


@pytest.mark.parametrize("content", ["questions", "statements", "objects"])
def test_ids_are_unique(content):
    found = opened(content, "all").rows if content != "objects" else opened(content, limit=20)
    names = [row.id for row in found]
    assert len(set(names)) == len(names)


def test_every_picture_has_a_question_and_yes_is_as_frequent_as_no_in_the_same_words():
    found = examples(opened("questions", "train"))
    asked = Counter(e.id.partition("-")[0] for e in found)
    assert set(asked) == set(ids(Embedded().open())) - set(TWINS)
    assert max(asked.values()) <= 4
    answers = defaultdict(Counter)
    for example in found:
        answers[example.text].update(example.answers)
    decided = [a for a in answers.values() if "yes" in a or "no" in a]
    assert len(decided) > 60
    assert all(set(a) == {"yes", "no"} and a["yes"] == a["no"] for a in decided)


def test_questions_can_be_answered_from_what_is_known_of_the_picture():
    rows = {row["id"]: row for row in Embedded(split="all").open().rows}
    for example in examples(opened("questions", "all")):
        name, _, kind = example.id.partition("-")
        named = concept(rows[name])
        if kind == "what":
            assert example.answers == (named,)
        if kind in ("there", "not-there"):
            said = next(n for n, (phrase, _) in CONCEPTS.items() if phrase in example.text.split("?")[0])
            assert example.answers == ("yes" if kind == "there" else "no",)
            assert kind == "not-there" or CONCEPTS[named][0] in example.text, said


def test_every_picture_is_the_left_one_and_half_of_each_statement_is_true():
    for split in ("train", "test"):
        found = examples(opened("statements", split))
        pictures = set(ids(Embedded(split=split).open())) - set(TWINS)
        assert {e.id.partition("+")[0] for e in found} == pictures
        labels = defaultdict(Counter)
        for example in found:
            labels[example.text][example.label] += 1
        assert all(count["True"] == count["False"] for count in labels.values())
        assert all(e.image != e.second for e in found)


def row(id, kind, label, fine=""):
    return {"id": id, "kind": kind, "label": label, "fine": fine or label, "image": id.encode()}


def test_statements_are_what_they_say():
    rows = {e["id"]: e for e in Embedded(split="train").open().rows}
    for example in examples(opened("statements", "train")):
        left, right = (rows[name] for name in example.id.split("+"))
        phrases = [CONCEPTS[concept(one)][0] for one in (left, right)]
        true = example.label == "True"
        text = example.text
        if text.endswith("in the left picture") or text.startswith("the left picture shows"):
            assert (phrases[0] in text) is true
        elif text.endswith("in the right picture") or text.startswith("the right picture shows"):
            assert (phrases[1] in text) is true
        elif "same kind" in text or "one kind" in text:
            assert (phrases[0] == phrases[1]) is true
        elif text in ("both pictures are drawings", "each of the pictures is drawn"):
            assert (left["kind"] == right["kind"] == "clipart") is true


def test_too_few_pictures_still_give_statements():
    rows = [row(f"a{n}", "clipart", "animal") for n in range(3)] + [
        row(f"t{n}", "photo", "tool") for n in range(3)
    ]
    made = statements(rows, "test")
    assert len(made) == 6
    assert Counter(one.label for one in made) == {"True": 3, "False": 3}
    assert questions(rows, "test") == questions(rows, "test")


def test_scenes_have_exact_masks_and_boxes():
    found = opened("objects", "train", limit=60)
    assert found.segments == CLASSES
    for example in examples(found):
        classes = pixels(example.segmentation)
        assert classes.shape == pixels(example.image).shape[:2] == (128, 128)
        union = np.zeros_like(classes)
        for thing in example.objects:
            mask = decoded(thing.mask)
            assert mask.sum() >= 16
            assert not (union[mask]).any()  # only what can be seen
            union[mask] = CLASSES.index(thing.label) + 1
            rows, columns = np.nonzero(mask)
            left, top, width, height = thing.box
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
        assert (union == classes).all()
    assert {len(found.objects(n)) for n in range(60)} == {1, 2, 3}
    assert (found.label(0), found.words(0)) == (None, ())


def test_scenes_have_the_size_that_is_asked_for():
    example = opened("objects", scene_px=64, limit=1)[0]
    assert pixels(example.image).shape == (64, 64, 3)
    assert example.objects[0].mask["size"] == [64, 64]


@pytest.mark.parametrize("rows", [["0110", "0100", "0000"], ["11", "11"], ["01", "00"], ["10", "00"]])
def test_run_lengths_go_down_the_columns(rows):
    mask = np.array([[letter == "1" for letter in line] for line in rows])
    assert (decoded(run_lengths(mask)) == mask).all()
    assert run_lengths(mask)["size"] == [len(rows), len(rows[0])]


def test_a_box_holds_all_pixels():
    mask = np.zeros((5, 6), bool)
    mask[1, 2] = mask[3, 4] = True
    assert box_of(mask) == (2, 1, 3, 3)


def test_paragraphs_say_their_book():
    found = examples(opened("text", "all"))
    assert Counter(e.label for e in found) == {"moby-dick": 766, "state-of-the-union": 1193}
    for example in found:
        if "Queequeg" in example.text or "Ahab" in example.text:
            assert example.label == "moby-dick"
        if "the Secretary of the Treasury" in example.text or "Fellow-Citizens" in example.text:
            assert example.label == "state-of-the-union"


@pytest.mark.parametrize("content", ["questions", "statements", "objects"])
def test_kinds_and_size_are_refused_where_they_mean_nothing(content):
    with pytest.raises(ValidationError, match="kinds chooses pictures"):
        Embedded(content=content, kinds=["photo"])
    with pytest.raises(ValidationError, match="scene_px is the size of scenes"):
        Embedded(scene_px=64)
    others = [opened(content), opened(content, "train"), opened(content, limit=5)]
    assert len({one.fingerprint for one in others}) == 3


def test_the_size_of_scenes_changes_no_other_fingerprint():
    data = (files("beitctl_plugins.sources") / "data" / "embedded.parquet").read_bytes()
    settings = '{"split":"train","content":"pictures","kinds":[],"limit":0}'  # as before there were scenes
    assert Embedded().open().fingerprint == digest(data, settings).hex()
