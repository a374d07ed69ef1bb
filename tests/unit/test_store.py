import errno
import json
import os
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from beitctl.data import arrays, store_format
from beitctl.data.images import Crop, random_crop
from beitctl.data.order import generator
from beitctl.data.store import TokenStore, TokenStoreWriter, picture_hash
from beitctl.data.store_format import PIXELS, Row
from beitctl.errors import CapacityError, DataError, UserError

META = {
    "tokenizer": "t1", "codes": 300, "grid": 3, "image_px": 48, "views": 2, "source": "s1",
    "crop_scale": (0.2, 1.0), "jitter": 0.4, "seed": 0, "precision": "fp32", "batch": 64,
}  # fmt: skip


def shard(number, pictures=4):
    draw = generator("shard", number)
    ids = [f"{number}/ü{i}.jpg" for i in range(pictures)]
    crops = [[random_crop(90, 70, draw, jitter=0.4) for _ in range(2)] for _ in ids]
    rows = [Row(id, picture_hash(id.encode()), views) for id, views in zip(ids, crops, strict=True)]
    return rows, draw.integers(0, 300, (pictures, 2, 9)).astype(np.uint16)


def write(folder, numbers=(0, 1), meta=META, finish=True, made=None):
    writer = TokenStoreWriter(folder, meta)
    for number in numbers:
        writer.write_shard(number, *shard(number), skipped=[f"{number}/bad.jpg: cut off"])
    if finish:
        writer.finish(writer.shards(len(numbers)), made)
    return writer


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "store")
    return tmp_path / "store"


def flip_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_codes_and_crops_come_back_as_written(store):
    opened = TokenStore.open(store)
    for number in (0, 1):
        rows, codes = shard(number)
        for i, row in enumerate(rows):
            for view in (0, 1):
                crop, found = opened.view(row.id, view)
                assert crop == row.crops[view]
                assert (found == codes[i, view]).all()


def test_codes_are_int64_and_crops_plain_numbers(store):
    crop, codes = TokenStore.open(store).view("0/ü0.jpg", 0)
    assert codes.dtype == np.int64
    assert [type(value) for value in vars(crop).values()] == [int] * 4 + [bool] + [float] * 3


def test_the_store_says_what_made_it(store):
    opened = TokenStore.open(store)
    assert {key: getattr(opened, key) for key in META} == META
    assert list(opened.ids) == [row.id for row in shard(0)[0] + shard(1)[0]]


def test_the_fingerprint_of_every_picture_comes_back(store):
    opened = TokenStore.open(store)
    assert {id: opened.picture(id) for id in opened.ids} == {
        id: picture_hash(id.encode()) for id in opened.ids
    }


@pytest.fixture
def large(store, monkeypatch, tmp_path):
    """A store that is too large to be read into memory."""
    monkeypatch.setattr(store_format, "SMALL_BYTES", 0)
    monkeypatch.setenv("BEITCTL_CACHE", str(tmp_path / "cache"))
    return store


def test_a_large_store_is_memory_mapped_and_holds_the_same(large, monkeypatch):
    monkeypatch.setattr(arrays, "SMALL_BYTES", 0)
    mapped = TokenStore.open(large)
    assert isinstance(mapped._codes, np.memmap)
    for id in (row.id for number in (0, 1) for row in shard(number)[0]):
        rows, codes = next(shard(n) for n in (0, 1) if id in [row.id for row in shard(n)[0]])
        place = [row.id for row in rows].index(id)
        for view in range(2):
            crop, found = mapped.view(id, view)
            assert crop == rows[place].crops[view]
            assert (found == codes[place, view]).all()
        assert mapped.picture(id) == rows[place].picture


def test_a_large_store_is_verified_again_when_a_shard_has_changed(large):
    TokenStore.open(large)
    path = large / "tokens-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"tokens-00001\.parquet: its checksum is not the one"):
        TokenStore.open(large)


