"""Classes of examples, without their pictures where the source can."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import png, tar

from beitctl.api import Example
from beitctl.data.labels import classes, labels
from beitctl.errors import ChangedError, DataError
from beitctl_plugins.sources.mixture import Mixed
from beitctl_plugins.sources.opened import Opened
from beitctl_plugins.sources.parquet import Parquet
from beitctl_plugins.sources.webdataset import WebDataset


def plain(*found):
    def example(row):
        if isinstance(row, Exception):
            raise row
        return Example(str(row), label=row)

    return Opened(found, example, "x")


def test_classes_are_sorted_and_come_once():
    assert classes(plain("b", None, "a", "b")) == ("a", "b")


def test_an_example_that_cannot_be_used_has_no_class():
    assert list(labels(plain("a", DataError("broken"), "b"))) == ["a", None, "b"]


def test_changed_data_are_no_broken_example():
    with pytest.raises(ChangedError):
        list(labels(plain("a", ChangedError("gone"))))


def test_classes_of_tars_are_read_without_the_pictures(tmp_path, monkeypatch):
    kinds = (("png", png()), ("cls", b"c"))
    tar(
        tmp_path / "0.tar",
        [
            (f"{n}.{kind}", data * (n + 1) if kind == "cls" else data)
            for n in range(3)
            for kind, data in kinds
        ],
    )
    opened = WebDataset(path=tmp_path, label="cls").open()
    monkeypatch.setattr(type(opened), "__getitem__", lambda self, index: pytest.fail("a picture was read"))
    assert classes(opened) == ("c", "cc", "ccc")
    assert classes(Mixed([opened, opened])) == ("c", "cc", "ccc")


def test_classes_of_parquet_are_read_without_the_pictures(tmp_path, monkeypatch):
    rows = [{"image": png(), "class": name} for name in "bab"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=2)
    opened = Parquet(path=tmp_path, label="class").open()
    monkeypatch.setattr(type(opened), "__getitem__", lambda self, index: pytest.fail("a picture was read"))
    assert list(labels(opened)) == ["b", "a", "b"]
