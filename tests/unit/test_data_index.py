"""The command data index: published annotations become index files, which the source beit3-index reads."""

import json
import subprocess
import sys

import named_layouts
import pytest
from inspected import beitctl
from small import Letters
from source_files import examples, fill, ids

from beitctl.errors import DataError, UserError
from beitctl.inspecting.indexing import Settings, write
from beitctl_plugins.sources.beit3_index import Beit3Index
from beitctl_plugins.sources.coco import Coco
from beitctl_plugins.sources.flickr30k import Flickr30k
from beitctl_plugins.sources.imagenet import ImageNet
from beitctl_plugins.sources.nlvr2 import NLVR2

QUIET = Settings(quiet=True)
IDS = Settings(quiet=True, tokenizer=Letters())
BOTH = ("vqav2", ".", "--split", "train", "--split", "val")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read(root, out, **table):
    return examples(Beit3Index(path=root, index=str(out), max_bad_share=0, **table).open())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "index"


def test_statements_come_back_as_they_were(tmp_path, out):
    named_layouts.nlvr2(tmp_path)
    note = write("nlvr2", tmp_path, out, Settings(("train", "dev"), quiet=True))
    assert note["rows"] == {"nlvr2.train.index.jsonl": 3, "nlvr2.dev.index.jsonl": 1}
    for split, name in (("train", "train"), ("dev", "dev")):
        assert read(tmp_path, out, split=name) == examples(NLVR2(path=tmp_path, split=split).open())


def test_ids_come_back_in_place_of_texts(tmp_path, out):
    named_layouts.nlvr2(tmp_path)
    note = write("nlvr2", tmp_path, out, Settings(("dev",), Letters(), quiet=True))
    (found,) = read(tmp_path, out, split="dev")
    assert found.token_ids.tolist() == Letters().encode("Two dogs.")
    assert note["tokenizer"] == "letters"


def test_classes_come_back_as_they_were(tmp_path, out):
    named_layouts.imagenet(tmp_path)
    write("imagenet", tmp_path, out, QUIET)
    assert [row["label"] for row in rows(out / "imagenet.train.index.jsonl")] == [0, 0, 1, 1, 2, 2]
    for split in ("train", "val"):
        there = examples(ImageNet(path=tmp_path, split=split).open())
        assert read(tmp_path, out, task="imagenet", split=split) == there


def pairs(found):
    return [(example.image, example.captions) for example in found]


def test_captions_come_back_as_they_were(tmp_path, out):
    named_layouts.coco_karpathy(tmp_path)
    write("coco-captioning", tmp_path, out, QUIET)
    write("coco-retrieval", tmp_path, out, QUIET)
    there = {part: examples(Coco(path=tmp_path, karpathy=part).open()) for part in ("train", "val", "test")}
    for part, wanted in there.items():
        assert pairs(read(tmp_path, out, task="retrieval", split=part)) == pairs(wanted)
    assert pairs(read(tmp_path, out, task="captioning")) == pairs(there["train"])
    assert [row["image_id"] for row in rows(out / "coco_captioning.train.jsonl")] == [1, 1, 2, 2]
    assert rows(out / "coco_captioning.test.jsonl") == [
        {"image_path": "val2014/COCO_val2014_000000000004.jpg", "text_segment": None, "image_id": 4}
    ]
    assert [row["image_id"] for row in rows(out / "coco_retrieval.train.jsonl")] == [0, 0, 1, 1]


def test_captions_of_flickr_come_back_as_ids(tmp_path, out):
    named_layouts.flickr30k(tmp_path)
    write("flickr30k", tmp_path, out, IDS)
    (found,) = read(tmp_path, out, task="retrieval", split="val")
    (wanted,) = examples(Flickr30k(path=tmp_path, split="val").open())
    assert [ids.tolist() for ids in found.caption_ids] == [Letters().encode(c) for c in wanted.captions]
    assert found.image == wanted.image


