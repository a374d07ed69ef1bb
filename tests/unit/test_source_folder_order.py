import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import fill, ids

from beitctl_plugins.sources import opened as sources
from beitctl_plugins.sources.image_folder import ImageFolder

NAMES = ["a/x.png", "a-b/x.png", "a.png", "a/b/z.png", "ab.png", "a b/y.png", "a0/x.png", "a!.png", "A.png"]


def test_examples_come_sorted_by_their_full_names(tmp_path):
    fill(tmp_path, *NAMES, "ü/é.png", "ü-.png", "\U0001f600.png", "￿.png")
    found = ids(ImageFolder(path=tmp_path).open())
    assert found == sorted(found)
    assert len(found) == len(NAMES) + 4


@settings(max_examples=60, deadline=None)
@given(st.sets(st.lists(st.text("a-./0é ", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join)))
def test_any_names_come_sorted(tmp_path_factory, names):
    root, made = tmp_path_factory.mktemp("order"), set()
    for name in names:
        path = root / os.path.normpath(f"./{name.strip('/')}.png").lstrip("/.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        except OSError:
            continue
        relative = path.relative_to(root).as_posix()
        if not any(part.startswith(".") for part in relative.split("/")) and relative.endswith(".png"):
            made.add(relative)
    if made:
        assert ids(ImageFolder(path=root).open()) == sorted(made)


def test_problems_are_listed_in_the_same_order_everywhere(tmp_path, monkeypatch):
    fill(tmp_path, "z/1.png", "good.png")
    for name in ("c.png", "a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    assert ImageFolder(path=tmp_path).open().problems == [f"{n}.png: empty file" for n in "abc"]


@pytest.mark.parametrize("flat", [True, False])
def test_listing_needs_little_more_memory_than_the_names(tmp_path, monkeypatch, flat):
    count = 5_000
    for number in range(count):
        folder = tmp_path if flat else tmp_path / f"{number % 100:03d}"
        folder.mkdir(exist_ok=True)
        (folder / f"picture_{number:08d}.png").touch()
        os.truncate(folder / f"picture_{number:08d}.png", 1)
    monkeypatch.setattr(sources, "SMALL_BYTES", 0)  # as of so many pictures
    tracemalloc.start()
    opened = ImageFolder(path=tmp_path).open()
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(opened) == count
    assert isinstance(opened.rows.ends, np.ndarray)
    assert size < 50 * count
    assert peak < (250 if flat else 80) * count