def test_a_large_store_without_a_shard_is_refused(large):
    TokenStore.open(large)
    (large / "tokens-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"tokens-00001\.parquet: cannot be read \(No such file"):
        TokenStore.open(large)


def test_a_store_knows_which_pictures_it_holds(store):
    opened = TokenStore.open(store)
    assert ("1/ü3.jpg" in opened, "1/ü4.jpg" in opened) == (True, False)


def test_usage_counts_every_code_of_every_view(store):
    codes = np.concatenate([shard(number)[1].ravel() for number in (0, 1)])
    assert (TokenStore.open(store).usage() == np.bincount(codes, minlength=300)).all()


def test_who_made_it_stands_apart_from_what_it_is(tmp_path):
    records = []
    for name in ("a", "b"):
        write(tmp_path / name, made={"host": name})
        records.append(json.loads((tmp_path / name / "store.json").read_text()))
    assert [record.pop("made") for record in records] == [{"host": "a"}, {"host": "b"}]
    assert records[0] == records[1]
    shards = [[(tmp_path / name / f"tokens-0000{i}.parquet").read_bytes() for i in (0, 1)] for name in "ab"]
    assert shards[0] == shards[1]


def test_store_json_lists_pictures_shards_and_what_was_skipped(store):
    record = json.loads((store / "store.json").read_text())
    assert (record["format"], record["pictures"]) == (2, 8)
    assert record["skipped"] == ["0/bad.jpg: cut off", "1/bad.jpg: cut off"]
    for name, entry in record["shards"].items():
        assert entry["rows"] == 4
        assert entry["bytes"] == os.path.getsize(store / name)


def test_no_draft_is_left_behind(store):
    assert sorted(p.name for p in store.iterdir()) == [
        "store.json",
        "tokens-00000.parquet",
        "tokens-00001.parquet",
    ]


def test_a_shard_of_nothing_but_unreadable_pictures_does_no_harm(tmp_path):
    writer = write(tmp_path, [0], finish=False)
    writer.write_shard(1, [], np.zeros((0, 2, 9), np.uint16), skipped=["a", "b"])
    writer.finish(writer.shards(2))
    opened = TokenStore.open(tmp_path)
    assert list(opened.ids) == [row.id for row in shard(0)[0]]
    assert opened.skipped == ["0/bad.jpg: cut off", "a", "b"]


def test_a_store_without_a_picture_is_refused(tmp_path):
    writer = TokenStoreWriter(tmp_path, META)
    writer.write_shard(0, [], np.zeros((0, 2, 9), np.uint16))
    writer.finish(writer.shards(1))
    with pytest.raises(DataError, match="the token store holds no picture; check the source"):
        TokenStore.open(tmp_path)


def test_an_unfinished_store_is_refused(tmp_path):
    write(tmp_path, finish=False)
    with pytest.raises(
        DataError, match=r"no complete token store \(it has no store.json\); run tokenize-images again"
    ):
        TokenStore.open(tmp_path)


def test_a_cut_off_shard_is_refused(store):
    path = store / "tokens-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"tokens-00001.parquet: has \d+ bytes, but store.json says \d+"):
        TokenStore.open(store)


def test_a_missing_shard_is_refused(store):
    (store / "tokens-00000.parquet").unlink()
    with pytest.raises(
        DataError, match=r"tokens-00000.parquet: cannot be read \(No such file or directory\)"
    ):
        TokenStore.open(store)


@pytest.mark.parametrize("place", [0, 100, 1000, -1])
def test_a_flipped_byte_is_found(store, place):
    flip_byte(store / "tokens-00000.parquet", place)
    with pytest.raises(DataError, match=r"tokens-00000.parquet: its checksum is not the one in store.json"):
        TokenStore.open(store)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 3}'])
def test_a_damaged_or_foreign_store_json_is_refused(store, text):
    (store / "store.json").write_text(text)
    with pytest.raises(DataError, match=r"store.json: (cannot be read|not a token store of format 2)"):
        TokenStore.open(store)


def test_an_old_store_is_refused_by_its_format(store):
    record = json.loads((store / "store.json").read_text()) | {"format": 1}
    (store / "store.json").write_text(json.dumps(record))
    expected = "not a token store of format 2, but of format 1; run tokenize-images again"
    with pytest.raises(DataError, match=expected):
        TokenStore.open(store)


def test_a_store_of_pixels_that_are_made_otherwise_is_refused(store, monkeypatch):
    monkeypatch.setitem(PIXELS, "decoding", 3)
    with pytest.raises(DataError, match="made with decoding = 2, but this run needs 3"):
        TokenStore.open(store)


def test_a_store_json_that_leaves_something_out_is_refused(store):
    record = json.loads((store / "store.json").read_text())
    del record["jitter"], record["shards"]
    (store / "store.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"store.json: does not say jitter, shards"):
        TokenStore.open(store)


@pytest.mark.parametrize(
    ("key", "other"), [("tokenizer", "t2"), ("grid", 14), ("codes", 8192), ("image_px", 224)]
)
def test_a_store_of_another_kind_is_refused_by_what_differs(store, key, other):
    expected = rf"made with {key} = {META[key]!r}, but this run needs {other!r}; run tokenize-images again"
    with pytest.raises(DataError, match=expected):
        TokenStore.open(store, expect={**META, key: other})


def test_a_store_of_the_expected_kind_opens(store):
    assert TokenStore.open(store, expect=META).views == 2


def test_an_unknown_picture_is_named(store):
    with pytest.raises(
        DataError, match=r"no codes of picture 'new.jpg'; run tokenize-images again on the source"
    ):
        TokenStore.open(store).view("new.jpg", 0)


@pytest.mark.parametrize("number", [-1, 2])
def test_an_unknown_view_is_refused(store, number):
    with pytest.raises(ValueError, match=f"view {number} of 2"):
        TokenStore.open(store).view("0/ü0.jpg", number)


def test_writing_goes_on_where_it_stopped(tmp_path):
    write(tmp_path, [0, 2], finish=False)
    again = TokenStoreWriter(tmp_path, META)
    assert again.done(range(4)) == {0, 2}
    again.write_shard(1, *shard(1))
    again.finish(again.shards(3))
    assert len(TokenStore.open(tmp_path).ids) == 12


def test_shards_of_other_processes_are_finished_too(tmp_path):
    first, second = TokenStoreWriter(tmp_path, META), TokenStoreWriter(tmp_path, META)
    first.write_shard(0, *shard(0))
    assert first.done(range(2)) == {0}
    second.write_shard(1, *shard(1))
    first.finish(first.shards(2))
    assert len(TokenStore.open(tmp_path).ids) == 8


@pytest.mark.parametrize("cut", [0, 4, 500])
def test_a_damaged_shard_is_not_done(tmp_path, cut):
    writer = write(tmp_path, finish=False)
    path = tmp_path / "tokens-00000.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    assert writer.done(range(2)) == {1}


def test_a_shard_with_a_flipped_byte_is_not_done(tmp_path):
    writer = write(tmp_path, finish=False)
    path = tmp_path / "tokens-00001.parquet"
    pages = pq.ParquetFile(path).metadata.row_group(0).column(10)  # the codes
    flip_byte(
        path, (pages.dictionary_page_offset or pages.data_page_offset) + pages.total_compressed_size - 1
    )
    assert writer.done(range(2)) == {0}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer": "t2"}, 'tokenizer was "t1", is "t2"'),
        ({"jitter": 0.0, "seed": 5}, "jitter was 0.4, is 0.0, seed was 0, is 5"),
        ({"crop_scale": (0.08, 1.0)}, r"crop_scale was \[0.2, 1.0\], is \[0.08, 1.0\]"),
        ({"shard_pictures": 4}, "shard_pictures was null, is 4"),
    ],
)
def test_a_store_goes_on_with_its_own_settings_alone_and_says_which_differ(tmp_path, change, told):
    write(tmp_path, finish=False)
    writer = TokenStoreWriter(tmp_path, META | change)
    with pytest.raises(UserError, match=rf"store with other settings: {told}; choose another folder"):
        writer.done(range(2))
    assert TokenStoreWriter(tmp_path, META).done(range(2)) == {0, 1}


