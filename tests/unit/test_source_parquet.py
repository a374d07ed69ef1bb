import io
import json
import os
import pickle
import sys
import tarfile
import threading

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from source_files import examples, fill, ids, png

from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources import opened as sources
from beitctl_plugins.sources.parquet import Parquet
from beitctl_plugins.sources.webdataset import WebDataset

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path, columns, *, group=2, types=None, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: pa.array(cells, (types or {}).get(name)) for name, cells in columns.items()})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=group)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path, chunksize=group)
    else:
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table, group)
    return path


def pictures(count):
    return [png((number, 0, 0)) for number in range(count)]


def basic(path, count=5, **more):
    return write(path, {"image": pictures(count), "caption": [f"n{n}" for n in range(count)]}, **more)


def source(path, **table):
    return Parquet(path=path, **({"max_bad_share": 1.0} | table))


@pytest.fixture
def eager_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    if request.param == "large":
        monkeypatch.setattr(sources, "SMALL_BYTES", 0)


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
def test_pictures_and_captions_are_read(tmp_path, ending, size):
    opened = source(basic(tmp_path / f"a.{ending}")).open()
    assert ids(opened) == [f"a.{ending}:{row}" for row in range(1, 6)]
    assert [e.image for e in examples(opened)] == pictures(5)
    assert [e.captions for e in examples(opened)] == [(f"n{n}",) for n in range(5)]
    assert (opened.shards, opened.lengths.tolist(), opened.problems) == ([2, 2, 1], [2] * 5, [])


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
def test_structs_as_hugging_face_writes_them_are_read(tmp_path, ending, size):
    fill(tmp_path, "p/2.png")
    cells = [{"bytes": png(), "path": "1.jpg"}, {"bytes": None, "path": "p/2.png"}]
    path = write(tmp_path / f"a.{ending}", {"image": cells}, types={"image": PICTURE})
    opened = source(path).open()
    assert ids(opened) == ["1.jpg", "p/2.png"]
    assert [e.image for e in examples(opened)] == [png(), tmp_path / "p/2.png"]


def test_paths_of_pictures_are_read(tmp_path):
    fill(tmp_path / "p", "1.png", "2.png")
    path = write(tmp_path / "t" / "a.parquet", {"file": ["1.png", "2.png", "3.png", None]})
    opened = source(path, image="file", root=str(tmp_path / "p")).open()
    assert [(e.id, e.image) for e in examples(opened)] == [
        (n, tmp_path / "p" / n) for n in ("1.png", "2.png")
    ]
    assert opened.problems == [
        "a.parquet:3: no file at the path in 'file'",
        "a.parquet:4: no picture in 'file'",
    ]


def test_several_files_are_one_source(tmp_path):
    basic(tmp_path / "d" / "b.parquet", 2)
    basic(tmp_path / "d" / "a" / "x.parquet", 3)
    opened = source(tmp_path / "d").open()
    assert ids(opened) == [*(f"a/x.parquet:{n}" for n in (1, 2, 3)), "b.parquet:1", "b.parquet:2"]
    assert ids(source(tmp_path / "d" / "*" / "*.parquet").open()) == [f"a/x.parquet:{n}" for n in (1, 2, 3)]
    assert opened.shards == [2, 1, 2]


