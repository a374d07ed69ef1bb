import json
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from source_files import examples, fill, ids, png

from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources.hub import Hub
from beitctl_plugins.sources.reading.hub_files import Streamed, Urls

PICTURES = [png((number * 40, 0, 0)) for number in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def made():
    rows = {
        "image": [{"bytes": data, "path": None} for data in PICTURES],
        "label": [0, 1, 0, 1, -1],
        "caption": ["one", "two", " three \n3 ", "four", "five"],
        "split_id": ["a", "b", "c", "d", "e"],
    }
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["cat", "dog"]),
        caption=datasets.Value("string"),
        split_id=datasets.Value("string"),
    )
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    made().to_parquet(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", batch_size=2)
    made().to_parquet(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", batch_size=3)
    made().select([3]).to_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")
    return tmp_path / "set"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_is_read(folder, streaming):
    opened = Hub(dataset=str(folder), streaming=streaming).open()
    assert ids(opened) == [f"train[{row}]" for row in range(10)]
    found = examples(opened)
    assert [e.image for e in found] == PICTURES * 2
    assert [e.label for e in found] == ["cat", "dog", "cat", "dog", None] * 2
    assert found[2].captions == ("three 3",)
    with pytest.raises(IndexError):
        opened[10]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_is_chosen(folder, streaming):
    opened = Hub(dataset=str(folder), split="test", streaming=streaming).open()
    assert [e.captions for e in examples(opened)] == [("four",)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_that_is_not_there_is_refused(folder, streaming):
    with pytest.raises(DataError, match=r"set: .*dev.*train.*test"):
        Hub(dataset=str(folder), split="dev", streaming=streaming).open()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_that_is_not_there_is_refused(folder, streaming):
    with pytest.raises(DataError, match=r"set: BuilderConfig 'x' not found. Available: .*correct 'name'"):
        Hub(dataset=str(folder), name="x", streaming=streaming).open()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["image", "caption", "label", "text"])
def test_a_column_that_is_not_there_is_refused(folder, column, streaming):
    with pytest.raises(DataError, match=r"set: no column 'nope'; it has image, label, caption, split_id"):
        Hub(dataset=str(folder), streaming=streaming, **{column: "nope"}).open()


def test_saved_folders_are_read_in_place(tmp_path):
    made().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=made(), dev=made().select([1])).save_to_disk(tmp_path / "several")
    assert len(Hub(dataset=str(tmp_path / "one")).open()) == 5
    assert Hub(dataset=str(tmp_path / "several"), split="dev").open()[0].captions == ("two",)
    with pytest.raises(DataError, match=r"several: no split 'test'; it has train, dev"):
        Hub(dataset=str(tmp_path / "several"), split="test").open()
    with pytest.raises(DataError, match=r"one: is read in place anyway; set streaming to false"):
        Hub(dataset=str(tmp_path / "one"), streaming=True).open()


def test_saved_folders_are_guessed(tmp_path):
    made().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(a=made(), b=made()).save_to_disk(tmp_path / "several")
    assert Hub.guess(tmp_path / "one") == (6, {"dataset": str(tmp_path / "one")})
    assert Hub.guess(tmp_path / "several") == (6, {"dataset": str(tmp_path / "several"), "split": "a"})
    assert Hub.guess(tmp_path) is None


def test_prose_is_read_where_there_is_no_picture(tmp_path):
    datasets.Dataset.from_dict({"text": ["one", " ", " two "], "n": [1, 2, 3]}).save_to_disk(tmp_path / "set")
    opened = Hub(dataset=str(tmp_path / "set"), max_bad_share=0.5).open()
    assert [e.text for e in examples(opened)] == ["one", "two"]
    assert ids(opened) == ["train[0]", "train[2]"]
    assert opened.problems == [f"{tmp_path}/set/train[1]: no text in 'text'"]


def test_neither_pictures_nor_prose_is_refused(tmp_path):
    datasets.Dataset.from_dict({"n": [1]}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"no column of pictures or prose found among n; name one as 'image'"):
        Hub(dataset=str(tmp_path / "set")).open()


def test_addresses_are_no_pictures(tmp_path):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"url": ["https://example.org/1.png"]}), tmp_path / "set" / "train.parquet")
    with pytest.raises(
        DataError, match=r"nothing usable in it; 1 rows were left out:\n.*no file at the path"
    ):
        Hub(dataset=str(tmp_path / "set"), image="url").open()


