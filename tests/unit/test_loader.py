"""Steps to batches: which samples, whatever the ranks and passes; substitutes for what cannot be read."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beitctl.api import Example, Item, Tools
from beitctl.config import ModelConfig
from beitctl.data.loader import Place, StepData, Stream, drawn, prepared
from beitctl.errors import DataError

MODEL = ModelConfig(
    layers=2, width=8, heads=2, ffn=8, image_px=8, patch_px=4, vocabulary=50, text_tokens=8, drop_path=0.2
)


@dataclass
class Numbers:
    """A source of n numbered examples, some of them unreadable."""

    n: int
    bad: tuple = ()
    fingerprint: str = "x"

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index in self.bad:
            raise DataError(f"number {index} is broken")
        return Example(str(index))


class Words:
    layout = "text"

    def prepare(self, example, draw, tools):
        ids = draw.integers(4, 50, size=int(draw.integers(2, 8)))
        return Item(text=ids, text_targets=np.where(np.arange(len(ids)) == 1, ids, -1))


class Both:
    layout = "pair"

    def prepare(self, example, draw, tools):
        image = draw.integers(0, 256, size=(3, 8, 8)).astype(np.uint8)
        ids = draw.integers(4, 50, size=3)
        return Item(
            image=image, text=ids, patch_targets=np.array([-1, 5, -1, 7]), text_targets=np.array([-1, -1, 9])
        )


def streams(n=10, samples=6):
    return [
        Stream("text", Words(), Numbers(n), samples, Tools(MODEL)),
        Stream("pair", Both(), Numbers(n + 3), samples // 2, Tools(MODEL)),
    ]


def tokens_of(batches):
    """What a step holds, independent of how it is cut into passes."""
    found = []
    for batch in batches:
        lengths = [*batch.plan.pair_lengths, *batch.plan.text_lengths]
        texts = torch.split(batch.ids, lengths)
        keep = batch.keep
        pairs = batch.plan.pairs
        names = [s for s in batch.samples if s.startswith("pair")] + [
            s for s in batch.samples if s.startswith("text")
        ]
        for index, (name, text) in enumerate(zip(names, texts, strict=True)):
            pixels = int(batch.pixels[index].sum()) if index < pairs else 0
            found.append((name, text.tolist(), pixels, round(float(keep[..., index].sum()), 4)))
    return sorted(found)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 20), st.integers(0, 3))
def test_a_step_holds_the_same_samples_on_any_ranks_and_passes(world, micro, step, seed):
    whole = StepData(streams(), MODEL, seed, Place())[step]
    parts = [
        batch
        for rank in range(world)
        for batch in StepData(streams(), MODEL, seed, Place(rank, world, micro))[step]
    ]
    assert tokens_of(parts) == tokens_of(whole)


def test_every_rank_makes_the_same_number_of_passes():
    made = [len(StepData(streams(), MODEL, 0, Place(rank, 4, 2))[0]) for rank in range(4)]
    assert made == [2, 2, 2, 2]


def test_an_epoch_holds_every_example_once():
    data = StepData(streams(n=12, samples=6)[:1], MODEL, 0, Place())
    seen = [sample for step in range(2) for batch in data[step] for sample in batch.samples]
    assert sorted(seen) == sorted(f"text/{i}" for i in range(12))


def test_targets_point_at_their_rows():
    (batch,) = StepData(streams(), MODEL, 0, Place())[0]
    group = batch.groups["pair"]
    plan = batch.plan
    assert group.patch_targets.tolist() == [5, 7] * 3
    assert group.patch_rows.tolist() == [k * 5 + 1 + p for k in range(3) for p in (1, 3)]
    assert group.text_rows.tolist() == [plan.cuts[1] + 3 * k + 2 for k in range(3)]
    words = batch.groups["text"]
    assert torch.equal(batch.ids[words.text_rows - plan.cuts[1]], words.text_targets)


def test_counts_say_how_much_is_predicted():
    (batch,) = StepData(streams(), MODEL, 0, Place())[0]
    assert batch.groups["pair"].counts == {"patch": 6, "text": 3, "sample": 3}


def test_an_unreadable_example_is_replaced_and_named():
    stream = Stream("text", Words(), Numbers(10, bad=(3,)), 10, Tools(MODEL))
    found = [drawn(stream, position, 0) for position in range(10)]
    assert [bad for _, _, bad in found if bad] == [[("text[3]", "number 3 is broken")]]
    assert all(id != "3" for id, _, _ in found)
    assert [id for id, _, _ in found] == [drawn(stream, position, 0)[0] for position in range(10)]


def test_a_source_of_unreadable_examples_ends_the_job():
    stream = Stream("text", Words(), Numbers(4, bad=(0, 1, 2, 3)), 1, Tools(MODEL))
    with pytest.raises(DataError, match=r"16 examples of 'text' in a row cannot be used: number . is broken"):
        drawn(stream, 0, 0)


def test_evaluation_leaves_unreadable_examples_out():
    stream = Stream("text", Words(), Numbers(5, bad=(2,)), 1, Tools(MODEL))
    assert [example.id for example, _ in prepared(stream, 0)] == ["0", "1", "3", "4"]
