"""Shards: what is in them, and that they are the same whatever happens on the way."""

import contextlib
import errno
import hashlib
import io
import json
import os
import tarfile
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet as pq
import pytest
from inspected import BROKEN, examples, found, picture
from PIL import Image

from beitctl.api import Example
from beitctl.data.images import Pictures
from beitctl.data.lock import locked
from beitctl.errors import CapacityError, ChangedError, DataError, Interrupted, UserError
from beitctl.inspecting import sharding, shards
from beitctl.inspecting.journal import packed
from beitctl.inspecting.resizing import prepare
from beitctl.inspecting.sharding import Limits, Settings
from beitctl.inspecting.shards import key

SMALL = Settings(px=16, shard_bytes=6000)
ALL = Limits(max_bad_share=1, quiet=True)


def pack(rows, out, settings=SMALL, limits=ALL, **others):
    source, opened = found(rows, **others)
    return sharding.write(source, opened, out, settings, limits)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_of(folder):
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def members_of(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def ready(image, px=16, **others):
    _, opened = found([Example("x", image, **others)])
    return prepare(opened, 0, px=px, quality=90, pictures=Pictures(), words_only=True)


def decoded(data):
    return Image.open(io.BytesIO(data))


@pytest.fixture
def interrupted(monkeypatch):
    """Makes the next pack end with an error when so many examples have been read."""

    def after(count, error):
        real, seen = sharding.in_order, []

        def stream(*arguments):
            def limited():
                for item in real(*arguments):
                    if len(seen) == count:
                        monkeypatch.setattr(sharding, "in_order", real)
                        raise error
                    seen.append(item)
                    yield item

            return limited()

        monkeypatch.setattr(sharding, "in_order", stream)

    return after


def test_every_row_keeps_what_belongs_to_it_in_order(tmp_path):
    rows = [
        Example("a/1.png", picture(), ("one", "zwei ü"), label="cat"),
        Example("b", picture(), (), text="prose"),
    ]
    pack(rows, tmp_path / "p")
    found = rows_of(tmp_path / "p")
    assert [(r["id"], r["captions"], r["label"], r["text"]) for r in found] == [
        ("a/1.png", ["one", "zwei ü"], "cat", None),
        ("b", [], None, "prose"),
    ]
    assert decoded(found[0]["image"]).size == (21, 16)


def test_a_tar_has_the_layout_of_img2dataset(tmp_path):
    rows = [Example("a/1.png", picture(), ("one", "two"), label="cat"), Example("b", picture())]
    pack(rows, tmp_path / "p", Settings(px=16, format="tar"))
    members = members_of(tmp_path / "p" / "00000.tar")
    assert list(members) == [
        "a/1%2Epng.jpg",
        "a/1%2Epng.txt",
        "a/1%2Epng.cls",
        "a/1%2Epng.json",
        "b.jpg",
        "b.json",
    ]
    assert members["a/1%2Epng.txt"] == b"one"
    assert members["a/1%2Epng.cls"] == b"cat"
    assert json.loads(members["a/1%2Epng.json"]) == {
        "id": "a/1.png", "captions": ["one", "two"], "label": "cat", "text": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "id",
    [
        "a",
        "a/b",
        "a.b/c.d.jpg",
        "/etc/passwd",
        "../x",
        ".",
        "..",
        "a//b",
        "a/",
        "",
        "%2E",
        "ü 中\n",
        "a b",
        "-x",
        "a%/b",
    ],
)
def test_the_key_of_an_id_turns_back_into_it_and_is_a_relative_name_without_dots(id):
    name = key(id)
    assert unquote(name) == id or (id, name) == ("", "%")
    assert "." not in name
    assert name.isascii()
    assert all(name.split("/"))


def test_keys_of_different_ids_differ():
    ids = ["", "%", "a", "a.b", "a%2Eb", "/", "%2F", "x" * 300, "x" * 301, "y/" * 500]
    assert len({key(id) for id in ids}) == len(ids)
    assert max(len(key(id)) for id in ids) < 200


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(40, 30, (21, 16)), (30, 40, (16, 21)), (16, 400, (16, 400)), (10, 10, (10, 10)), (17, 16, (17, 16))],
)
def test_only_the_short_side_of_larger_pictures_is_shrunk(width, height, size):
    assert decoded(ready(picture(width, height, "PNG")).image).size == size


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "I;16"), ("WEBP", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L")]
)
def test_other_kinds_of_picture_become_rgb_jpegs(kind, mode):
    if mode == "I;16":
        stream = io.BytesIO()
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(stream, kind)
        data = stream.getvalue()
    else:
        data = picture(8, 8, kind, mode=mode)
    found = decoded(ready(data).image)
    assert (found.format, found.mode, found.size) == ("JPEG", "RGB", (8, 8))


def test_a_small_upright_rgb_jpeg_is_copied_byte_for_byte():
    data = picture(20, 16)
    assert (ready(data).image, ready(data).copied) == (data, True)


