"""A run that is to go on with other settings or other data than it began with."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from beitctl import cli, running

pytestmark = pytest.mark.fault(15)
TEXT = """\
[recipe]
summary = "A classifier of two colours"

[pretrain.model]
layers = 1
width = 16
heads = 1
ffn = 32
image_px = 32
patch_px = 16
final_norm = false

[pretrain.train]
steps = 4
save_every_steps = 2
log_every_steps = 1
precision = "fp32"
optim = { peak_lr = 1e-3 }

[pretrain.objectives.classes]
task = { kind = "classification" }
source = { kind = "webdataset", path = "shards/{0..1}.tar", label = "cls" }
samples = 4
"""
COMMAND = ("pretrain", "--recipe", "r.toml", "--out", "run")
OTHER_RATE = ("--set", "train.optim.peak_lr=0.002")
OTHER_SHARDS = ("--set", "objectives.classes.source.path='shards/{0..2}.tar'")


def shard(number):
    """A tar of four pictures of two classes."""
    Path("shards").mkdir(exist_ok=True)
    with tarfile.open(f"shards/{number}.tar", "w") as tar:
        for place in range(4):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), ("red", "blue")[place % 2]).save(picture, "PNG")
            key = f"{number}{place}"
            for name, data in ((f"{key}.png", picture.getvalue()), (f"{key}.cls", str(place % 2).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a recipe, three shards of which it names two, and its finished run of four steps."""
    place = tmp_path_factory.mktemp("drift")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(running, "write_page", lambda folder: None)
        for number in range(3):
            shard(number)
        Path("r.toml").write_text(TEXT)
        assert cli.execute(COMMAND) == 0
    return place


@pytest.fixture
def stopped(finished, tmp_path, monkeypatch):
    """The same as if the process had been killed after its checkpoint of step 2."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(running, "write_page", lambda folder: None)
    shutil.rmtree("run/checkpoints/step-00000004")
    edit(status="running", exit=None, ended=None)


def edit(**changes):
    path = Path("run/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def manifest():
    return json.loads(Path("run/manifest.json").read_text())


def events(kind):
    """Records of a kind since the last start."""
    found = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    last = max(place for place, event in enumerate(found) if event["event"] == "start")
    return [event for event in found[last:] if event["event"] == kind]


def beitctl(capsys, *arguments):
    """Exit code and stderr."""
    capsys.readouterr()
    return cli.execute((*COMMAND, *arguments)), capsys.readouterr().err


def allowing(*keys):
    return [word for key in keys for word in ("--allow", key)]


def test_every_difference_is_named_with_what_it_was_and_what_to_do(stopped, capsys):
    code, err = beitctl(capsys, *OTHER_RATE, *OTHER_SHARDS)
    assert code == 2
    lines = err.splitlines()
    assert lines[0] == "error: run: this run began with other settings, data or versions:"
    assert lines[1:3] == [
        "  objectives.classes.source.path: shards/{0..1}.tar -> shards/{0..2}.tar",
        "  train.optim.peak_lr: 0.001 -> 0.002",
    ]
    assert lines[3].startswith("  data: ")
    keys = ("objectives.classes.source.path", "train.optim.peak_lr", "data")
    assert f"--out run {' '.join(allowing(*keys))}; else undo the changes" in lines[4]


def test_what_is_refused_leaves_the_run_as_it_was(stopped, capsys):
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    beitctl(capsys, *OTHER_RATE)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_what_is_not_allowed_is_refused_though_other_changes_are(stopped, capsys):
    code, err = beitctl(capsys, *OTHER_RATE, *OTHER_SHARDS, *allowing("train.optim.peak_lr"))
    assert (code, "source.path" in err, "peak_lr: " in err) == (2, True, False)


def test_pictures_that_changed_under_the_same_settings_are_an_error_of_the_data(stopped, capsys):
    shutil.copy("shards/2.tar", "shards/1.tar")
    code, err = beitctl(capsys)
    assert (code, "  data: " in err, "--allow data" in err) == (3, True, True)


def test_allowed_changes_go_on_from_the_checkpoint_and_are_recorded(stopped, capsys):
    keys = ("objectives.classes.source.path", "train.optim.peak_lr", "data")
    code, err = beitctl(capsys, *OTHER_RATE, *OTHER_SHARDS, *allowing(*keys))
    assert code == 0, err
    assert [event["message"] for event in events("note")] == ["resuming from step 2"]
    assert [event["step"] for event in events("step")] == [3, 4]
    assert events("step")[0]["metrics"]["lr"] == pytest.approx(0.002 / 2)
    drift = {record["key"]: (record["old"], record["new"]) for record in manifest()["drift"]}
    assert set(drift) == set(keys)
    assert drift["train.optim.peak_lr"] == (0.001, 0.002)
    assert [event["code"] for event in events("warning")] == ["W310"] * 3
    assert {event["fix"] for event in events("warning")} == {""}
    code, err = beitctl(capsys, *OTHER_RATE, *OTHER_SHARDS, *allowing(*keys))
    assert (code, "already done: run" in err, len(manifest()["drift"])) == (0, True, 3)


def test_a_run_without_a_checkpoint_begins_anew_with_other_settings(stopped, capsys):
    shutil.rmtree("run/checkpoints/step-00000002")
    code, err = beitctl(capsys, *OTHER_RATE, *OTHER_SHARDS)
    assert (code, "run: nothing there to go on from; the run begins anew" in err) == (0, True), err
    assert [event["step"] for event in events("step")] == [1, 2, 3, 4]
    assert manifest()["settings"]["train.optim.peak_lr"] == 0.002
    assert "drift" not in manifest()


def test_a_checkpoint_that_cannot_be_read_is_something_to_go_on_from(stopped, capsys):
    Path("run/checkpoints/step-00000002").rename("run/checkpoints/step-00000002.corrupt")
    assert beitctl(capsys, *OTHER_RATE)[0] == 2


def test_a_run_that_was_refused_at_its_start_takes_the_setting_that_it_was_told(stopped, capsys):
    refused = ("--out", "new", "--set", "train.attention_backend=varlen-flash")
    code, err = beitctl(capsys, *refused)
    assert (code, Path("new/manifest.json").exists(), "attention_backend" in err) == (2, True, True), err
    code, err = beitctl(capsys, "--out", "new")
    assert code == 0, err


@pytest.mark.parametrize("extra", [("--dry-run",), ("--max-time", "1h")])
def test_leave_for_what_is_no_setting_is_refused_whatever_is_asked_for(stopped, capsys, extra):
    code, err = beitctl(capsys, *extra, "--allow", "train.nonsense")
    assert (code, "--allow train.nonsense: [pretrain] has no such setting" in err) == (2, True)
    assert "did you mean" not in err


def test_another_torch_is_refused_too(stopped, capsys):
    edit(versions=manifest()["versions"] | {"torch": "2.3.1"})
    code, err = beitctl(capsys)
    assert (code, "  torch: 2.3 -> " in err, "--allow torch" in err) == (2, True, True)


def test_a_finished_run_goes_on_with_more_steps(stopped, capsys):
    edit(versions=manifest()["versions"] | {"torch": "2.3.1"})
    assert beitctl(capsys, "--allow", "torch")[0] == 0
    assert beitctl(capsys, "--set", "train.steps=6", "--allow", "train.steps")[0] == 0
    assert [event["step"] for event in events("step")] == [5, 6]
    assert manifest()["status"] == "ok"
    assert [record["key"] for record in manifest()["drift"]] == ["torch", "train.steps"]
