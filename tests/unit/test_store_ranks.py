"""One store, whatever the number of processes."""

from pathlib import Path

import pytest
from coding import Noise, Tiny, files, stage, tokenize

from beitctl.data.lock import locked
from beitctl.engine.dist import start
from beitctl.errors import UserError


def written_by_ranks(folder):
    ranks = start()
    found = tokenize(Path(folder))
    ranks.stop()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    tokenize(folder)
    return files(folder)


@pytest.mark.parametrize("world", [2, 4])
def test_every_number_of_ranks_writes_the_same_bytes(on_ranks, tmp_path, alone, world):
    first, *others = on_ranks(written_by_ranks, world, tmp_path / "run")
    assert files(tmp_path / "run") == alone
    assert len(alone) == 6 + 2  # shards, store.json and patches.npy
    assert (first["pictures"], first["skipped"]) == (10, 1)
    assert others == [{}] * (world - 1)


@pytest.mark.parametrize("workers", [1, 5])
def test_the_number_of_threads_changes_nothing(tmp_path, alone, workers):
    tokenize(tmp_path, stage(workers=workers))
    assert files(tmp_path) == alone


def test_a_stopped_store_goes_on_on_another_number_of_ranks(on_ranks, tmp_path, alone):
    tokenize(tmp_path / "run")
    for name in ("store.json", "tokens-00001.parquet", "tokens-00002.parquet", "tokens-00005.parquet"):
        (tmp_path / "run" / "tokens" / name).unlink()
    on_ranks(written_by_ranks, 2, tmp_path / "run")
    assert files(tmp_path / "run") == alone


def refused_on_ranks(folder, other):
    """What every rank is told when the store is another process's, or of another tokenizer."""
    ranks = start()
    try:
        tokenize(Path(folder), tokenizer=Tiny(1) if other else None)
    except UserError as error:
        return str(error)
    finally:
        ranks.stop()


def test_a_second_job_is_refused_on_all_its_ranks(on_ranks, tmp_path):
    (tmp_path / "tokens").mkdir()
    with locked(tmp_path / "tokens"):
        first, second = on_ranks(refused_on_ranks, 2, tmp_path, False)
    assert first == second
    assert "writes here; wait for it" in first


def test_another_tokenizer_is_refused_on_all_ranks(on_ranks, tmp_path):
    tokenize(tmp_path)
    first, second = on_ranks(refused_on_ranks, 2, tmp_path, True)
    assert first == second
    assert 'tokenizer was "tiny-0", is "tiny-1"' in first


def test_many_pictures_in_one_shard_need_no_more_than_the_last_batch(tmp_path):
    made = stage(Noise(count=3), Noise(count=50, start=3), shard_pictures=4096)
    assert tokenize(tmp_path, made)["pictures"] == 53