def test_ids_come_from_a_column(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": pictures(2), "key": [7, 8]})
    assert ids(source(path, id="key").open()) == ["7", "8"]


def test_two_rows_with_the_same_id_are_refused(tmp_path):
    write(tmp_path / "d" / "a.parquet", {"image": pictures(2), "key": ["x", "y"]})
    write(tmp_path / "d" / "b.parquet", {"image": pictures(2), "key": ["z", "y"]})
    with pytest.raises(DataError, match=r"a.parquet:2 and .*b.parquet:2 have the same 'key', 'y', but"):
        source(tmp_path / "d", id="key").open()


def test_paths_that_repeat_name_no_examples(tmp_path):
    cells = [{"bytes": picture, "path": "same.jpg"} for picture in pictures(2)]
    path = write(tmp_path / "a.parquet", {"image": cells}, types={"image": PICTURE})
    assert ids(source(path).open()) == ["a.parquet:1", "a.parquet:2"]


def test_lists_of_captions_are_read(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": pictures(2), "captions": [["a b", " c\n d "], ["e"]]})
    opened = source(path).open()
    assert [e.captions for e in examples(opened)] == [("a b", "c d"), ("e",)]
    assert opened.lengths.tolist() == [4, 1]


def test_names_of_classes_come_from_the_metadata(tmp_path):
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    path = write(tmp_path / "a.parquet", {"image": pictures(4), "label": [1, 0, -1, 5]}, features=features)
    opened = source(path, label="label").open()
    assert [e.label for e in examples(opened)] == ["dog", "cat"]
    assert opened.problems == [
        "a.parquet:3: no class in 'label'",
        "a.parquet:4: the number in 'label' is not that of a class",
    ]
    assert [e.label for e in examples(source(path, label="label", where={"label": "cat"}).open())] == ["cat"]


@pytest.mark.parametrize(
    ("cells", "kind", "wanted"),
    [
        ([3, None], None, ["3"]),
        (["a", " "], None, ["a"]),
        ([2.0, None], None, ["2"]),
        ([True, None], None, ["True"]),
        (["a", "b"], pa.dictionary(pa.int8(), pa.string()), ["a", "b"]),
    ],
)
def test_classes_may_be_texts_or_numbers(tmp_path, cells, kind, wanted):
    path = write(tmp_path / "a.parquet", {"image": pictures(2), "c": cells}, types={"c": kind})
    assert [e.label for e in examples(source(path, label="c").open())] == wanted


@pytest.mark.parametrize(
    ("cells", "value"), [(["a", "b"], "b"), ([1, 2], "2"), ([False, True], "True"), ([0.5, 1.0], "1.0")]
)
def test_where_chooses_rows(tmp_path, cells, value):
    path = write(tmp_path / "a.parquet", {"image": pictures(2), "split": cells})
    assert ids(source(path, where={"split": value}).open()) == ["a.parquet:2"]


def test_where_without_a_match_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": pictures(2), "split": ["a", "b"]})
    with pytest.raises(DataError, match=r"no row with split = 'dev'; correct 'path' or 'where'"):
        source(path, where={"split": "dev"}).open()


def test_prose_needs_no_picture(tmp_path):
    opened = source(write(tmp_path / "a.parquet", {"text": [" a b ", "", None, "c"]}), text="text").open()
    assert [(e.text, e.image) for e in examples(opened)] == [("a b", None), ("c", None)]
    assert opened.problems == ["a.parquet:2: no text in 'text'", "a.parquet:3: no text in 'text'"]
    assert opened.lengths.tolist() == [5, 1]


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("image", None, "no picture in 'image'"),
        ("image", b"", "no picture in 'image'"),
        ("caption", None, "no text in 'caption'"),
        ("caption", " \n", "no text in 'caption'"),
        ("caption", "a" * (2**20 + 1), "caption in 'caption' is longer than 1 MB"),
    ],
)
def test_a_row_that_cannot_be_used_is_left_out_and_listed(tmp_path, column, cell, reason):
    columns = {"image": pictures(3), "caption": ["a", "b", "c"]}
    columns[column][1] = cell
    opened = source(write(tmp_path / "a.parquet", columns), caption="caption").open()
    assert ids(opened) == ["a.parquet:1", "a.parquet:3"]
    assert opened.problems == [f"a.parquet:2: {reason}"]
    with pytest.raises(DataError, match="1 of 3 rows are unusable"):
        source(tmp_path / "a.parquet", caption="caption", max_bad_share=0.01).open()


@pytest.mark.parametrize("cell", [[], [None], ["", " "], None])
def test_a_list_without_only_captions_is_left_out(tmp_path, cell):
    path = write(tmp_path / "a.parquet", {"image": pictures(3), "caption": [["a"], cell, ["b", "c"]]})
    opened = source(path, caption="caption").open()
    assert opened.problems == ["a.parquet:2: no text in 'caption'"]
    assert [e.captions for e in examples(opened)] == [("a",), ("b", "c")]