def test_a_small_jpeg_that_lies_on_its_side_is_set_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = ready(picture(20, 16, exif=exif))
    assert (decoded(found.image).size, found.copied) == ((16, 20), False)


def test_a_picture_from_a_file_is_packed_as_well(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(picture(20, 16))
    assert ready(path).image == path.read_bytes()


def test_a_picture_too_long_for_jpeg_is_broken():
    assert "more than a JPEG can have" in ready(picture(66_000, 1, "PNG")).reason


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ({"second": b"x"}, "a second picture"),
        ({"answers": ("x",)}, "answers"),
        ({"segmentation": b"x"}, "a segmentation"),
    ],
)
def test_examples_that_would_lose_something_are_refused(tmp_path, parts, name):
    with pytest.raises(UserError, match=name):
        pack([Example("x", picture(), **parts)], tmp_path / "p")


def test_prose_goes_into_parquet_and_not_into_tar(tmp_path):
    pack([Example("x", text="prose")], tmp_path / "p")
    assert rows_of(tmp_path / "p")[0]["text"] == "prose"
    with pytest.raises(UserError, match="use --format parquet"):
        pack([Example("x", text="prose")], tmp_path / "t", Settings(format="tar"))


def test_broken_examples_are_left_out_and_listed(tmp_path):
    done = pack([*examples(3), BROKEN, Example("cut", b"no")], tmp_path / "p", problems=["x:3: no caption"])
    listed = [json.loads(line) for line in (tmp_path / "p" / "left-out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == [None, "#3", "cut"]
    assert listed[0]["reason"] == "x:3: no caption"
    assert (done["packed"], done["left_out"], done["left_out_by_source"]) == (3, 2, 1)


@pytest.mark.parametrize(
    ("rows", "format", "table"),
    [
        (examples(2), "parquet", {"kind": "parquet", "image": "image", "id": "id", "label": "label"}),
        (examples(2), "tar", {"kind": "webdataset", "label": "cls"}),
        ([*examples(2), Example("x", picture())], "tar", {"kind": "webdataset"}),
        ([Example("x", text="a")], "parquet", {"kind": "parquet", "image": "", "id": "id", "text": "text"}),
        (
            [Example("x", picture(), ("c",), text="a")],
            "parquet",
            {"kind": "parquet", "image": "image", "id": "id", "text": "text", "caption": "captions"},
        ),
    ],
)
def test_packed_json_says_how_the_shards_are_read(tmp_path, rows, format, table):
    assert pack(rows, tmp_path / "p", Settings(px=16, format=format))["read"] == table
    assert packed(tmp_path / "p") == {**table, "path": str(tmp_path / "p")}


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"read": 1}'])
def test_a_folder_that_is_no_pack_says_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / "packed.json").write_text(text)
    assert packed(tmp_path) is None


