"""Several processes on one recipe: rank 0 decides and records, the others follow."""

import json
from pathlib import Path

import pytest
from run_stubs import Make, calls, folders, place  # noqa: F401 - the fixture works by being here

from beitctl import pipeline, recipe, runs


class Rank:
    """One of two processes: rank 0 leaves on the wire what rank 1 then takes from it."""

    world = 2
    store = None
    gone = False
    """Whether the other process has failed."""

    def __init__(self, wire, main):
        self.wire, self.main = wire, main

    def broadcast_object(self, value):
        if self.main:
            self.wire.append(json.loads(json.dumps(value)))
            return value
        return self.wire.pop(0)

    def barrier(self):
        if self.gone:
            raise RuntimeError("Connection closed by peer")


def on_two_ranks():
    wire = []
    options = pipeline.Options(Path("runs/r"))
    return [pipeline.Pipeline(recipe.load("r.toml"), options, Rank(wire, main)) for main in (True, False)]


def test_other_ranks_work_in_the_folder_that_rank_0_chose_and_record_nothing():
    first, second = on_two_ranks()
    first.stage(["make.second"])
    (folder,) = folders("make.second")
    records = {name: (folder / name).read_bytes() for name in ("events.jsonl", "manifest.json")}
    second.stage(["make.second"])
    assert second.folders == first.folders
    assert calls(folder) == ["begun", "begun"]
    assert {name: (folder / name).read_bytes() for name in records} == records
    assert runs.read(folder).manifest["world"] == 2


def test_a_run_is_not_done_if_another_rank_failed():
    first, _ = on_two_ranks()
    first.ranks.gone = True
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        first.stage(["make.second"])
    manifest = runs.read(folders("make.second")[0]).manifest
    assert (manifest["status"], manifest["exit"]) == ("failed", 1)


def test_an_error_of_rank_0_ends_the_others_with_its_exit_code_and_no_message(monkeypatch):
    first, second = on_two_ranks()
    monkeypatch.setattr(Make, "inputs_fingerprint", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.stage(["make.first"])
    with pytest.raises(pipeline.Elsewhere) as caught:
        second.stage(["make.first"])
    assert caught.value.code == 1
