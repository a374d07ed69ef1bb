import json

import named_layouts
import pytest
from source_files import ids

from beitctl.errors import DataError
from beitctl_plugins.sources.nlvr2 import NLVR2


def source(path, **table):
    return NLVR2(path=path, **({"max_bad_share": 1.0} | table))


@pytest.mark.parametrize("flat", [False, True])
def test_statements_come_with_two_pictures(tmp_path, flat):
    named_layouts.nlvr2(tmp_path, flat=flat)
    opened = source(tmp_path).open()
    assert ids(opened) == ["train-10171-0-0", "train-10171-0-1", "train-7-2-0"]
    assert [opened[i].label for i in range(3)] == ["True", "False", "True"]
    assert opened[2].text == "About train-7-2-0."
    folder = tmp_path / "images" / ("." if flat else "train/4")
    assert opened[2].image == folder / "train-7-2-img0.png"
    assert opened[2].second == folder / "train-7-2-img1.png"


def test_the_development_set_is_read(tmp_path):
    named_layouts.nlvr2(tmp_path)
    opened = source(tmp_path, split="dev").open()
    assert opened[0].second == tmp_path / "dev" / "dev-850-0-img1.png"


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        ({"label": "maybe"}, "label: expected True or False, found 'maybe'"),
        ({"sentence": " "}, "the sentence is blank"),
        ({"sentence": None}, "no str 'sentence' in"),
        ({"identifier": "train-9-9-0"}, "no picture 'images/train/0/train-9-9-img0.png'"),
        ({"identifier": "train-7-2-0"}, "another one has its id, 'train-7-2-0'"),
        ({"directory": "../.."}, "its path leads out of the data set"),
    ],
)
def test_statements_that_cannot_be_used_are_listed(tmp_path, edit, problem):
    named_layouts.nlvr2(tmp_path)
    path = tmp_path / "data" / "train.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.append({**rows[0], "directory": 4 if "7-2" in str(edit) else 0} | edit)
    path.write_text("\n".join(map(json.dumps, rows)))
    opened = source(tmp_path).open()
    assert len(opened) == 3
    assert opened.problems[0].startswith(f"train.json:4: {problem}")


def test_a_line_that_is_no_json_is_listed(tmp_path):
    named_layouts.nlvr2(tmp_path)
    with (tmp_path / "data" / "train.json").open("a") as file:
        file.write("{")
    assert source(tmp_path).open().problems[0].startswith("train.json:4: not JSON")


def test_a_wrong_folder_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"not the folder of NLVR2: no train.json or data/train.json(.|\n)*found nothing"
    ):
        source(tmp_path).open()


def test_guess_knows_the_layout(tmp_path):
    named_layouts.nlvr2(tmp_path / "a")
    assert NLVR2.guess(tmp_path / "a") == (8, {"path": str(tmp_path / "a"), "split": "train"})
    (tmp_path / "train.json").write_text('{"image": 1}')
    assert NLVR2.guess(tmp_path) is None
