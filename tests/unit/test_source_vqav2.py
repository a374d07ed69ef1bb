import json

import named_layouts
import pytest
from source_files import ids

from beitctl.errors import DataError
from beitctl_plugins.sources.vqav2 import VQAv2

QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANSWERS = "v2_mscoco_train2014_annotations.json"


def source(path, **table):
    return VQAv2(path=path, **({"max_bad_share": 1.0} | table))


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_questions_come_with_ten_answers(tmp_path):
    named_layouts.vqav2(tmp_path)
    opened = source(tmp_path).open()
    assert ids(opened) == ["9000", "9001", "25000"]
    assert (opened[1].text, opened[1].captions) == ("Is it red?", ())
    assert opened[1].answers == tuple(f"a{n}" for n in range(10))
    assert opened[1].image == tmp_path / "train2014" / "COCO_train2014_000000000009.jpg"
    assert (opened.problems, opened.lengths.tolist()) == ([], [11, 10, 9])


@pytest.mark.parametrize(("split", "part"), [("test", "test2015"), ("test-dev", "test-dev2015")])
def test_the_test_sets_have_no_answers(tmp_path, split, part):
    named_layouts.vqav2(tmp_path, split, part, "test2015")
    opened = source(tmp_path, split=split).open()
    assert [opened[i].answers for i in range(3)] == [(), (), ()]
    assert opened[0].image.name == "COCO_test2015_000000000009.jpg"


def test_questions_may_lie_in_vqa(tmp_path):
    named_layouts.vqav2(tmp_path)
    (tmp_path / "vqa").mkdir()
    for name in (QUESTIONS, ANSWERS):
        (tmp_path / name).rename(tmp_path / "vqa" / name)
    assert len(source(tmp_path).open()) == 3


def test_what_belongs_to_nothing_is_listed(tmp_path):
    named_layouts.vqav2(tmp_path)
    change(tmp_path / ANSWERS, lambda c: c["annotations"][1].update(question_id=7))
    change(tmp_path / QUESTIONS, lambda c: c["questions"][2].update(image_id=26))
    opened = source(tmp_path).open()
    assert ids(opened) == ["9000"]
    assert opened.problems == [
        f"{QUESTIONS}:questions 2: no answers to question 9001 in {ANSWERS}",
        f"{QUESTIONS}:questions 3: no picture 'train2014/COCO_train2014_000000000026.jpg'",
        f"{ANSWERS}: question 7 is not asked",
        "train2014/COCO_train2014_000000000025.jpg: nothing in the annotations names it",
    ]


@pytest.mark.parametrize("edit", [{"answers": None}, {"answers": [1]}, {"question_id": None}])
def test_answers_of_another_form_are_refused(tmp_path, edit):
    named_layouts.vqav2(tmp_path)
    change(tmp_path / ANSWERS, lambda c: c["annotations"][1].update(edit))
    with pytest.raises(DataError, match=rf"{ANSWERS}:annotations 2: no question_id with answers"):
        source(tmp_path).open()


def test_questions_without_a_file_of_answers_are_refused(tmp_path):
    named_layouts.vqav2(tmp_path)
    (tmp_path / ANSWERS).unlink()
    with pytest.raises(DataError, match=rf"not the folder of VQA v2: no {ANSWERS} or vqa/"):
        source(tmp_path).open()


def test_guess_knows_the_layout(tmp_path):
    named_layouts.vqav2(tmp_path / "a")
    assert VQAv2.guess(tmp_path / "a") == (8, {"path": str(tmp_path / "a"), "split": "train"})
    assert VQAv2.guess(tmp_path) is None
