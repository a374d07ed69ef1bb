"""Steps to batches: which samples, whatever the ranks and passes; substitutes for what cannot be read."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from beitctl.api import Example, Item, Tools
from beitctl.config import ModelConfig
from beitctl.data.loader import Place, StepData, Stream, drawn, prepared
from beitctl.data.workers import steps
from beitctl.errors import ChangedError, DataError

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
@given(
    strategies.integers(1, 5),
    strategies.integers(0, 4),
    strategies.integers(0, 20),
    strategies.integers(0, 3),
)
def test_a_step_holds_the_same_samples_on_any_ranks_and_passes(world, micro, step, seed):
    whole = StepData(streams(), MODEL, seed, Place())[step]
    parts = [
        batch
        for rank in range(world)
        for batch in StepData(streams(), MODEL, seed, Place(rank, world, micro))[step]
    ]
    assert tokens_of(parts) == tokens_of(whole)


@dataclass
class Sharded(Numbers):
    """Numbers in shards whose texts have known lengths."""

    shards: tuple = ()
    window: int = 0
    lengths: tuple = ()


@dataclass
class Mixture:
    """Several sources as one, each with its own epochs."""

    parts: list
    fingerprint: str = "x"

    def __len__(self):
        return sum(len(part) for _, part in self.parts)

    def __getitem__(self, index):
        for number, (_, part) in enumerate(self.parts):
            if index < len(part):
                return Example(f"{number}.{index}")
            index -= len(part)
        raise IndexError


@strategies.composite
def sources(draw):
    """Any source: plain, in shards, with lengths, or a mixture."""

    def one():
        shards = draw(strategies.lists(strategies.integers(1, 9), min_size=1, max_size=6))
        count = sum(shards)
        lengths = tuple(draw(strategies.integers(0, 50)) for _ in range(count))
        kind = draw(strategies.sampled_from(["plain", "shards", "lengths"]))
        if kind == "plain":
            return Numbers(count)
        window = draw(strategies.integers(0, 7))
        return Sharded(count, (), "x", tuple(shards), window, lengths if kind == "lengths" else None)

    if draw(strategies.booleans()):
        return one()
    return Mixture([(draw(strategies.floats(0.1, 9)), one()) for _ in range(draw(strategies.integers(1, 3)))])


def of_step(streams, seed, world, step, micro=0):
    """Samples of a step, rank by rank."""
    return [
        [
            sample
            for batch in StepData(streams, MODEL, seed, Place(rank, world, micro))[step]
            for sample in batch.samples
        ]
        for rank in range(world)
    ]


@settings(max_examples=60, deadline=None)
@given(
    text=sources(),
    pair=sources(),
    samples=strategies.integers(1, 40),
    seed=strategies.integers(0, 2**31),
    micro=strategies.integers(0, 4),
    worlds=strategies.lists(strategies.integers(1, 16), min_size=1, max_size=4),
    first=strategies.integers(0, 200),
)
def test_any_source_gives_the_same_steps_however_often_the_ranks_change(
    text, pair, samples, seed, micro, worlds, first
):
    def made():
        return [
            Stream("text", Words(), text, samples, Tools(MODEL)),
            Stream("pair", Both(), pair, max(1, samples // 2), Tools(MODEL)),
        ]

    for step, world in enumerate(worlds, first):  # each step on other ranks, in a process that knows nothing
        ranks = of_step(made(), seed, world, step, micro)
        (whole,) = of_step(made(), seed, 1, step)
        assert sorted(sample for rank in ranks for sample in rank) == sorted(whole)
        passes = StepData(made(), MODEL, seed, Place(0, world, micro)).passes
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 2 * passes  # one of each stream in each pass


@settings(max_examples=60, deadline=None)
@given(
    source=sources(),
    samples=strategies.integers(1, 20),
    seed=strategies.integers(0, 99),
    world=strategies.integers(1, 16),
)
def test_any_source_gives_every_example_once_an_epoch(source, samples, seed, world):
    stream = Stream("text", Words(), source, samples, Tools(MODEL))
    if isinstance(source, Mixture):
        source = source.parts[0][1] if len(source.parts) == 1 else None
    if source is None:  # each part has its own epochs: tests of the order look at those
        return
    seen = [
        sample
        for step in range(-(-2 * len(source) // samples))
        for rank in of_step([stream], seed, world, step)
        for sample in rank
    ]
    counts = Counter(seen)
    assert len(counts) == len(source)
    assert max(counts.values()) - min(counts.values()) <= 1 or len(seen) > 2 * len(source)


@settings(max_examples=4, deadline=None)
@given(source=sources(), start=strategies.integers(0, 9), count=strategies.sampled_from([1, 2, 3]))
def test_workers_and_where_a_run_is_taken_up_change_nothing(source, start, count):
    data = StepData([Stream("text", Words(), source, 4, Tools(MODEL))], MODEL, 0, Place())
    loaded = list(steps(data, start, start + 5, count, lambda worker: None))
    assert [batch.samples for (batch,) in loaded] == [
        data[step][0].samples for step in range(start, start + 5)
    ]


def test_a_text_of_known_length_goes_to_the_rank_with_the_least_work():
    lengths = tuple(int(n) for n in np.random.default_rng(0).integers(1, 60, 64))
    stream = Stream("text", Words(), Sharded(64, (), "x", (), 0, lengths), 64, Tools(MODEL))
    work = [
        sum(lengths[int(sample.partition("/")[2])] for sample in rank) for rank in of_step([stream], 0, 4, 0)
    ]
    assert max(work) - min(work) < max(lengths)


def test_a_share_of_a_source_that_mixes_few_examples_lies_together():
    source = Sharded(400, (), "x", (10,) * 40, 50, tuple(range(400)))
    stream = Stream("text", Words(), source, 200, Tools(MODEL))
    shards = [{int(sample.partition("/")[2]) // 10 for sample in rank} for rank in of_step([stream], 0, 8, 1)]
    assert max(map(len, shards)) <= 4  # 25 samples each; at random they would lie in some 15 shards
    assert sorted(s for rank in of_step([stream], 0, 8, 1) for s in rank) == sorted(
        of_step([stream], 0, 1, 1)[0]
    )


def test_data_that_changed_end_the_job_at_once():
    class Gone(Numbers):
        def __getitem__(self, index):
            raise ChangedError("x.tar: removed")

    stream = Stream("text", Words(), Gone(4), 1, Tools(MODEL))
    with pytest.raises(ChangedError, match=r"x\.tar: removed"):
        drawn(stream, 0, 0)
    with pytest.raises(ChangedError, match=r"x\.tar: removed"):
        next(prepared(stream, 0))


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
    assert [bad for _, _, bad in found if bad] == [[("text/text[3]", "number 3 is broken")]]
    assert all(id != "3" for id, _, _ in found)
    assert [id for id, _, _ in found] == [drawn(stream, position, 0)[0] for position in range(10)]


def test_a_source_of_unreadable_examples_ends_the_job():
    stream = Stream("text", Words(), Numbers(4, bad=(0, 1, 2, 3)), 1, Tools(MODEL))
    with pytest.raises(DataError, match=r"16 examples of 'text' in a row cannot be used: number . is broken"):
        drawn(stream, 0, 0)


def test_evaluation_leaves_unreadable_examples_out():
    stream = Stream("text", Words(), Numbers(5, bad=(2,)), 1, Tools(MODEL))
    assert [example.id for example, _ in prepared(stream, 0)] == ["0", "1", "3", "4"]
