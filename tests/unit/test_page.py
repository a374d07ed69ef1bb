import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from beitctl.report import charts, figures, page
from beitctl.report.events import EventLog
from beitctl.report.tables import cell, meanings, real, table, tables, whole

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
PNG = figures.gallery([])
OBJECTIVES = {
    "image": {"loss_first": 8.0, "loss_last": 5.0, "accuracy": 0.2, "baseline_accuracy": 0.05},
    "text": {"loss_first": 7.0, "loss_last": 4.0, "accuracy": 0.3, "baseline_accuracy": 0.1},
}


class Tags(HTMLParser):
    """Tags with attributes, and visible text, as a browser would find them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def manifest(folder, **fields):
    base = {
        "id": "5c1f0a2e",
        "stage": "pretrain",
        "key": "pretrain",
        "recipe": "tiny",
        "status": "ok",
        "exit": 0,
        "started": "2026-11-23T09:12:00+00:00",
        "ended": "2026-11-23T09:15:21+00:00",
        "command": ["beitctl", "pretrain", "--set", "a=b c"],
        "versions": {"torch": "2.15.0"},
        "git": {"commit": "6bdc0cbb", "dirty": True},
        "config_hash": "abcd",
        "fingerprint": "ef01",
        "parents": {"@tokenize-images": {"folder": "x", "fingerprint": "y"}},
        "world": 2,
        "metrics": {"objectives": OBJECTIVES},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(base | fields))


def fill(folder, text="a caption"):
    with EventLog(folder, stage="pretrain", recipe="tiny", run="5c1f0a2e", quiet=True) as log:
        log.start({})
        for step in range(1, 6):
            metrics = {"image/loss": 9.0 - step, "image/accuracy": step / 10, "lr": 0.1, "grad_norm": 1.0}
            log.step(step, 5, metrics)
            log.evaluation("knn", step, {"accuracy": 0.5})
        log.checkpoint(5, folder / "checkpoints" / "step-5", 0.1)
        log.figure("recon", PNG, f"title {text}", text)
        log.table("classes", f"table {text}", [text], [[text, 0.5, None, float("nan")]])
        log.note(text)
        log.warning(text, text, text)
        log.warning(text, text, text)
        log.end("ok", 0, {})


def shown(path):
    return Tags(path.read_text())


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    fill(folder)
    manifest(folder)
    (folder / "resolved.toml").write_text("[pretrain]\nsteps = 5\n")
    return shown(page.write(folder))


@pytest.mark.parametrize(
    "text",
    [
        *("pretrain done", "5c1f0a2e", "tiny", "3m21s", "commit 6bdc0cbb, dirty", "Last checkpoint"),
        *("baseline_accuracy", "steps = 5", "2.15.0", "beitctl pretrain --set 'a=b c'", "a caption"),
        *("(2 times)", "To fix:", "config_hash", "@tokenize-images", "Notes (1)", "Last evaluation"),
        *("Loss per objective (lower is better)", "Accuracy per objective (higher is better)"),
        *("Learning rate", "Length of the gradient", "Evaluation: accuracy", "Higher is better."),
    ],
)
def test_the_page_holds(text, whole_page):
    assert text in whole_page.text


def test_every_picture_is_embedded_and_has_an_alternative_text(whole_page):
    pictures = [attrs for tag, attrs in whole_page.tags if tag == "img"]
    assert len(pictures) == 6
    assert all(a["src"].startswith("data:image/png;base64,") and len(a["alt"]) > 10 for a in pictures)


def test_charts_say_their_values_in_words(whole_page):
    alts = [attrs["alt"] for tag, attrs in whole_page.tags if tag == "img"]
    assert "Chart. Loss per objective (lower is better): image from 8 to 4 at step 5." in alts


def test_the_page_needs_no_network_and_no_script(whole_page):
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in whole_page.tags}
    values = [value or "" for _, attrs in whole_page.tags for value in attrs.values()]
    assert not [value for value in values if "://" in value or value.startswith("//")]


def test_the_page_forbids_scripts(whole_page):
    policy = [a["content"] for _, a in whole_page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_hostile_text_stays_text(tmp_path):
    folder = tmp_path / "run"
    fill(folder, HOSTILE)
    manifest(folder, key=HOSTILE, recipe=HOSTILE, command=[HOSTILE], git=HOSTILE, metrics={HOSTILE: HOSTILE})
    (folder / "resolved.toml").write_text(HOSTILE)
    (tmp_path / "summary.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}}))
    for path in (page.write(folder), page.write_pipeline(tmp_path, [folder])):
        found = shown(path)
        assert "script" not in {tag for tag, _ in found.tags}
        assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
        assert found.text.count("<script>alert(1)</script>") > 10


def test_an_empty_folder_has_a_page(tmp_path):
    assert "not finished" in shown(page.write(tmp_path)).text


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"metrics": 3, "versions": [], "command": 7, "exit": "x", "git": 1}'),
        '{"metrics": {"a": [1, {"b": null}]}, "started": "2026-99-99T00:00:00", "ended": 5, "exit": true}',
    ],
)
def test_a_broken_manifest_does_not_stop_the_page(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    assert "not finished" in shown(page.write(tmp_path)).text


def test_broken_events_do_not_stop_the_page(tmp_path):
    odd = [
        {"event": "step", "step": "x", "metrics": {"loss": 1}},
        {"event": "step", "step": 1, "metrics": {"loss": None, "lr": "x", "a": 10**400, "loss2": True}},
        {"event": "step"},
        {"event": "eval", "metrics": []},
        {"event": "image"},
        {"event": "image", "path": "media/absent.png", "title": "gone"},
        {"event": "table", "columns": 3, "rows": [4, [5]]},
        {"event": "table", "rows": None},
        {"event": "checkpoint"},
        {"event": "warning"},
        {"event": "note", "message": "\ud800"},
        {"event": "unknown"},
        {"event": "end", "exit": []},
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, odd)) + '\n{"event"')
    assert "The file of this picture is missing." in shown(page.write(tmp_path)).text


def test_losses_that_are_not_finite_do_not_stop_the_page(tmp_path):
    with EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log:
        log.step(1, 2, {"loss": float("nan"), "grad_norm": float("inf")})
        log.end("failed", 6, {"loss": float("nan")})
    assert "diverged" in shown(page.write(tmp_path)).text


@pytest.mark.parametrize(
    ("exit_code", "text"),
    [(1, "unexpected error"), (75, "goes on from the last checkpoint"), (99, "ended with exit code 99")],
)
def test_the_outcome_says_what_happened(tmp_path, exit_code, text):
    manifest(tmp_path, exit=exit_code)
    assert text in shown(page.write(tmp_path)).text


def test_a_run_that_started_again_after_its_end_is_not_finished(tmp_path):
    with EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log:
        log.end("stopped", 75, {})
        log.start({})
    assert "not finished" in shown(page.write(tmp_path)).text


def test_restarts_are_counted_and_explained(tmp_path):
    with EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log:
        for first in (1, 3):
            log.start({})
            log.step(first, 5, {"loss": 1.0})
    text = shown(page.write(tmp_path)).text
    assert "Restarts1" in text
    assert "went on after an interruption" in text


def test_pictures_outside_the_run_folder_are_not_embedded(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    run = tmp_path / "run"
    run.mkdir()
    (run / "events.jsonl").write_text('{"event":"image","path":"../secret.png","title":"t"}\n')
    assert "img" not in {tag for tag, _ in shown(page.write(run)).tags}


def test_pictures_beyond_the_limit_are_linked_from_the_page(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "r1"
    fill(run)
    monkeypatch.setattr(charts.Room.__init__, "__defaults__", (len(PNG) - 1,))
    found = shown(page.write_pipeline(tmp_path, [run]))
    links = [attrs["href"] for tag, attrs in found.tags if tag == "a" and "media" in attrs["href"]]
    assert links == ["runs/r1/media/recon.png"]
    assert (tmp_path / links[0]).is_file()


def test_a_page_with_many_large_pictures_stays_under_ten_megabytes(tmp_path):
    with EventLog(tmp_path, stage="s", recipe="r", run="x", quiet=True) as log:
        for number in range(40):
            log.figure(str(number), PNG + os.urandom(390_000), "t", "c")
    path = page.write(tmp_path)
    assert 8_000_000 < path.stat().st_size < 10_000_000


def test_the_page_is_replaced_whole(tmp_path):
    page.write(tmp_path)
    manifest(tmp_path, key="second")
    page.write(tmp_path)
    assert "second" in shown(tmp_path / "report.html").text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "report.html"]


def test_the_recipe_page_puts_the_summary_first_and_links_every_stage(tmp_path):
    runs = [tmp_path / key / "r1" for key in ("pretrain", "export")]
    for run in runs:
        manifest(run, key=run.parent.name)
    manifest(runs[1], key="export", exit=3)
    (tmp_path / "summary.json").write_text(json.dumps({"export": {"max_difference": 0.25}}))
    found = shown(page.write_pipeline(tmp_path, runs))
    assert "Recipe tiny 1 of 2 stages are done, 6m42s in all." in found.text
    assert found.text.index("max_difference") < found.text.index("The run is complete.")
    links = [attrs["href"][1:] for tag, attrs in found.tags if tag == "a"]
    assert links == [attrs["id"] for tag, attrs in found.tags if "id" in attrs] == ["stage-0", "stage-1"]


def test_the_recipe_page_survives_absent_runs_and_summary(tmp_path):
    text = shown(page.write_pipeline(tmp_path, [tmp_path / "absent" / "r1"])).text
    assert "absent/r1" in text


def test_baselines_stand_beside_their_objective(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "curves", lambda *args, **_: seen.append(args) or PNG)
    charts.training({"image/accuracy": [(1, 0.5)]}, {"objectives": OBJECTIVES}, [], charts.Room())
    assert seen[0][3] == {"image: most frequent answer": 0.05}


def test_groups_with_the_same_names_share_a_table():
    found = tables({"steps": 5, "objectives": OBJECTIVES, "knn": {"pretrained": 0.5}})
    assert [t.title for t in found] == ["", "objectives", "knn"]
    assert found[1].columns == ("", "loss_first", "loss_last", "accuracy", "baseline_accuracy")
    assert [[c.text for c in row] for row in found[1].rows][1] == ["text", "7", "4", "0.3", "0.1"]


def test_groups_with_other_names_have_their_own_tables():
    assert [t.title for t in tables({"a": {"x": 1}, "b": {"y": 2}})] == ["a", "b"]


def test_deep_groups_are_named_by_their_path():
    assert [t.title for t in tables({"a": {"b": {"c": {"d": 1}}}})] == ["a › b › c"]


def test_long_tables_say_how_many_rows_are_left_out():
    found = table("t", ["n"], [[n] for n in range(250)])
    assert (len(found.rows), found.more) == (200, 50)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, "–"), (True, "yes"), (11234560, "11,234,560"), (0.123456, "0.1235"), ("a", "a")),
        *(([1, "b"], "1, b"), ({"a": 1}, "a 1"), ("nan", "nan")),
    ],
)
def test_cells_read_well(value, text):
    assert cell(value).text == text


def test_known_names_are_explained():
    assert [name for name, _ in meanings({"x": {"image/loss": 1}, "y": 2, "lr": 3})] == ["loss", "lr"]


@pytest.mark.parametrize(
    ("value", "number"), [("inf", np.inf), (3, 3.0), ("x", None), (True, None), ([], None)]
)
def test_values_from_files_become_numbers_or_nothing(value, number):
    assert real(value) == number


@pytest.mark.parametrize(("value", "number"), [(3, 3), (True, None), (2**60, None), (3.0, None)])
def test_steps_from_files_are_whole_numbers_or_nothing(value, number):
    assert whole(value) == number


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (("tflops_per_gpu", "lr"), ["Learning rate"]),
        (
            ("mfu_of_measured", "mfu", "tflops_per_gpu", "memory_gib"),
            [
                "Useful work of a GPU in TFLOP/s",
                "Share of the nominal peak of the GPU (MFU)",
                "Share of the measured peak of the GPU",
                "Memory of the GPU in GiB",
            ],
        ),
    ],
    ids=["on a CPU", "on a GPU"],
)
def test_charts_of_the_hardware_have_titles_and_explanations_and_need_a_gpu(names, titles):
    found = charts.others({name: [(1, 0.5), (2, 0.6)] for name in names}, [], charts.Room())
    assert [chart.title for chart in found] == titles
    assert all(chart.caption.endswith(".") for chart in found)
