import json
import os
import sys
import tarfile
import threading

import numpy as np
import pytest
from source_files import examples, ids, png, tar

from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources.reading import ahead, tar_index
from beitctl_plugins.sources.webdataset import WebDataset


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def eager_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def sample(key, caption="a cat", colour=(9, 9, 9)):
    return [(f"{key}.jpg", png(colour)), (f"{key}.txt", caption.encode())]


def many(count, start=0):
    return [
        member for number in range(start, start + count) for member in sample(f"{number:05d}", f"n{number}")
    ]


def source(path, **table):
    return WebDataset(path=path, **({"max_bad_share": 1.0} | table))


def test_members_with_the_same_key_form_an_example(tmp_path):
    rows = [("b/1.jpg", png()), ("b/1.txt", b" a \n cat "), ("b/1.cls", b"7\n"), ("b/1.json", b"{}")]
    opened = source(tar(tmp_path / "a.tar", rows), label="cls").open()
    (found,) = examples(opened)
    assert (found.id, found.image, found.captions, found.label) == ("b/1", png(), ("a cat",), "7")
    assert not opened.problems


def test_a_caption_is_taken_from_json_where_there_is_no_txt(tmp_path):
    rows = [*sample("1", "from txt"), ("2.png", png()), ("3.PNG", png())]
    rows += [("1.json", b'{"caption": "x"}'), ("2.json", b'{"caption": "from json"}')]
    opened = source(tar(tmp_path / "a.tar", rows)).open()
    assert [e.captions for e in examples(opened)] == [("from txt",), ("from json",), ()]


def test_settings_name_keys_of_json(tmp_path):
    rows = [("1.webp", png()), ("1.json", json.dumps({"title": "t", "kind": 3}).encode())]
    opened = source(tar(tmp_path / "a.tar", rows), caption="json:title", label="json:kind").open()
    assert (opened[0].captions, opened[0].label) == (("t",), "3")


def test_text_needs_no_picture(tmp_path):
    opened = source(tar(tmp_path / "a.tar", [("1.txt", b" prose\n"), ("2.txt", b"more")]), text="txt").open()
    assert [(e.text, e.image, e.captions) for e in examples(opened)] == [
        ("prose", None, ()),
        ("more", None, ()),
    ]
    assert opened.lengths.tolist() == [7, 4]


def test_shards_are_the_samples_of_each_tar(tmp_path):
    for name, count in (("00000", 3), ("00001", 2)):
        tar(tmp_path / "tars" / f"{name}.tar", many(count, int(name) * 3))
    (tmp_path / "tars" / "00000_stats.json").write_text("{}")
    (tmp_path / "tars" / "00000.parquet").write_bytes(b"x")
    opened = source(tmp_path / "tars").open()
    assert ids(opened) == ["00000", "00001", "00002", "00003", "00004"]
    assert (opened.shards, opened.lengths.tolist(), opened.problems) == ([3, 2], [2] * 5, [])


@pytest.mark.parametrize("pattern", ["{00..02}.tar", "*.tar", "{00,01,02}.tar", "0[0-2].tar"])
def test_tars_are_named_by_a_pattern(tmp_path, pattern):
    for number in range(3):
        tar(tmp_path / f"{number:02d}.tar", sample(f"k{number}"))
    assert ids(source(tmp_path / pattern).open()) == ["k0", "k1", "k2"]


def test_a_tar_that_braces_name_must_exist(tmp_path):
    tar(tmp_path / "00.tar", sample("k"))
    with pytest.raises(DataError, match=r"01.tar: no such file, but .*{00..01}.tar names it; correct 'path'"):
        source(tmp_path / "{00..01}.tar").open()


def test_braces_that_stand_for_too_many_are_refused(tmp_path):
    with pytest.raises(DataError, match="stands for more than 1,000,000 files"):
        source(tmp_path / "{0..9999}{0..9999}.tar").open()