def test_captions_that_nobody_asked_for_may_be_missing(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": pictures(3), "caption": ["a", None, " "]})
    assert [e.captions for e in examples(source(path).open())] == [("a",), (), ()]


def test_a_caption_that_is_not_utf_8_is_left_out(tmp_path):
    cells = pa.array([b"a", b"\xff\xfe"]).view(pa.string())
    pq.write_table(pa.table({"image": pictures(2), "caption": cells}), tmp_path / "a.parquet")
    opened = source(tmp_path / "a.parquet", caption="caption").open()
    assert opened.problems == ["a.parquet:2: no text in 'caption'"]


def test_an_empty_picture_in_a_large_set_is_an_error_of_its_example(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)
    opened = source(write(tmp_path / "a.parquet", {"image": [png(), b""]})).open()
    with pytest.raises(DataError, match=r"a.parquet:2: no picture in 'image'"):
        opened[1]


def test_a_missing_picture_in_a_large_set_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)
    opened = source(write(tmp_path / "a.parquet", {"image": [png(), b"", None]}, group=3)).open()
    assert opened.problems == [f"a.parquet:{row}: no picture in 'image'" for row in (2, 3)]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image": "img"}, r"a.parquet: no column 'img'; it has image, caption"),
        ({"label": "x"}, r"a.parquet: no column 'x'; it has image, caption"),
        ({"where": {"x": "1"}}, r"a.parquet: no column 'x'; it has image, caption"),
        ({"caption": "image"}, r"column 'image' holds binary; expected texts or lists of texts"),
    ],
)
def test_columns_that_are_missing_or_of_a_wrong_type_are_refused(tmp_path, table, message):
    with pytest.raises(DataError, match=message):
        source(basic(tmp_path / "a.parquet"), **table).open()


def test_a_file_with_other_columns_than_the_first_is_refused(tmp_path):
    basic(tmp_path / "d" / "a.parquet")
    write(tmp_path / "d" / "b.parquet", {"image": pictures(1)})
    with pytest.raises(DataError, match=r"b.parquet: no column 'caption'; it has image"):
        source(tmp_path / "d").open()


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 50, b"ARROW1\0\0" * 9, b"\xff\xff\xff\xff" * 9])
def test_a_damaged_file_is_refused(tmp_path, ending, data):
    (tmp_path / f"a.{ending}").write_bytes(data)
    with pytest.raises(DataError, match=rf"a.{ending}: (cannot be read|no row|no column)"):
        source(tmp_path / f"a.{ending}").open()


def test_a_damaged_footer_is_refused(tmp_path):
    path = basic(tmp_path / "a.parquet")
    data = bytearray(path.read_bytes())
    data[-60:-12] = b"\xee" * 48
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet: cannot be read \(.*\); replace or remove it"):
        source(path).open()


def test_a_damaged_page_of_captions_is_refused(tmp_path):
    path = basic(tmp_path / "a.parquet")
    place = pq.ParquetFile(path).metadata.row_group(0).column(1).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 12] = b"\xff" * 12
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet: cannot be read \(.*\); replace or remove it"):
        source(path).open()


