"""Tables that name a plugin, and paths that settings mean."""

import pytest
from pydantic import ValidationError
from small import Record

from beitctl.api import Job, Plugin, SourceField, TaskField
from beitctl.errors import UserError
from beitctl_plugins.sources.embedded import Embedded
from beitctl_plugins.tasks.masked import MaskedImage


class Holder(Plugin):
    """Holds a task."""

    task: TaskField
    sources: tuple[SourceField, ...] = ()


def refused(**table):
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate(table)
    return [(error["loc"], error["msg"]) for error in caught.value.errors()]


def test_a_table_becomes_the_plugin_that_its_kind_names():
    task = {"kind": "masked-image", "mask_ratio": 0.3}
    assert Holder.model_validate({"task": task}).task == MaskedImage(mask_ratio=0.3)


def test_a_plugin_passes_as_it_is():
    task = MaskedImage(mask_ratio=0.3)
    assert Holder(task=task).task is task


@pytest.mark.parametrize("table", [{}, {"mask_ratio": 0.3}, {"kind": 3}, "masked-image", 3, ["masked-image"]])
def test_a_table_without_a_kind_is_told_the_kinds_there_are(table):
    (problem,) = refused(task=table)
    assert problem[0] == ("task",)
    assert "expected a table with kind = one of attentive-probe, captioning, classification" in problem[1]
    assert problem[1].endswith("which names the task")


def test_an_unknown_kind_gets_the_closest_match():
    ((_, message),) = refused(task={"kind": "masked-imag"})
    assert "no 'masked-imag' in beitctl.tasks; did you mean 'masked-image'?" in message


def test_a_kind_like_no_other_gets_the_list():
    ((_, message),) = refused(task={"kind": "zzz"})
    assert message.startswith(
        "no 'zzz' in beitctl.tasks. Installed: attentive-probe, captioning, classification"
    )


def test_the_kind_of_another_group_is_unknown():
    ((_, message),) = refused(task={"kind": "embedded"})
    assert "no 'embedded' in beitctl.tasks" in message


def test_problems_inside_a_table_keep_their_place():
    good = {"kind": "embedded"}
    bad = {"kind": "embedded", "limit": -1, "splitt": "train"}
    places = [
        place for place, _ in refused(task={"kind": "masked-image", "mask_ratio": 2}, sources=[good, bad])
    ]
    assert sorted(places) == [("sources", 1, "limit"), ("sources", 1, "splitt"), ("task", "mask_ratio")]


def test_a_plugin_is_written_as_its_table():
    holder = Holder(task=MaskedImage(mask_ratio=0.3), sources=(Embedded(limit=2),))
    assert Holder.model_validate(holder.model_dump(mode="json")) == holder


def test_a_plugin_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        MaskedImage().mask_ratio = 0.1


def test_a_reference_is_the_run_folder_of_its_table(tmp_path):
    job = Job(tmp_path, Record(), {"@pretrain": tmp_path / "run"})
    assert job.path("@pretrain") == tmp_path / "run"


def test_a_path_is_itself(tmp_path):
    assert Job(tmp_path, Record()).path(str(tmp_path)) == tmp_path


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert Job(tmp_path, Record()).path("~/model") == tmp_path / "model"


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="none: no such file or folder"):
        Job(tmp_path, Record()).path(str(tmp_path / "none"))
