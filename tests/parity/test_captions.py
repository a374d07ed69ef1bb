"""Beam search gives the token sequences of the official decoder, on small random weights.

Reference: captions.npz in shared/reference/beit3; its README says how the keys are made.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import beitctl
from beitctl.model.decoding import Search, captions

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "beit3"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)
START, PAD, END, MASK, LONGEST = 0, 1, 2, 319, 10


def keys():
    if not FOLDER.is_dir():
        return []
    with np.load(FOLDER / "captions.npz") as stored:
        return sorted(stored)


@pytest.mark.parametrize("key", keys())
def test_the_official_sequences_are_found(key):
    bias, beams, penalty = re.fullmatch(r"end_bias(.+)\.beams(\d+)\.length_penalty(.+)", key).groups()
    model = beitctl.load_model(FOLDER / "beit3_captioning.pth", heads=4)
    with torch.no_grad():
        model.heads["captions"].bias[END] += float(bias)
    with np.load(FOLDER / "inputs.npz") as stored:
        pixels = torch.from_numpy(stored["images"])
    with np.load(FOLDER / "captions.npz") as stored:
        official = stored[key]
    search = Search(START, END, MASK, LONGEST, int(beams), float(penalty))
    found = captions(model.model, model.heads["captions"], pixels, search)
    rows = [
        [START, *words, MASK, END] for words, _ in found
    ]  # the released code keeps a mask in the last place
    assert [row + [PAD] * (LONGEST - len(row)) for row in rows] == official.tolist()


def test_there_is_something_to_compare_with():
    assert len(keys()) >= 4