def test_unusable_rows_are_left_out_and_listed(tmp_path):
    rows = made().to_dict()
    rows["image"][1] = None
    rows["image"][2] = {"bytes": b"", "path": None}
    rows["caption"][3] = " "
    datasets.Dataset.from_dict(rows, features=made().features).save_to_disk(tmp_path / "set")
    opened = Hub(dataset=str(tmp_path / "set"), caption="caption", max_bad_share=0.9).open()
    assert ids(opened) == ["train[0]", "train[4]"]
    assert [problem.rpartition("set/")[2] for problem in opened.problems] == [
        "train[1]: no picture in 'image'",
        "train[2]: no picture in 'image'",
        "train[3]: no text in 'caption'",
    ]


def test_a_streamed_row_without_a_picture_is_an_error_of_that_row(tmp_path):
    rows = made().to_dict()
    rows["image"][1] = None
    made().from_dict(rows, features=made().features).to_parquet(tmp_path / "train.parquet")
    opened = Hub(dataset=str(tmp_path), streaming=True).open()
    with pytest.raises(DataError, match=r"/train\[1\]: no picture in it"):
        opened[1]
    assert opened[2].label == "cat"


def test_rows_without_a_named_label_are_left_out(folder):
    opened = Hub(dataset=str(folder), split="train", label="label", max_bad_share=0.5).open()
    assert len(opened) == 8


def test_pictures_may_be_files(tmp_path):
    fill(tmp_path, "set/cat/1.png", "set/dog/2.png")
    opened = Hub(dataset=str(tmp_path / "set")).open()
    assert [(e.image, e.label) for e in examples(opened)] == [
        (tmp_path / "set/cat/1.png", "cat"),
        (tmp_path / "set/dog/2.png", "dog"),
    ]


def test_examples_may_be_named_by_a_column(tmp_path):
    made().save_to_disk(tmp_path / "set")
    assert ids(Hub(dataset=str(tmp_path / "set"), id="split_id").open()) == list("abcde")
    with pytest.raises(DataError, match=r"rows with the same 'label'; name another column or none"):
        Hub(dataset=str(tmp_path / "set"), id="label").open()


def test_lengths_are_the_bytes_of_the_captions(folder):
    assert Hub(dataset=str(folder), split="test").open().lengths.tolist() == [4]


def test_streams_know_their_row_groups(folder):
    assert list(Hub(dataset=str(folder), streaming=True).open().shards) == [2, 2, 1, 3, 2]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_fingerprint_says_what_is_in_it(folder, tmp_path, streaming):
    def key(place):
        return Hub(dataset=str(place), streaming=streaming).open().fingerprint

    before = key(folder)
    os.rename(folder, tmp_path / "moved")
    assert key(tmp_path / "moved") == before
    (tmp_path / "moved" / "data" / "train-00001-of-00002.parquet").unlink()
    assert key(tmp_path / "moved") != before


@pytest.mark.parametrize("streaming", [False, True])
def test_opened_sets_travel_to_worker_processes(folder, streaming):
    opened = Hub(dataset=str(folder), streaming=streaming).open()
    expected = examples(opened)
    assert examples(pickle.loads(pickle.dumps(opened))) == expected
    child = os.fork()
    if not child:
        os._exit(0 if examples(opened) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_streamed_file_that_changes_or_goes_ends_the_run(folder):
    opened, gone = (Hub(dataset=str(folder), streaming=True).open() for _ in range(2))
    file = folder / "data" / "train-00000-of-00002.parquet"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ChangedError, match=r"changed since it was opened"):
        opened[0]
    file.unlink()
    with pytest.raises(ChangedError, match=r"removed since it was opened"):
        gone[0]