def test_a_damaged_page_of_pictures_is_an_error_of_its_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)
    path = basic(tmp_path / "a.parquet")
    place = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 12] = b"\xff" * 12
    path.write_bytes(data)
    opened = source(path).open()
    assert opened[0].captions == ("n0",)
    for _ in range(2):
        with pytest.raises(DataError, match=r"a.parquet: row group 1 cannot be read"):
            opened[2]
    assert opened[4].captions == ("n4",)


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
def test_a_changed_or_removed_file_ends_the_run(tmp_path, ending):
    path = basic(tmp_path / f"a.{ending}")
    opened = source(path).open()
    assert opened[0].image
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ChangedError, match=rf"a.{ending}: changed since it was opened"):
        opened[1]
    path.unlink()
    with pytest.raises(ChangedError, match=rf"a.{ending}: removed since it was opened"):
        opened[1]


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
def test_threads_and_a_forked_process_read_the_same(tmp_path, ending, monkeypatch, eager_threads):
    monkeypatch.setattr("beitctl_plugins.sources.reading.table_files.MOST_CACHED", 1)
    monkeypatch.setattr("beitctl_plugins.sources.reading.table_files.MOST_OPEN", 1)
    for number in range(3):
        basic(tmp_path / "d" / f"{number}.{ending}", 8)
    opened = source(tmp_path / "d").open()
    wanted = [(e.id, e.image, e.captions) for e in examples(opened)]
    assert len(wanted) == 24
    found = {}

    def read(seed):
        order = np.random.default_rng(seed).permutation(24)
        found[seed] = all((opened[i].id, opened[i].image, opened[i].captions) == wanted[i] for i in order)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)
    opened.example.__self__.tables._lock.acquire()  # as if a thread held it when the process forks
    child = os.fork()
    if not child:
        read(9)
        os._exit(0 if found[9] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_opened_source_can_be_sent_to_another_process(tmp_path):
    opened = source(basic(tmp_path / "a.parquet")).open()
    assert ids(pickle.loads(pickle.dumps(opened))) == ids(opened)


def test_the_fingerprint_follows_the_data_and_the_settings(tmp_path):
    first = source(basic(tmp_path / "a" / "a.parquet")).open().fingerprint
    assert source(basic(tmp_path / "b" / "a.parquet")).open().fingerprint == first
    assert source(tmp_path / "a", caption="caption").open().fingerprint != first
    assert source(basic(tmp_path / "c" / "a.parquet", 4)).open().fingerprint != first


@pytest.mark.parametrize("table", [{"image": ""}, {"text": "caption", "caption": "caption"}])
def test_settings_that_mean_nothing_are_refused(tmp_path, table):
    with pytest.raises(ValueError, match=r"image and text are both empty|text is also the column"):
        source(tmp_path, **table)


def test_a_tar_and_a_table_give_the_same_examples(tmp_path, monkeypatch):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "cache"))
    columns = {"image": pictures(3), "caption": ["a", "b b", "c"], "label": ["x", "y", "x"]}
    path = write(tmp_path / "a.parquet", columns | {"key": ["1", "2", "3"]})
    with tarfile.open(tmp_path / "a.tar", "w") as opened:
        for key, *cells in zip("123", *columns.values(), strict=True):
            for ending, cell in zip(("png", "txt", "cls"), cells, strict=True):
                info = tarfile.TarInfo(f"{key}.{ending}")
                data = cell if isinstance(cell, bytes) else cell.encode()
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
    tars = WebDataset(path=tmp_path / "a.tar", label="cls").open()
    tables = source(path, id="key", label="label").open()
    assert examples(tars) == examples(tables)


def test_guess_knows_tables(tmp_path):
    path = basic(tmp_path / "a" / "data" / "a.parquet")
    assert Parquet.guess(path) == (4, {"path": str(path), "image": "image"})
    assert Parquet.guess(tmp_path / "a") == (4, {"path": str(tmp_path / "a"), "image": "image"})
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    path = write(
        tmp_path / "b.parquet",
        {"img": [{"bytes": png(), "path": None}], "text": ["a"], "label": [1]},
        types={"img": PICTURE},
        features=features,
    )
    assert Parquet.guess(path)[1] == {"path": str(path), "image": "img", "caption": "text", "label": "label"}
    path = write(tmp_path / "c.arrow", {"text": ["a"]})
    assert Parquet.guess(path) == (4, {"path": str(path), "text": "text"})
    assert Parquet.guess(tmp_path / "none") is None


def test_guess_knows_others_by_name_only_as_opening_tells_what_is_wrong(tmp_path):
    path = write(tmp_path / "d.parquet", {"number": [1]})
    assert Parquet.guess(path) == (1, {"path": str(path)})
    (tmp_path / "e.parquet").write_bytes(b"x")
    assert Parquet.guess(tmp_path / "e.parquet") == (1, {"path": str(tmp_path / "e.parquet")})


def test_guess_leaves_folders_of_pictures_to_others(tmp_path):
    basic(tmp_path / "a.parquet")
    assert Parquet.guess(fill(tmp_path, "1.png", "2.png")) is None