def test_packed_json_has_the_hash_of_every_shard(tmp_path):
    done = pack(examples(20), tmp_path / "p")
    assert json.loads((tmp_path / "p" / "packed.json").read_text()) == done
    assert len(done["shards"]) > 2
    for shard in done["shards"]:
        data = (tmp_path / "p" / shard["name"]).read_bytes()
        assert (shard["sha256"], shard["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert sorted(files(tmp_path / "p")) == sorted([s["name"] for s in done["shards"]] + ["packed.json"])


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_shards_are_the_same_with_any_number_of_threads(tmp_path, format):
    settings = Settings(px=16, format=format, shard_bytes=6000)
    for workers in (1, 4):
        pack(examples(30), tmp_path / str(workers), settings, Limits(workers, 1, quiet=True))
    assert files(tmp_path / "1") == files(tmp_path / "4")


@pytest.mark.parametrize("format", ["parquet", "tar"])
@pytest.mark.parametrize("count", [0, 7, 19])
def test_an_interrupted_pack_goes_on_to_the_same_bytes(tmp_path, interrupted, format, count):
    settings = Settings(px=16, format=format, shard_bytes=6000)
    rows = [*examples(10), BROKEN, *examples(10)]
    pack(rows, tmp_path / "whole", settings)
    interrupted(count, KeyboardInterrupt())
    with pytest.raises(Interrupted, match="goes on after the last complete shard"):
        pack(rows, tmp_path / "p", settings)
    assert not list((tmp_path / "p").glob(".*"))
    kept = {n: os.stat(tmp_path / "p" / n).st_ino for n in files(tmp_path / "p") if n.endswith(format)}
    assert bool(kept) == (count > 6)
    pack(rows, tmp_path / "p", settings)
    assert files(tmp_path / "p") == files(tmp_path / "whole")
    assert {n: os.stat(tmp_path / "p" / n).st_ino for n in kept} == kept


def test_a_line_that_was_cut_off_and_a_shard_that_was_lost_are_made_again(tmp_path, interrupted):
    pack(examples(20), tmp_path / "whole")
    interrupted(19, KeyboardInterrupt())
    with pytest.raises(Interrupted):
        pack(examples(20), tmp_path / "p")
    journal = tmp_path / "p" / "packing.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    (tmp_path / "p" / "data-00001.parquet").unlink()
    (tmp_path / "p" / ".data-00009.parquet.tmp").touch()
    pack(examples(20), tmp_path / "p")
    assert files(tmp_path / "p") == files(tmp_path / "whole")


@pytest.mark.parametrize("error", [ChangedError("x has changed"), RuntimeError("bug")])
def test_an_error_leaves_nothing_under_a_final_name_that_is_not_complete(tmp_path, interrupted, error):
    interrupted(2, error)
    with pytest.raises(type(error)):
        pack(examples(20), tmp_path / "p")
    assert list(files(tmp_path / "p")) == ["packing.jsonl"]


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_a_full_disk_ends_with_its_error_and_the_next_call_goes_on(tmp_path, monkeypatch, format):
    settings = Settings(px=16, format=format, shard_bytes=6000)
    pack(examples(20), tmp_path / "whole", settings)
    write, written = shards.Hashed.write, [0]

    def full(self, data):
        written[0] += 1
        if written[0] > 30 and self._file is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Hashed, "write", full)
        with pytest.raises(CapacityError, match="No space left on device; free some space"):
            pack(examples(20), tmp_path / "p", settings)
    assert not list((tmp_path / "p").glob(".*"))
    assert "packed.json" not in files(tmp_path / "p")
    pack(examples(20), tmp_path / "p", settings)
    assert files(tmp_path / "p") == files(tmp_path / "whole")


def test_too_many_broken_examples_end_a_pack_that_goes_on_if_more_are_allowed(tmp_path):
    rows = [*examples(9), BROKEN]
    with pytest.raises(DataError, match=r"1 of 10 examples are broken.*--max-bad-share 0\.1"):
        pack(rows, tmp_path / "p", limits=Limits(quiet=True))
    assert (tmp_path / "p" / "left-out.jsonl").exists()
    assert not (tmp_path / "p" / "packed.json").exists()
    pack(rows, tmp_path / "p", limits=Limits(max_bad_share=0.1, quiet=True))
    pack(rows, tmp_path / "whole")
    assert files(tmp_path / "p") == files(tmp_path / "whole")


def test_very_many_broken_examples_end_a_pack_early(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "MANY", 3)
    rows = [BROKEN] * 5 + examples(30)
    with pytest.raises(DataError, match="3 of 35 examples are broken"):
        pack(rows, tmp_path / "p", limits=Limits(max_bad_share=0.05, quiet=True))
    assert len((tmp_path / "p" / "left-out.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("rows", [[], [BROKEN, BROKEN]])
def test_nothing_usable_is_refused(tmp_path, rows):
    with pytest.raises(DataError, match="none of"):
        pack(rows, tmp_path / "p")


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match=r"not empty \(mine.txt\) and no pack"):
        pack(examples(1), tmp_path)
    with pytest.raises(UserError, match="a file, but --out must be a folder"):
        pack(examples(1), tmp_path / "mine.txt")


@pytest.mark.parametrize("finished", [True, False])
def test_a_pack_with_other_settings_or_data_is_refused(tmp_path, interrupted, finished):
    if not finished:
        interrupted(19, KeyboardInterrupt())
    with contextlib.suppress(Interrupted):
        pack(examples(20), tmp_path / "p")
    before = files(tmp_path / "p")
    with pytest.raises(UserError, match=r"holds a pack of settings = .*now it is"):
        pack(examples(20), tmp_path / "p", Settings(px=17, shard_bytes=6000))
    with pytest.raises(UserError, match="holds a pack of examples = 20, now it is 21"):
        pack(examples(21), tmp_path / "p")
    assert files(tmp_path / "p") == before


def test_a_finished_pack_is_not_made_again(tmp_path):
    first = pack(examples(5), tmp_path / "p")
    before = {name: os.stat(tmp_path / "p" / name).st_mtime_ns for name in files(tmp_path / "p")}
    assert pack(examples(5), tmp_path / "p") == first
    assert {name: os.stat(tmp_path / "p" / name).st_mtime_ns for name in before} == before


def test_a_finished_pack_that_lost_a_shard_is_refused(tmp_path):
    pack(examples(5), tmp_path / "p")
    (tmp_path / "p" / "data-00000.parquet").unlink()
    with pytest.raises(DataError, match="is gone or has changed"):
        pack(examples(5), tmp_path / "p")


def test_two_packs_into_one_folder_are_refused(tmp_path):
    (tmp_path / "p").mkdir()
    with locked(tmp_path / "p"), pytest.raises(UserError, match="writes here"):
        pack(examples(1), tmp_path / "p")


def test_row_groups_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "GROUP_BYTES", 3000)
    pack(examples(20), tmp_path / "p", Settings(px=30))
    group = pq.ParquetFile(tmp_path / "p" / "data-00000.parquet").metadata
    assert group.num_row_groups > 3
    # tiny pictures are repeated as the smallest and the largest of their group
    assert max(group.row_group(place).total_byte_size for place in range(group.num_row_groups)) < 8000
