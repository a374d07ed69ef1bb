"""Pictures, packed prose and captioned pictures in every step: the same samples however a run is cut."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import MODEL, Codes, Letters, training

from beitctl.api import Job
from beitctl.engine import dist
from beitctl.errors import Stopped
from beitctl.report.events import EventLog
from beitctl_plugins.sources.mixture import Mixture
from beitctl_plugins.sources.text import Text
from beitctl_plugins.sources.webdataset import WebDataset
from beitctl_plugins.stages import shared
from beitctl_plugins.stages.pretrain import ObjectiveTable, Pretrain
from beitctl_plugins.tasks.masked import MaskedImage, MaskedPair, MaskedText

STEPS = 12


def jpeg(number):
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write(folder):
    """Four tars of 9 pictures, 2 folders of pairs with 7 and 12, and 80 lines of prose."""
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(9):
                member = tarfile.TarInfo(f"p{shard}{number}.jpg")
                data = jpeg(10 * shard + number)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for name, count in (("a", 7), ("b", 12)):
        (folder / name).mkdir()
        rows = []
        for number in range(count):
            (folder / name / f"{name}{number}.jpg").write_bytes(jpeg(100 + number))
            rows.append({"image": f"{name}{number}.jpg", "caption": "abc" * (1 + number % 3)})
        (folder / name / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [f"{'xy' * (number % 5)} one. {number}. three!" for number in range(80)]
    (folder / "prose.txt").write_text("\n".join(lines))


def stage(folder):
    pairs = [{"kind": "pairs", "path": str(folder / name / "pairs.jsonl")} for name in "ab"]
    objectives = {
        "image": ObjectiveTable(task=MaskedImage(min_block=2), source=WebDataset(path=folder), samples=10),
        "text": ObjectiveTable(
            task=MaskedText(), source=Text(path=folder / "prose.txt"), samples=6, packed=True
        ),
        "pair": ObjectiveTable(
            task=MaskedPair(min_block=2), source=Mixture(sources=pairs, weights=[1, 2]), samples=8
        ),
    }
    settings = training(STEPS, workers=2, log_samples=True, micro_samples=5)
    return Pretrain(model=MODEL, train=settings, objectives=objectives)


class Ending(EventLog):
    """Asks for a polite end after some step, as a scheduler does."""

    stop = 0

    def step(self, step, of, metrics):
        super().step(step, of, metrics)
        if step == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)


def as_ranks(data, folder, stop):
    """Train on this many ranks until a step, or to the end; returns whether it was stopped."""
    shared.open_tokens = lambda job, value: Codes()
    shared.open_text = lambda job, value: Letters()
    shared.write_weights = lambda *arguments, **settings: {}
    Pretrain._measure = lambda *arguments: {}
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    ranks = dist.start()
    log = Ending(folder, stage="pretrain", recipe="r", run="1", quiet=True, active=ranks.main)
    log.stop = stop
    try:
        with log:
            stage(Path(data)).run(Job(folder, log))
    except Stopped:
        return True
    finally:
        ranks.stop()
    return False


def samples(folder):
    """Ids of the samples of every step, as the log tells them; equal where it tells them twice."""
    found = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "samples":
            assert found.setdefault(event["step"], event["ids"]) == event["ids"]
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder)
    return folder


@pytest.mark.slow
def test_a_run_that_is_cut_and_changes_its_ranks_sees_the_same_samples(on_ranks, data, tmp_path):
    assert on_ranks(as_ranks, 1, data, tmp_path / "whole", 0) == [False]
    for world, stop in ((1, 2), (2, 5), (1, 0)):
        assert on_ranks(as_ranks, world, data, tmp_path / "cut", stop) == [bool(stop)] * world
    whole, cut = samples(tmp_path / "whole"), samples(tmp_path / "cut")
    assert list(whole) == list(range(1, STEPS + 1))
    assert cut == whole
    assert {len(ids) for ids in whole.values()} == {24}
    first = [id for step in (1, 2, 3) for id in whole[step] if id.startswith("image/")]
    assert len(set(first)) == 30  # of 36: all stops lie inside an epoch
    assert len(set(first) | {id for id in whole[4] if id.startswith("image/")}) == 36