def test_keys_that_repeat_between_tars_get_the_name_of_the_tar(tmp_path):
    tar(tmp_path / "t" / "a.tar", sample("1"))
    tar(tmp_path / "t" / "b" / "a.tar", sample("1"))
    assert ids(source(tmp_path / "t").open()) == ["a.tar/1", "b/a.tar/1"]


def test_a_member_that_occurs_twice_is_listed(tmp_path):
    rows = [*sample("1", "first"), *sample("2"), ("1.txt", b"second")]
    opened = source(tar(tmp_path / "a.tar", rows)).open()
    assert opened[0].captions == ("first",)
    assert opened.problems == ["a.tar:1.txt: occurs twice; the first one is kept"]


@pytest.mark.parametrize(
    ("rows", "table", "problem"),
    [
        ([("2.txt", b"a")], {}, "a.tar:2: no picture (.jpg, "),
        ([("2.jpg", b"")], {}, "a.tar:2: the picture is empty"),
        ([("2.jpg", b"x")], {"caption": "txt"}, "a.tar:2: no .txt, or an empty one"),
        ([("2.jpg", b"x"), ("2.txt", b"")], {"caption": "txt"}, "a.tar:2: no .txt, or an empty one"),
        ([("2.jpg", b"x"), ("2.txt", b"a" * 2**20 + b"a")], {}, "a.tar:2: the caption is longer than 1 MiB"),
        ([("2.jpg", b"x"), ("2.json", b"a" * 2**24 + b"a")], {}, "a.tar:2: a text is larger than 16 MiB"),
        ([("../2.jpg", b"x")], {}, "a.tar:../2.jpg: its path leads out of the archive"),
        ([("/etc/2.jpg", b"x")], {}, "a.tar:/etc/2.jpg: its path leads out of the archive"),
        ([("a\nb.jpg", b"")], {}, "a.tar:a\\nb: the picture is empty"),
        ([("README", b"x")], {}, "a.tar:README: no ending, so it belongs to no sample"),
        ([("\udcff.jpg", b"x")], {}, r"a.tar:\xff.jpg: name is not UTF-8"),
    ],
)
def test_what_cannot_be_used_is_left_out_and_listed(tmp_path, rows, table, problem):
    opened = source(tar(tmp_path / "a.tar", [*sample("1"), *rows, *sample("3")]), **table).open()
    assert ids(opened) == ["1", "3"]
    (found,) = opened.problems
    assert found.startswith(problem)


