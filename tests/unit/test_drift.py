"""What may change when a run goes on, and settings that are none of its identity."""

from pathlib import Path

import pytest
from pydantic import Field
from run_stubs import beitctl, place  # noqa: F401 - the fixture works by being here

from beitctl import drift, runs, settings
from beitctl.api import Plugin
from beitctl.config import ModelConfig, OptimConfig, TrainConfig
from beitctl.drift import Change
from beitctl.errors import DataError, UserError
from beitctl.recipe import StageTable
from beitctl.runs import Identity, Run

MODEL = ModelConfig(layers=1, width=16, heads=1, ffn=32)
TRAIN = TrainConfig(steps=4, optim=OptimConfig(peak_lr=1e-3))


class Inner(Plugin):
    """Settings below a table."""

    train: TrainConfig = TRAIN
    codes: int = 8


class Trained(Plugin):
    """A stage that trains."""

    model: ModelConfig = MODEL
    train: TrainConfig = TRAIN
    inner: dict[str, Inner] = Field(default_factory=dict)


class Untrained(Plugin):
    """A stage that does not."""

    views: int = 1


def table(plugin):
    return StageTable(key="learn", stage="learn", plugin=plugin, table={}, references=())


def identity(plugin, data="a", code="x"):
    return Identity(runs.digest(str(settings.lasting(plugin)), data), code, data)


def stored(plugin, *, data="a", status="stopped", torch=None, **manifest):
    found = identity(plugin, data)
    made = {
        "key": "learn", "stage": "learn", "status": status, "config_hash": found.config, "data": data,
        "code_hash": found.code, "settings": settings.lasting(plugin), "fingerprint": found.fingerprint,
        "versions": {"torch": torch or drift.torch_version()},
    }  # fmt: skip
    return Run(Path("own"), made | manifest)


def changed(**fields):
    """The stage with other fields of its training loop."""
    return Trained(train=TrainConfig(**{"steps": 4, "optim": OptimConfig(peak_lr=1e-3)} | fields))


def keys(run, plugin, data="a", parents=None):
    return [c.key for c in drift.changes(run, table(plugin), identity(plugin, data), parents or {})]


def check(run, plugin, *allow, data="a"):
    found = drift.changes(run, table(plugin), identity(plugin, data), {})
    drift.check(run, table(plugin), found, allow, "begin a new run")


FREE = {
    "save_every_steps": 7, "save_every_minutes": 1.0, "keep_checkpoints": 9, "keep_every_hours": 1.0,
    "async_save": False, "log_every_steps": 3, "log_samples": True, "profile": (1, 2), "max_minutes": 5.0,
    "hang_minutes": 0.0, "workers": 2, "shard_ranks": 4,
}  # fmt: skip


def test_settings_that_change_no_result_are_not_part_of_a_run():
    assert set(FREE) == settings.FREE
    assert settings.lasting(changed(**FREE)) == settings.lasting(Trained())


@pytest.mark.parametrize("fields", [{"seed": 1}, {"compile": "off"}, {"micro_samples": 2}, {"steps": 5}])
def test_all_other_settings_are(fields):
    assert settings.lasting(changed(**fields)) != settings.lasting(Trained())


def test_training_loops_are_found_wherever_they_are():
    plugin = Trained(inner={"a": Inner()})
    assert list(settings.trainings(plugin)) == ["train", "inner.a.train"]
    assert "inner.a.train.workers" not in settings.lasting(plugin)
    assert settings.lasting(plugin)["inner.a.train.steps"] == 4


def test_a_table_without_a_training_loop_keeps_all_its_settings():
    assert settings.lasting(Untrained()) == {"views": 1}


def test_nothing_has_changed_in_the_same_run():
    assert keys(stored(Trained()), Trained()) == []


def test_settings_data_and_torch_are_told_apart():
    plugin = changed(seed=3)
    assert keys(stored(Trained(), torch="1.9.0"), plugin, data="b") == ["train.seed", "data", "torch"]


def test_an_input_that_is_another_run_is_named():
    run = stored(Trained(), parents={"@make": {"fingerprint": "a" * 32}}, config_hash="other")
    assert keys(run, Trained(), parents={"make": Run(Path("m"), {"fingerprint": "b" * 32})}) == ["@make"]


@pytest.mark.parametrize(("version", "found"), [("+cpu", []), (".999", [])])
def test_a_patch_of_torch_is_no_change(version, found):
    minor = ".".join(drift.torch_version().split(".")[:2])
    assert keys(stored(Trained(), torch=minor + version), Trained()) == found