def test_an_old_unfinished_store_does_not_go_on(tmp_path):
    writer = write(tmp_path, finish=False)
    table = pq.read_table(tmp_path / "tokens-00000.parquet")
    old = json.dumps({"meta": {key: META[key] for key in ("tokenizer", "codes", "grid")}, "skipped": []})
    pq.write_table(table.replace_schema_metadata({"beitctl": old}), tmp_path / "tokens-00000.parquet")
    with pytest.raises(UserError, match="other settings: format was 1, is 2"):
        writer.done([0])


def test_clearing_removes_shards_drafts_and_the_mark_of_completeness_and_nothing_else(store):
    for name in ("tokens-00007.parquet.tmp", "notes.txt"):
        (store / name).write_text("")
    TokenStoreWriter(store, META).clear()
    assert [path.name for path in store.iterdir()] == ["notes.txt"]


def test_drafts_and_foreign_files_are_not_done(tmp_path):
    (tmp_path / "tokens-00000.parquet.tmp").write_bytes(b"half")
    (tmp_path / "tokens-x.parquet").write_bytes(b"PAR1")
    assert TokenStoreWriter(tmp_path, META).done(range(2)) == set()


def test_a_gap_keeps_the_store_from_being_finished(tmp_path):
    writer = write(tmp_path, [0, 2], finish=False)
    with pytest.raises(
        DataError, match=r"tokens-00001.parquet: missing or damaged; run tokenize-images again"
    ):
        writer.finish(writer.shards(3))
    assert not (tmp_path / "store.json").exists()


