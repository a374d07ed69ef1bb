"""Index files of BEiT-3's released code."""

import json
import pickle

import pytest
from source_files import examples, fill, ids

from beitctl.errors import DataError
from beitctl_plugins.sources.beit3_index import Beit3Index


def source(path, **table):
    return Beit3Index(path=path, **({"max_bad_share": 1.0} | table))


def index(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path, "a/1.png", "a/2.png", "b/3.png")


def asked(qid, picture="a/1.png", **more):
    return {"image_path": picture, "text_segment": [7, 8, qid], "qid": qid, **more}


ANSWERS = [{"answer": a, "label": n} for n, a in enumerate(("yes", "no", "two"))]


def questions(root):
    index(root / "answer2label.txt", *ANSWERS)
    index(
        root / "vqa.train.jsonl",
        asked(1, labels=[1, 0], scores=[0.3, 0.9]),
        asked(2, "b/3.png", labels=[2], scores=[1.0]),
    )
    index(root / "vqa.trainable_val.jsonl", asked(3, labels=[0], scores=[0.6]))
    return root


def test_questions_come_with_as_many_answers_as_their_scores_mean(root):
    opened = source(questions(root)).open()
    assert ids(opened) == ["1", "2", "3"]
    assert opened[0].answers == ("no", "yes", "yes", "yes", *[""] * 6)
    assert opened[1].answers == ("two",) * 4 + ("",) * 6
    assert (opened[0].token_ids.tolist(), opened[0].text) == ([7, 8, 1], None)
    assert opened[1].image == root / "b/3.png"
    assert (opened.problems, opened.lengths.tolist()) == ([], [12, 12, 12])


def test_questions_without_labels_have_no_answers(root):
    index(root / "vqa.test.jsonl", asked(1), asked(2, labels=[], scores=[]))
    assert [e.answers for e in examples(source(root, split="test").open())] == [(), ()]


def test_bad_rows_are_named(root):
    questions(root)
    index(
        root / "vqa.train.jsonl",
        asked(1, labels=[0], scores=[1]),
        asked(4, "a/9.png", labels=[0], scores=[1]),
        asked(5, labels=[3], scores=[1]),
        asked(1, labels=[0], scores=[1]),
        '{"qid": 6',
        asked(7, labels=[0], scores=[0.5]),
        {**asked(8), "text_segment": []},
        asked(9, "../x.png"),
        [10],
        {**asked(11), "text_segment": [1, "a"]},
        asked(12, labels=[0], scores=[]),
    )
    opened = source(root).open()
    assert ids(opened) == ["1", "3"]
    name = "vqa.train.jsonl"
    assert [line.split(" (")[0] for line in opened.problems] == [
        f"{name}:2: no picture 'a/9.png'",
        f"{name}:3: label 3 is none of the 3 in answer2label.txt",
        f"{name}:4: another one has its id, '1'",
        f"{name}:5: not JSON",
        f"{name}:6: score: expected 0.3, 0.6, 0.9 or 1, found 0.5",
        f"{name}:7: text_segment is empty",
        f"{name}:8: its path leads out of the data set: '../x.png'",
        f"{name}:9: no int 'qid' in [10]",
        f"{name}:10: text_segment: expected a text or ids of tokens, found [1, 'a']",
        f"{name}:11: labels and scores differ in number: {str(asked(12, labels=[0], scores=[]))[:57]}...",
    ]
    with pytest.raises(DataError, match=r"10 of 12 rows are unusable, more than max_bad_share \(0\.01\)"):
        source(root, max_bad_share=0.01).open()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"answer": "yes", "label": 1}], "1 answers, but their labels are not 0 to 0"),
        ([*ANSWERS, ANSWERS[0]], r"answer2label\.txt:4: expected"),
        (["yes"], r"answer2label\.txt:1: expected"),
    ],
    ids=["gap", "twice", "text"],
)
def test_a_wrong_vocabulary_is_refused(root, rows, says):
    questions(root)
    index(root / "answer2label.txt", *rows)
    with pytest.raises(DataError, match=says):
        source(root).open()


def test_labels_need_a_vocabulary(root):
    questions(root)
    (root / "answer2label.txt").unlink()
    with pytest.raises(DataError, match=r"answer2label\.txt: no such file, but the rows have labels"):
        source(root).open()


def test_statements_have_two_pictures(root):
    rows = [
        {"image_path": "a/1.png", "image2_path": "b/3.png"}
        | {"text_segment": text, "label": label, "identifier": id}
        for id, text, label in (("x-0", "Two dogs.", 1), ("x-1", [5], 0), ("x-2", "No.", 2))
    ]
    index(root / "nlvr2.dev.index.jsonl", *rows)
    opened = source(root, split="val").open()
    assert [(e.id, e.text, e.label) for e in examples(opened)] == [
        ("x-0", "Two dogs.", "True"), ("x-1", None, "False"),
    ]  # fmt: skip
    assert (opened[0].image, opened[0].second) == (root / "a/1.png", root / "b/3.png")
    assert opened[1].token_ids.tolist() == [5]
    assert opened.problems == ["nlvr2.dev.index.jsonl:3: label: expected 1 (true) or 0 (false), found 2"]