def test_a_finished_run_is_done_whatever_torch_made_it():
    assert keys(stored(Trained(), status="ok", torch="1.9.0"), Trained()) == []


def test_data_alone_are_an_error_of_the_data():
    with pytest.raises(DataError, match=r"the data are not those .*: --out own --allow data\n  data: "):
        check(stored(Trained()), Trained(), data="b")


@pytest.mark.parametrize("key", ["train.seed", "learn.train.seed"])
def test_a_setting_may_be_named_with_its_table(key):
    check(stored(Trained()), changed(seed=3), key)


@pytest.mark.parametrize("key", ["train.workers", "train.keep_checkpoints", "train.steps", "torch", "data"])
def test_allowing_what_has_not_changed_is_no_error(key):
    check(stored(Trained()), Trained(), key)


def test_a_model_of_another_shape_cannot_be_allowed():
    other = Trained(model=ModelConfig(layers=1, width=32, heads=1, ffn=32))
    with pytest.raises(UserError, match=r"model.width: 16 -> 32 \(cannot be allowed: the weights") as caught:
        check(stored(Trained()), other)
    assert "to go on with it" not in str(caught.value)
    with pytest.raises(UserError, match=r"--allow model\.width: cannot be allowed: the weights"):
        check(stored(Trained()), other, "model.width")


@pytest.mark.parametrize(
    ("key", "old", "new", "refused"),
    [
        ("model.layers", 1, 2, True),
        ("inner.a.codes", 8, 16, True),
        ("tokens", "a", "b", True),
        ("init", "", "a", True),
        ("@tokenize-images", "run a", "run b", True),
        ("objectives.image.task.kind", "a", "b", True),
        ("objectives.image.task.mask_ratio", 0.4, 0.5, False),
        ("objectives.image.source.kind", "folder", "parquet", False),
        ("objectives.image.source.parts.model.path", "a", "b", False),
        ("train.ema_decay", 0.0, 0.99, True),
        ("train.ema_decay", 0.9, 0.99, False),
        ("train.optim.peak_lr", 1e-3, 1e-4, False),
        ("train.precision", "bf16", "fp32", False),
    ],
)
def test_only_what_fits_the_checkpoint_can_be_allowed(key, old, new, refused):
    assert bool(Change(key, old, new).refusal) == refused


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("train.sed", "did you mean 'train.seed'"),
        ("train.optim", "name each setting, such as train.optim.betas"),
        ("dta", "has no such setting, nor is it data or torch"),
    ],
)
def test_an_unknown_key_is_refused_with_what_there_is(key, said):
    with pytest.raises(UserError, match=said):
        check(stored(Trained()), Trained(), key)


def test_a_stage_that_does_not_train_can_allow_nothing():
    with pytest.raises(UserError, match=r"\[learn\] does not train, so there is no checkpoint"):
        check(stored(Untrained()), Untrained(views=2), "views")


def test_a_finished_run_goes_on_with_more_steps_only():
    run = stored(Trained(), status="ok")
    check(run, changed(steps=5, seed=3), "train.steps", "train.seed")
    for fields in ({"seed": 3}, {"steps": 3}):
        with pytest.raises(UserError, match="is finished, and goes on only with more steps"):
            check(run, changed(**fields), "train.seed", "train.steps")


def test_other_code_is_recorded_though_nobody_allows_it():
    run = stored(Trained())
    (record,) = drift.records(run, [], identity(Trained(), code="y"))
    assert (record["key"], record["old"], record["new"]) == ("code", "x", "y")


def test_allow_needs_out(capsys):
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml", "--only", "first", "--allow", "value")
    assert (code, "--allow value needs --out DIR" in err) == (2, True)


def test_allow_is_refused_where_there_is_no_run(capsys):
    own = ("--only", "first", "--out", "own", "--allow", "value")
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml", *own)
    assert (code, "--out own: holds no run that --allow could let go on" in err) == (2, True)


def test_an_unfinished_run_of_another_torch_is_not_taken_up_unasked(capsys, monkeypatch):
    Path("fault").write_text("stopped")
    beitctl(capsys, "make", "--recipe", "r.toml", "--only", "first")
    monkeypatch.setattr(drift, "torch_version", lambda: "9.9.0")
    code, _, err = beitctl(capsys, "make", "--recipe", "r.toml", "--only", "first")
    assert (code, "-> 9.9" in err, "begin a new run: beitctl make --no-resume" in err) == (2, True, True)
