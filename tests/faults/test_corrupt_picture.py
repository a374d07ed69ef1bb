"""Fault 8: a picture that cannot be decoded is replaced, always by the same one."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small import MODEL, Given, Record, tools, training

from beitctl.api import Example, Job
from beitctl.data.loader import Stream
from beitctl.engine.dist import start
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.engine.shard import sharded
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages.shared import fit
from beitctl_plugins.tasks.masked import MaskedImage

pytestmark = pytest.mark.fault(8)


def jpeg(number, part=1.0):
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()[: int(part * stream.tell())]


def samples_as_rank(folder):
    """Train over ten pictures of which the fourth is cut off; gives the samples and the warnings."""
    ranks, task, folder = start(), MaskedImage(min_block=2), Path(folder)
    examples = tuple(Example(str(number), jpeg(number, 0.5 if number == 3 else 1)) for number in range(10))
    stream = Stream("image", task, Given(examples=examples).open(), 5, tools())
    learner = sharded(
        lambda: MultiwayLearner(Multiway(MODEL), [Objective("image", task)], {"image": tools()}),
        ranks, "fp32", lambda name, shape: initial(name, shape, MODEL, 0),
    )  # fmt: skip
    log = Record()
    fit(learner, [stream], training(4, log_samples=True), ranks, Job(folder, log))
    ranks.stop()
    return log.said["samples"], log.said["warning"]


def test_training_goes_on_with_a_substitute_and_says_so(on_ranks, tmp_path):
    found = []
    for name in "ab":
        (tmp_path / name).mkdir()
        ((samples, warnings),) = on_ranks(samples_as_rank, 1, tmp_path / name)
        found.append(samples)
        ((code, text, _),) = warnings
        assert (code, text.startswith("skipped image/3: ")) == ("W301", True)
        (row,) = map(json.loads, (tmp_path / name / "quarantine.jsonl").read_text().splitlines())
        assert row["id"] == "image/3"
    assert found[0] == found[1]
    assert [len(ids) for _, ids in found[0]] == [5, 5, 5, 5]
    assert "image/3" not in {id for _, ids in found[0] for id in ids}