def test_a_missing_last_shard_keeps_the_store_from_being_finished(tmp_path):
    writer = write(tmp_path, [0, 1], finish=False)
    with pytest.raises(DataError, match=r"tokens-00002.parquet: missing or damaged"):
        writer.finish(writer.shards(3))


def test_a_picture_in_two_shards_is_refused(tmp_path):
    writer = write(tmp_path, [0], finish=False)
    writer.write_shard(1, *shard(0))
    with pytest.raises(DataError, match=r"'0/ü0.jpg' is in it twice; ids of a source must be unique"):
        writer.finish(writer.shards(2))


def test_a_full_disk_is_a_capacity_error_and_harms_no_earlier_shard(tmp_path, monkeypatch):
    writer = write(tmp_path, [0], finish=False)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match=r"tokens-00001.parquet: the disk is full; free 0.0 MiB"):
        writer.write_shard(1, *shard(1))
    assert writer.done(range(2)) == {0}
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-00000.parquet"]


def test_a_disk_that_is_really_full_is_told_apart_and_the_store_goes_on(tmp_path):
    writer = write(tmp_path / "store", [0], finish=False)
    (tmp_path / "store" / "tokens-00001.parquet.tmp").symlink_to("/dev/full")
    with pytest.raises(CapacityError, match=r"tokens-00001.parquet: the disk is full"):
        writer.write_shard(1, *shard(1))
    writer.write_shard(1, *shard(1))
    assert len(writer.shards(2)) == 2


def test_a_read_only_folder_is_a_user_error(tmp_path, monkeypatch):
    writer = write(tmp_path, [0], finish=False)

    def refused(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\); choose another --out"):
        writer.finish(writer.shards(1))


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/store: cannot be made \(Not a directory\); choose another --out"
    ):
        TokenStoreWriter(tmp_path / "file" / "store", META)


def test_a_store_must_say_what_made_it(tmp_path):
    with pytest.raises(ValueError, match="a token store needs grid, seed"):
        TokenStoreWriter(tmp_path, {key: META[key] for key in META if key not in ("grid", "seed")})


def test_more_codes_than_16_bits_tell_apart_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds up to 65536 codes, the tokenizer has 65537"):
        TokenStoreWriter(tmp_path, META | {"codes": 65537})


def test_codes_of_a_wrong_shape_are_refused(tmp_path):
    rows, codes = shard(0)
    with pytest.raises(
        ValueError, match=r"codes of shape \(4, 2, 8\) with 4 lists of crops, expected \(4, 2, 9\)"
    ):
        TokenStoreWriter(tmp_path, META).write_shard(0, rows, codes[:, :, :8])


def test_a_missing_crop_is_refused(tmp_path):
    rows, codes = shard(0)
    rows[0] = replace(rows[0], crops=rows[0].crops[:1])
    with pytest.raises(ValueError, match="with 4 lists of crops"):
        TokenStoreWriter(tmp_path, META).write_shard(0, rows, codes)


def test_a_code_outside_of_the_codebook_is_refused(tmp_path):
    rows, codes = shard(0)
    codes[1, 1, 3] = 300
    with pytest.raises(ValueError, match="code 300 in a codebook of 300"):
        TokenStoreWriter(tmp_path, META).write_shard(0, rows, codes)


def test_codes_above_the_range_of_int16_survive(tmp_path):
    writer = TokenStoreWriter(tmp_path, META | {"codes": 65536})
    row = Row("a", bytes(16), [Crop(0, 0, 5, 5)] * 2)
    writer.write_shard(0, [row], np.full((1, 2, 9), 65535, np.uint16))
    writer.finish(writer.shards(1))
    assert TokenStore.open(tmp_path).view("a", 1)[1].tolist() == [65535] * 9