def said(number, text, picture="a/1.png"):
    return {"image_path": picture, "text_segment": text, "image_id": number}


def test_captions_of_one_picture_are_one_example(root):
    index(root / "coco_retrieval.test.jsonl", said(0, [5, 6]), said(1, [7], "a/2.png"), said(0, [8]))
    opened = source(root, split="test", task="retrieval").open()
    assert ids(opened) == ["0", "1"]
    assert [c.tolist() for c in opened[0].caption_ids] == [[5, 6], [8]]
    assert (opened[0].captions, opened[0].caption_ids[0].dtype) == ((), "int64")
    again = pickle.loads(pickle.dumps(opened))
    assert again[1].caption_ids[0].tolist() == [7]


def test_captions_may_be_texts_and_may_be_missing(root):
    index(root / "coco_captioning.train.jsonl", said(42, "A cat."), said(42, "A  dog."))
    assert source(root).open()[0].captions == ("A cat.", "A dog.")
    index(root / "nocaps.val.jsonl", said(3, None), said(4, None, "b/3.png"), said(3, None))
    opened = source(root, split="val").open()
    assert [(e.id, e.captions, e.caption_ids) for e in examples(opened)] == [("3", (), ()), ("4", (), ())]
    assert opened.problems == ["nocaps.val.jsonl:3: another one has its image_id, 3"]
    index(root / "flickr30k.val.jsonl", said(3, None), said(3, "x"), said(3, "y", "a/2.png"), said(3, [1]))
    opened = source(root, split="val", task="retrieval").open()
    assert opened[0].captions == ("x",)
    assert opened.problems == [
        "flickr30k.val.jsonl:1: no text_segment",
        "flickr30k.val.jsonl:3: image_id 3 is another picture, 'a/1.png'",
        "flickr30k.val.jsonl:4: image_id 3 has texts and ids of tokens",
    ]


def test_classes_are_named_by_their_folders(root):
    rows = [{"image_path": p, "label": n} for p, n in (("a/1.png", 0), ("a/2.png", 0), ("b/3.png", 1))]
    index(root / "imagenet.train.index.jsonl", *rows)
    assert [e.label for e in examples(source(root).open())] == ["a", "a", "b"]
    index(root / "imagenet.train.index.jsonl", *rows, {"image_path": "a/2.png", "label": 1})
    problem = source(root).open().problems
    assert problem == ["imagenet.train.index.jsonl:4: label 1 is the class b, but it lies in a"]
    index(root / "imagenet.train.index.jsonl", *rows, {"image_path": "a/2.png", "label": 7})
    problem = source(root).open().problems
    assert problem == ["imagenet.train.index.jsonl:4: label 7 is no class, but it lies in a"]


def test_classes_of_one_folder_are_named_by_number(root):
    rows = [{"image_path": p, "label": n} for p, n in (("a/1.png", 0), ("a/2.png", 12))]
    index(root / "imagenet.val.index.jsonl", *rows)
    assert [e.label for e in examples(source(root, split="val").open())] == ["00000", "00012"]


def test_index_files_may_lie_elsewhere(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("index")
    questions(other)
    assert len(source(root, index=str(other)).open()) == 3
    assert ids(source(root, index=str(other), files=["vqa.trainable_val.jsonl"]).open()) == ["3"]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"split": "test"}, r"not the folder of index files of BEiT-3: no imagenet|no nlvr2\.test-P"),
        ({"split": "minival"}, "no split 'minival' of any task; correct it: there are dev, test"),
        ({"split": "dev", "task": "vqav2"}, "no split 'dev' of vqav2"),
        ({"files": ["x.jsonl"]}, r"x\.jsonl: no such file; correct 'files'"),
        ({"index": "nowhere"}, "nowhere: no such file or folder"),
        ({"split": "train"}, "holds vqa.train.jsonl with vqa.trainable_val.jsonl and coco_retrieval"),
    ],
    ids=["absent", "split", "task", "file", "index", "two"],
)  # fmt: skip
def test_what_is_not_there_or_not_clear_is_refused(root, table, says):
    index(questions(root) / "coco_retrieval.train.jsonl", said(0, "x"))
    with pytest.raises(DataError, match=says):
        source(root, **table).open()


def test_rows_of_an_unknown_kind_are_refused(root):
    index(root / "x.jsonl", {"a": 1})
    with pytest.raises(
        DataError, match="rows of BEiT-3 have qid, image2_path, image_id or label; the first has a"
    ):
        source(root, files=["x.jsonl"]).open()  # fmt: skip


def test_settings_and_content_change_the_fingerprint(root):
    questions(root)
    prints = {source(root).open().fingerprint, source(root, files=["vqa.train.jsonl"]).open().fingerprint}
    index(root / "answer2label.txt", *ANSWERS, {"answer": "3", "label": 3})
    prints.add(source(root).open().fingerprint)
    assert len(prints) == 3


def test_guess_knows_the_names(root):
    questions(root)
    assert Beit3Index.guess(root) == (7, {"path": str(root), "task": "vqav2", "split": "train"})
    file = root / "vqa.train.jsonl"
    assert Beit3Index.guess(file) == (8, {"path": str(root), "files": [file.name]})
    assert Beit3Index.guess(root / "a") is None
