import pytest

from beitctl.inspecting.journal import Entry, Journal

LEFT = [{"id": "x", "reason": "broken"}]


def test_broken_examples_are_counted_as_they_come(tmp_path):
    journal = Journal(tmp_path, {"settings": {}})
    assert journal.bad == 0
    journal.add(Entry(3, left_out=LEFT * 2))
    journal.add(Entry(7, left_out=LEFT))
    assert journal.bad == 3 == len(journal.left_out)


def test_an_interrupted_pack_goes_on_counting(tmp_path):
    Journal(tmp_path, {}).add(Entry(3, left_out=LEFT * 2))
    journal = Journal(tmp_path, {})
    assert journal.bad == 2
    journal.add(Entry(5, left_out=LEFT))
    assert journal.bad == 3


def test_counting_looks_at_no_entry_again(tmp_path):
    journal = Journal(tmp_path, {})
    journal.add(Entry(3, left_out=LEFT))
    journal.entries = None
    assert journal.bad == 1


@pytest.mark.parametrize("count", [0, 1])
def test_entries_without_a_shard_are_no_shards(tmp_path, count):
    journal = Journal(tmp_path, {})
    journal.add(Entry(3, left_out=LEFT * count))
    assert journal.shards == []