def test_files_are_read_from_any_file_system():
    system = fsspec.filesystem("memory")
    for number in range(3):
        with system.open(f"/shards/{number}.parquet", "wb") as file:
            pq.write_table(pa.table({"n": list(range(number * 10, number * 10 + 7))}), file, row_group_size=3)
    urls = Urls([f"memory://shards/{number}.parquet" for number in range(3)])
    groups = urls.index()
    assert groups[:, 2].tolist() == [3, 3, 1] * 3
    rows = Streamed(urls, groups, ["n"])
    order = np.random.default_rng(0).permutation(21).tolist()
    assert [rows.cells(place)["n"] for place in order] == [place // 7 * 10 + place % 7 for place in order]


def test_a_damaged_file_is_refused(folder):
    (folder / "data" / "train-00001-of-00002.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: cannot be read \("):
        Hub(dataset=str(folder), streaming=True).open()
    with pytest.raises(DataError, match=r"set: cannot be loaded \("):
        Hub(dataset=str(folder)).open()


def test_what_is_not_parquet_cannot_be_streamed(tmp_path):
    (tmp_path / "train.csv").write_text("text\none\n")
    with pytest.raises(
        DataError, match=r"not made of Parquet files, which streaming needs; set streaming to f"
    ):
        Hub(dataset=str(tmp_path), streaming=True).open()


@pytest.mark.parametrize("dataset", ["./nowhere", "/no/where", "a/b/c", "no spaces", "~/no"])
def test_what_can_be_no_data_set_is_refused(dataset):
    with pytest.raises(DataError, match=r"neither a folder nor a name on the Hub; correct 'dataset'"):
        Hub(dataset=dataset).open()


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no data in it that the library datasets reads .*correct 'dataset'"):
        Hub(dataset=str(tmp_path)).open()


def test_wrong_settings_are_refused():
    with pytest.raises(ValidationError, match="dataset is empty; give a name on the Hub or a folder"):
        Hub(dataset=" ")
    with pytest.raises(
        ValidationError, match="id needs all rows at the beginning; remove it, or set streaming"
    ):
        Hub(dataset="a/b", id="key", streaming=True)


class Answers(BaseHTTPRequestHandler):
    """A Hub that knows three data sets by their faults."""

    def do_GET(self):
        status, code = 404, "RepoNotFound"
        if "gated" in self.path:
            status, code = (403, "GatedRepo") if "auth-check" in self.path else (200, "")
        if "/revision/" in self.path:
            code = "RevisionNotFound"
        if "busy" in self.path:
            status, code = 503, ""
        body = json.dumps({"id": "some/gated", "gated": "manual", "tags": [], "siblings": []}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dataset": "some/gated"},
            r"is gated; accept its terms at http://.*/datasets/some/gated, then run `hf",
        ),
        (
            {"dataset": "no/body"},
            r"no such data set on the Hub, or a private one; correct 'dataset', or run `hf",
        ),
        ({"dataset": "no/body", "revision": "v9"}, r"no revision 'v9'; correct 'revision'"),
        ({"dataset": "is/busy"}, r"cannot be loaded \(HfHubHTTPError: .*503"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, monkeypatch, settings, message, streaming):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
    with pytest.raises(DataError, match=message):
        Hub(**settings, streaming=streaming).open()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_that_is_not_there_is_refused_at_once(monkeypatch, streaming):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    expected = (
        r"no/body: http://127.0.0.1:9 cannot be reached \(.*refused\); check the network, or set HF_HUB_O"
    )
    with pytest.raises(DataError, match=expected):
        Hub(dataset="no/body", streaming=streaming).open()


def test_offline_a_set_that_is_not_downloaded_is_refused(tmp_path):
    code = (
        "from beitctl_plugins.sources.hub import Hub\n"
        "for streaming in (False, True):\n"
        "    try:\n"
        "        Hub(dataset='no/body', streaming=streaming).open()\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
        "import sys; print('torch' in sys.modules)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    first, second, torch = done.stdout.splitlines()
    for line in (first, second):
        assert line.startswith(
            "DataError no/body: not downloaded yet, and HF_HUB_OFFLINE is set; unset it once"
        )
    assert torch == "False"