def vqa(root):
    """Twelve questions of train and twelve of val about four pictures each, answered yes and no."""
    for part, first in (("train2014", 1), ("val2014", 5)):
        numbers = range(first, first + 4)
        fill(root, *(f"{part}/COCO_{part}_{number:012d}.jpg" for number in numbers))
        asked, said = [], []
        for image in numbers:
            for place in range(3):
                id = 10 * image + place
                most = "Yes." if place < 2 else "no" if part == "val2014" else "rare"
                given = ["yes"] * 3 + ["no"] * 1 + ["Yes."] * 2 + ["other"] * 4 if place < 2 else [most] * 10
                asked.append({"image_id": image, "question": f"Question {id}?", "question_id": id})
                answers = [{"answer": a, "answer_id": n} for n, a in enumerate(given)]
                said.append({"question_id": id, "multiple_choice_answer": most, "answers": answers})
        named_layouts.dump(root / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": asked})
        named_layouts.dump(root / f"v2_mscoco_{part}_annotations.json", {"annotations": said})
    return root


@pytest.fixture
def small_vocabulary(monkeypatch):
    monkeypatch.setattr("beitctl.inspecting.indexing.LEAST", 4)


@pytest.mark.usefixtures("small_vocabulary")
def test_questions_come_back_with_the_answers_of_the_vocabulary(tmp_path, out):
    splits = Settings(("train", "val"), rest_val=1, quiet=True)
    note = write("vqav2", vqa(tmp_path), out, splits)
    answers = [{"answer": a, "label": n} for n, a in enumerate(("yes", "rare", "no"))]
    assert rows(out / "answer2label.txt") == answers
    assert note["answers"] == 3
    first = rows(out / "vqa.train.jsonl")[0]
    assert first == {
        "image_path": "train2014/COCO_train2014_000000000001.jpg", "text_segment": "Question 10?",
        "labels": [0, 2], "scores": [0.9, 0.3], "qid": 10,
    }  # fmt: skip
    trained, held = read(tmp_path, out), read(tmp_path, out, split="val")
    assert (len(trained), len(held)) == (12 + 9, 3)
    assert trained[0].answers == ("yes",) * 3 + ("no",) + ("",) * 6
    assert len({e.image for e in held}) == 1
    assert not {e.image for e in held} & {e.image for e in trained}


@pytest.mark.usefixtures("small_vocabulary")
def test_held_out_pictures_follow_from_the_seed(tmp_path, out):
    found = []
    vqa(tmp_path)
    for seed in (0, 0, 1, 2, 3, 4):
        write("vqav2", tmp_path, out, Settings(("train", "val"), rest_val=2, seed=seed, quiet=True))
        found.append((out / "vqa.rest_val.jsonl").read_text())
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_questions_without_a_known_answer_are_counted(tmp_path, out, monkeypatch):
    monkeypatch.setattr("beitctl.inspecting.indexing.LEAST", 9)
    note = write("vqav2", vqa(tmp_path), out, Settings(("train", "val"), rest_val=1, quiet=True))
    assert rows(out / "answer2label.txt") == [{"answer": "yes", "label": 0}]
    assert note["without_known_answer"] == {"vqa.train.jsonl": 4, "vqa.val.jsonl": 4}
    assert note["rows"]["vqa.train.jsonl"] == 8


def test_questions_of_the_test_have_no_labels(tmp_path, out):
    named_layouts.vqav2(tmp_path, "test", "test2015", "test2015")
    write("vqav2", tmp_path, out, Settings(("test",), quiet=True))
    assert [set(row) for row in rows(out / "vqa.test.jsonl")] == [{"image_path", "text_segment", "qid"}] * 3
    assert [e.id for e in read(tmp_path, out, split="test")] == ["9000", "9001", "25000"]


def nocaps(root, *more):
    fill(root, "val/a.jpg", "val/b.jpg")
    images = [{"id": n, "file_name": name} for n, name in ((4, "a.jpg"), (9, "b.jpg"))]
    named_layouts.dump(root / "nocaps_val_4500_captions.json", {"images": [*images, *more]})


def test_nocaps_has_pictures_alone(tmp_path, out):
    nocaps(tmp_path)
    write("nocaps", tmp_path, out, Settings(("val",), quiet=True))
    assert rows(out / "nocaps.val.jsonl")[1] == {
        "image_path": "val/b.jpg", "text_segment": None, "image_id": 9,
    }  # fmt: skip
    assert [e.id for e in read(tmp_path, out, split="val")] == ["4", "9"]


def test_what_is_left_out_is_listed_or_refused(tmp_path, out):
    nocaps(tmp_path, {"id": 4, "file_name": "a.jpg"}, {"id": 5, "file_name": "c.jpg"}, {"id": "x"})
    note = write("nocaps", tmp_path, out, Settings(("val",), max_bad_share=1, quiet=True))
    name = "nocaps_val_4500_captions.json:images"
    assert note["left_out"] == {
        "nocaps.val.jsonl": {
            "count": 3,
            "first": [
                f"{name} 3: another one has its id, 4",
                f"{name} 4: no picture 'c.jpg'",
                f"{name} 5: no id and file_name",
            ],
        }
    }
    assert json.loads((out / "index.json").read_text()) == note
    with pytest.raises(DataError, match="3 of its pictures cannot be used, too many"):
        write("nocaps", tmp_path, out, Settings(("val",), quiet=True))


def test_a_text_without_a_token_is_left_out(tmp_path, out):
    class Empty(Letters):
        def encode(self, text):
            return [] if "10171-0-1" in text else super().encode(text)

    named_layouts.nlvr2(tmp_path)
    note = write("nlvr2", tmp_path, out, Settings(("train",), Empty(), quiet=True))
    assert note["rows"] == {"nlvr2.train.index.jsonl": 2}
    assert note["left_out"]["nlvr2.train.index.jsonl"]["first"] == ["train-10171-0-1: a text without a token"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("vqa", "."), "vqa: no such task; there are imagenet, nlvr2, vqav2"),
        (("nlvr2", "nowhere"), "nowhere: no such folder"),
        (("nlvr2", ".", "--split", "test"), "--split test: nlvr2 has train, dev, test1"),
        (("nlvr2", ".", "--out", "file"), "--out file: a file, but it must be a folder"),
        (("vqav2", ".", "--split", "train"), "answers are counted over train and val together"),
        ((*BOTH, "--rest-val", "4"), "--rest-val 4: val has questions"),
    ],
    ids=["task", "path", "split", "out", "alone", "rest"],
)  # fmt: skip
@pytest.mark.usefixtures("small_vocabulary")
def test_wrong_usage_ends_with_2(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(vqa(tmp_path))
    (tmp_path / "file").touch()
    with_out = arguments if "--out" in arguments else (*arguments, "--out", "index")
    code, _, err = beitctl(capsys, "data", "index", *with_out)
    assert (code, says in err) == (2, True), err
    assert not (tmp_path / "index").exists()


def test_missing_annotations_end_with_3_and_nothing_is_written(tmp_path, capsys):
    named_layouts.nlvr2(tmp_path)
    code, _, err = beitctl(capsys, "data", "index", "nlvr2", tmp_path, "--out", tmp_path / "index")
    assert (code, "no test1.json" in err) == (3, True)
    assert not (tmp_path / "index").exists()


def test_the_command_says_what_it_wrote_and_how_to_read_it(tmp_path, monkeypatch, capsys):
    named_layouts.coco_karpathy(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, output, err = beitctl(capsys, "data", "index", "coco-retrieval", ".", "--out", "index")
    assert (code, output) == (0, "index\n")
    assert "          4 coco_retrieval.train.jsonl\n" in err
    assert err.splitlines()[-1].startswith("next: beitctl data check . --kind beit3-index --set 'index=\"/")
    table = {"index": str(tmp_path / "index"), "files": ["coco_retrieval.train.jsonl"]}
    assert ids(Beit3Index(path=tmp_path, **table).open()) == ["0", "1"]


def test_an_image_tokenizer_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("beitctl.checkpoints.native.load_tokenizer", lambda path: object())
    out = tmp_path / "index"
    code, _, err = beitctl(capsys, "data", "index", "nlvr2", tmp_path, "--out", out, "--tokenizer", "x")
    assert (code, "it must be a tokenizer of texts" in err) == (2, True)


def test_the_module_needs_no_torch_until_answers_are_counted():
    code = "import sys; from beitctl.inspecting import indexing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_row_is_an_error(tmp_path, out):
    named_layouts.nlvr2(tmp_path)

    class Nothing(Letters):
        def encode(self, text):
            return []

    with pytest.raises(DataError, match=r"no row for nlvr2\.dev\.index\.jsonl; nothing was written"):
        write("nlvr2", tmp_path, out, Settings(("dev",), Nothing(), quiet=True))
    with pytest.raises(UserError, match="no such task"):
        write("coco", tmp_path, out)
