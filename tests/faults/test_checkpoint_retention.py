"""Which checkpoints stay: the newest, and the first of every period."""

import pytest
from saved import Kept

HOUR = 3600.0


@pytest.fixture
def saved_at(tmp_path, monkeypatch):
    """Names of the checkpoints that are left after saves at these hours, steps 1, 2, ..."""

    def save(*hours, keep=1, every=24.0):
        kept = Kept(tmp_path, keep=keep, keep_every_hours=every)
        for step, hour in enumerate(hours, 1):
            monkeypatch.setattr("beitctl.engine.saving.writing.time.time", lambda hour=hour: hour * HOUR)
            kept.save(step)
        return [int(name.removeprefix("step-")) for name in kept.names()]

    return save


def test_the_first_of_every_period_stays(saved_at):
    assert saved_at(1, 9, 23, 25, 30, 47, 50, 60) == [1, 4, 7, 8]


def test_the_newest_stay_besides(saved_at):
    assert saved_at(1, 9, 23, 25, 30, 47, keep=2) == [1, 4, 5, 6]


def test_a_period_without_a_save_keeps_nothing(saved_at):
    assert saved_at(1, 2, 100, 101) == [1, 3, 4]


def test_without_periods_only_the_newest_stay(saved_at):
    assert saved_at(1, 25, 50, every=0.0) == [3]


def test_a_clock_that_was_set_back_deletes_no_first_of_a_period(saved_at):
    assert saved_at(25, 26, 1, 2, 27) == [1, 3, 5]


def test_one_whose_manifest_is_damaged_counts_for_no_period(tmp_path):
    kept = Kept(tmp_path, keep=1, keep_every_hours=1e9).save(1)
    (tmp_path / "step-00000001" / "manifest.json").write_text("{}")
    assert kept.save(2).names() == ["step-00000002"]


def test_nothing_is_deleted_while_a_manifest_cannot_be_read(tmp_path, monkeypatch):
    kept = Kept(tmp_path, keep=1, keep_every_hours=24.0).save(1)

    def stale(path, **more):
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.read_text", stale)
        kept.save(2)
    assert kept.names() == ["step-00000001", "step-00000002"]
    assert "old checkpoints stay until the next save ([Errno 116] Stale file handle)" in kept.warnings[0]