def test_links_and_devices_are_left_out_and_listed(tmp_path):
    path = tar(tmp_path / "a.tar", sample("1"))
    with tarfile.open(path, "a") as opened:
        for name, kind in (
            ("l.jpg", tarfile.SYMTYPE),
            ("h.jpg", tarfile.LNKTYPE),
            ("d.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            opened.addfile(info)
    opened = source(path).open()
    assert ids(opened) == ["1"]
    link = "a link, which is not followed"
    assert opened.problems == [f"a.tar:l.jpg: {link}", f"a.tar:h.jpg: {link}", "a.tar:d.jpg: no regular file"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read(tmp_path, form):
    key = "ü" * 80 + "/" + "k" * 150
    opened = source(tar(tmp_path / "a.tar", sample(key, "long") + sample("short"), form)).open()
    assert ids(opened) == [key, "short"]
    assert (opened[0].image, opened[0].captions) == (png((9, 9, 9)), ("long",))


def test_names_may_begin_with_the_folder_itself_and_hidden_ones_are_passed_over(tmp_path):
    rows = [("./1.jpg", png()), ("./._1.jpg", b"x"), (".DS_Store", b"x")]
    opened = source(tar(tmp_path / "a.tar", rows)).open()
    assert (ids(opened), opened.problems) == (["1"], [])


def test_what_comes_before_a_broken_header_is_kept(tmp_path):
    path = tar(tmp_path / "a.tar", many(5))
    with tarfile.open(path) as opened:
        place = opened.getmember("00003.jpg").offset
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 200)
    opened = source(path).open()
    assert ids(opened) == ["00000", "00001", "00002"]
    (problem,) = opened.problems
    assert problem == f"a.tar: at byte {place}, after sample '00002': broken header; the rest is left out"
    with pytest.raises(DataError, match=r"% of the bytes cannot be read, more than max_bad_share"):
        source(path, max_bad_share=0.01).open()


@pytest.mark.parametrize(
    ("kept", "why"), [(0, "ends without the mark"), (300, "ends without"), (700, "cut off")]
)
def test_what_comes_before_the_end_of_a_truncated_tar_is_kept(tmp_path, kept, why):
    path = tar(tmp_path / "a.tar", [*many(3), ("9.jpg", b"x" * 999)])
    with tarfile.open(path) as opened:
        place = opened.getmember("9.jpg").offset
    os.truncate(path, place + kept)
    opened = source(path).open()
    assert ids(opened) == ["00000", "00001", "00002"]
    assert opened.problems[0].startswith(f"a.tar: at byte {place}, after sample '00002': {why}")


def test_tars_joined_by_cat_are_noticed(tmp_path):
    path = tar(tmp_path / "a.tar", many(2))
    path.write_bytes(path.read_bytes() * 2)
    opened = source(path).open()
    assert len(opened) == 2
    assert "more data behind the mark of the end" in opened.problems[0]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar", b"", "nothing usable in it"),
        ("a.tar", b"\1" * 5000, "nothing usable in it"),
        ("a.tar", b"\x1f\x8b123", "compressed, but samples are read from any place in it; decompress it"),
        ("a.tar.gz", b"\x1f\x8b123", "compressed, but samples are read from any place in it; decompress it"),
        ("a.zip", b"PK", "expected a file that ends in .tar"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        source(tmp_path / name).open()


def test_a_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no file that ends in .tar; correct 'path'"):
        source(tmp_path).open()


def test_a_changed_tar_ends_the_run(tmp_path):
    path = tar(tmp_path / "a.tar", many(3))
    opened = source(path).open()
    assert opened[0].id == "00000"
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ChangedError, match=r"a.tar: changed since it was opened \([\d,]+ bytes then"):
        opened[1]


def test_a_removed_tar_ends_the_run(tmp_path):
    path = tar(tmp_path / "a.tar", many(3))
    opened = source(path).open()
    assert opened[0].id == "00000"
    path.unlink()
    with pytest.raises(ChangedError, match=r"a.tar: removed since it was opened"):
        opened[1]


@pytest.mark.parametrize(
    ("member", "table", "message"),
    [
        (("1.txt", b"\xff"), {}, r"a.tar:1.txt: not UTF-8"),
        (("1.txt", b" \n"), {}, r"a.tar:1.txt: blank"),
        (("1.json", b"{"), {"caption": "json:a"}, r"a.tar:1.json: not JSON"),
        (("1.json", b"[" * 100000), {"caption": "json:a"}, r"a.tar:1.json: not JSON"),
        (
            ("1.json", b'{"a": "' + b"b" * 2**20 + b'c"}'),
            {"caption": "json:a"},
            r"1: caption is longer than 1 MB",
        ),
        (("1.json", b"[1]"), {"caption": "json:a"}, r"a.tar:1.json: expected an object, found \[1\]"),
        (("1.json", b"{"), {}, r"a.tar:1.json: not JSON"),
        (("1.json", b'{"captions": ["", " "]}'), {}, r"a.tar:1: caption is not text: \['', ' '\]"),
        (("1.json", b'{"a": null}'), {"caption": "json:a"}, r"1.json: 'a': expected text, found None"),
    ],
)
def test_a_text_that_cannot_be_used_is_an_error_of_its_example(tmp_path, member, table, message):
    opened = source(tar(tmp_path / "a.tar", [("1.jpg", png()), member]), **table).open()
    with pytest.raises(DataError, match=message):
        opened[0]


def test_an_index_is_not_made_twice(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", many(3))
    before = source(path).open()
    monkeypatch.setattr(tar_index, "_scan", None)
    again = source(path, caption="txt").open()
    assert ids(again) == ids(before)


def test_interrupted_indexing_goes_on(tmp_path, monkeypatch):
    for number in range(3):
        tar(tmp_path / "t" / f"{number}.tar", sample(f"k{number}"))
    scan, seen = tar_index._scan, []

    def stop(shard):
        seen.append(shard.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return scan(shard)

    monkeypatch.setattr(ahead, "MOST_PROCESSES", 1)
    monkeypatch.setattr(tar_index, "_scan", stop)
    with pytest.raises(KeyboardInterrupt):
        source(tmp_path / "t").open()
    assert len(source(tmp_path / "t").open()) == 3
    assert seen == ["0.tar", "1.tar", "2.tar", "2.tar"]


def test_a_killed_indexing_process_is_survived(tmp_path, monkeypatch):
    for number in range(3):
        tar(tmp_path / "t" / f"{number}.tar", sample(f"k{number}"))
    scan, own = tar_index._scan, os.getpid()
    monkeypatch.setattr(tar_index, "_scan", lambda shard: scan(shard) if os.getpid() == own else os._exit(9))
    assert len(source(tmp_path / "t").open()) == 3


def test_threads_and_a_forked_process_read_the_same(tmp_path, eager_threads):
    for number in range(3):
        tar(tmp_path / "t" / f"{number}.tar", many(20, number * 20))
    opened = source(tmp_path / "t").open()
    wanted = [e.captions for e in examples(opened)]
    assert wanted == [(f"n{number}",) for number in range(60)]
    found = {}

    def read(seed):
        order = np.random.default_rng(seed).permutation(60)
        found[seed] = all(opened[i].captions == wanted[i] for i in order)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)
    child = os.fork()
    if not child:
        read(9)
        os._exit(0 if found[9] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_few_tars_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("beitctl_plugins.sources.reading.rows.OPEN_FILES", 2)
    for number in range(5):
        tar(tmp_path / "t" / f"{number}.tar", sample(f"k{number}"))
    opened = source(tmp_path / "t").open()
    before = len(os.listdir("/proc/self/fd"))
    assert len(examples(opened)) == 5
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_the_fingerprint_follows_the_data_and_the_settings(tmp_path):
    first = source(tar(tmp_path / "a" / "a.tar", many(2))).open().fingerprint
    assert source(tar(tmp_path / "b" / "a.tar", many(2))).open().fingerprint == first
    assert source(tmp_path / "a" / "a.tar", caption="txt").open().fingerprint != first
    assert source(tar(tmp_path / "c" / "a.tar", many(2, 1))).open().fingerprint != first


@pytest.mark.parametrize(
    "table", [{"caption": ".txt"}, {"label": "json:"}, {"text": "txt", "caption": "txt"}]
)
def test_settings_that_mean_nothing_are_refused(tmp_path, table):
    with pytest.raises(ValueError, match=r"expected the ending of a member|both 'txt'"):
        source(tmp_path, **table)


def test_guess_knows_tars(tmp_path):
    path = tar(tmp_path / "a" / "a.tar", [*sample("1"), ("1.cls", b"3")])
    assert WebDataset.guess(path) == (6, {"path": str(path), "label": "cls"})
    assert WebDataset.guess(tmp_path / "a") == (6, {"path": str(tmp_path / "a"), "label": "cls"})
    assert WebDataset.guess(tar(tmp_path / "t.tar", [("1.txt", b"a")])) == (
        6,
        {"path": str(tmp_path / "t.tar"), "text": "txt"},
    )
    assert WebDataset.guess(tmp_path / "none") is None
