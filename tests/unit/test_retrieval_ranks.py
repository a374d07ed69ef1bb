"""Metrics of retrieval equal those of plain loops, on any number of ranks; what evaluation says besides."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import ALONE, Given, Record, pieces, png, rng, stored, tools

from beitctl.api import Example, Job
from beitctl.checkpoints.native import read_model, save_model
from beitctl.data.loader import Stream
from beitctl.engine.dist import start
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.errors import DivergedError, UserError
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages import measuring
from beitctl_plugins.stages.eval import Eval
from beitctl_plugins.tasks import matching
from beitctl_plugins.tasks.matching import Matches, recalls
from beitctl_plugins.tasks.retrieval import Retrieval

WORDS = ("boat", "dog", "big cat", "ox", "a red sun and more")


def pictures(count=13, broken=4):
    """Pictures of many colours with one to four captions, of which some are equal; one cannot be read."""
    draw = rng(3)
    made = []
    for number in range(count):
        own = tuple(WORDS[int(i)] for i in draw.integers(len(WORDS), size=1 + number % 4))
        ids = tuple(np.array([5 + number, 6]) for _ in range(number % 2 + 1))
        words = {"caption_ids": ids} if number == 7 else {"captions": own}
        colour = tuple(int(value) for value in draw.integers(256, size=3))
        made.append(Example(f"p{number}", b"torn" if number == broken else png(colour), **words))
    return Given(examples=tuple(made))


def held(folder, ranks, duplicates=True, size=3):
    """The task, its tools and what a model says of the pictures."""
    found, task = read_model(folder), Retrieval(duplicates=duplicates)
    made = replace(tools(), train=False, model=found.model)

    def make():
        return MultiwayLearner(Multiway(found.model), [Objective("task", task)], {"task": made})

    learner = measuring.whole(make, found.tensors, ranks, torch.float32)
    stream = Stream("task", task, pictures().open(), 1, made)
    return task, made, measuring.outputs(learner, stream, ranks, size), learner


def scored(folder):
    """Metrics, means of ``each`` and rows on rank 0 with and without equal captions, as JSON."""
    ranks, made = start(), []
    for duplicates in (True, False):
        task, used, found, _ = held(Path(folder), ranks, duplicates)
        if ranks.main:
            measured = task.score(found.outputs, found.examples, used, found.stream.examples)
            means = {key: float(values.mean()) for key, values in measured.each.items()}
            made.append((measured.metrics, means, list(measured.rows)))
    return made


def above(pair, pairs, score):
    """How many pairs stand above one: with a larger score, or an equal one and earlier."""
    place = pairs.index(pair)
    return sum(
        score[other] > score[pair] + 1e-6 or (abs(score[other] - score[pair]) <= 1e-6 and n < place)
        for n, other in enumerate(pairs)
    )


def by_loops(folder, duplicates):
    """The six recalls, from each picture and each caption encoded alone, without any sort."""
    found = read_model(folder)
    model = Multiway(found.model).eval()
    learner = MultiwayLearner(model, [Objective("task", Retrieval())], {"task": tools()}).eval()
    learner.load_state_dict(found.tensors)
    made, head = replace(tools(), train=False), learner.heads["contrastive"]
    vectors, texts = [], []  # texts: owner, words, vector
    examples = [example for example in pictures().examples if example.image != b"torn"]
    for number, example in enumerate(examples):
        item = Retrieval().prepare(example, rng(), made)
        with torch.no_grad():
            pixels = (torch.from_numpy(item.image).float()[None] / 255 - 0.5) / 0.5
            vectors.append(head.pictures(model.encode(model.pack(image=pixels)[0])[:1])[0])
            for caption in example.captions or [ids.tolist() for ids in example.caption_ids]:
                ids = made.tokenizer.encode(caption) if isinstance(caption, str) else caption
                text = torch.tensor([[0, *ids[:8], 2]])
                vector = head.texts(model.encode(model.pack(text=text)[0])[:1])[0]
                texts.append((number, str(caption), vector))
    right = {
        (p, t): owner == p or (duplicates and any(o == p and w == words for o, w, _ in texts))
        for p in range(len(vectors))
        for t, (owner, words, _) in enumerate(texts)
    }
    score = {(p, t): float(vectors[p] @ texts[t][2]) for p, t in right}
    result = {}
    queries = {
        "i2t": [[(p, t) for t in range(len(texts))] for p in range(len(vectors))],
        "t2i": [[(p, t) for p in range(len(vectors))] for t in range(len(texts))],
    }
    for k in (1, 5, 10):
        for way, lists in queries.items():
            hits = 0
            for pairs in lists:
                hits += min(above(pair, pairs, score) for pair in pairs if right[pair]) < k
            result[f"{way}_r{k}"] = hits / len(lists)
    return result, [len(vectors), len(texts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose random weights tell pictures and texts apart."""
    path = stored(tmp_path_factory.mktemp("model"), "retrieval")
    found, draw = read_model(path), torch.Generator().manual_seed(0)
    shapes = sorted((name, value.shape) for name, value in found.tensors.items())
    tensors = {name: torch.randn(shape, generator=draw) / 2 for name, shape in shapes}
    save_model(path, tensors, found.model, task={"kind": "retrieval"})
    return path


@pytest.fixture(scope="module")
def expected(folder):
    return [by_loops(folder, duplicates) for duplicates in (True, False)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_metrics_equal_those_of_plain_loops_on_any_number_of_ranks(world, on_ranks, folder, expected):
    found, *others = [scored(folder)] if world == 1 else on_ranks(scored, world, folder)
    assert others == [[]] * (world - 1)
    for (metrics, means, rows), (six, (examples, captions)) in zip(found, expected, strict=True):
        assert {key: metrics[key] for key in six} == pytest.approx(six)
        assert metrics["mean_recall"] == pytest.approx(np.mean(list(six.values())))
        assert metrics["recall@1"] == pytest.approx((six["i2t_r1"] + six["t2i_r1"]) / 2)
        assert (metrics["examples"], metrics["captions"]) == (examples, captions)
        assert means == pytest.approx({key: six[key] for key in ("i2t_r1", "t2i_r1")})
        within = np.mean([row["rank of the first own caption"] <= 5 for row in rows])
        assert within == pytest.approx(six["i2t_r5"])
        ranks = [rank for row in rows for rank in row["ranks of the picture"]]
        assert np.mean([rank <= 5 for rank in ranks]) == pytest.approx(six["t2i_r5"])


def test_the_reference_tells_apart_what_the_metrics_must(expected):
    (with_equal, _), (without, _) = expected
    assert all(0 < without[key] < with_equal[key] < 1 for key in ("t2i_r1", "i2t_r1"))


def test_every_picture_and_caption_is_encoded_once_in_small_portions(folder, monkeypatch):
    _, _, found, _ = held(folder, ALONE)
    seen = []
    pack = Multiway.pack
    monkeypatch.setattr("beitctl_plugins.tasks.retrieval.TEXTS", 4)
    monkeypatch.setattr(
        Multiway, "pack",
        lambda self, image=None, text=None, **rest: (
            seen.append((len(image) if image is not None else 0, len(text) if text is not None else 0)),
            pack(self, image=image, text=text, **rest),
        )[1],
    )  # fmt: skip
    _, _, again, _ = held(folder, ALONE)
    assert sum(images for images, _ in seen) == 12
    assert sum(texts for _, texts in seen) == sum(len(out["texts"]) for out in found.outputs)
    assert max(texts for _, texts in seen) == 4
    for one, two in zip(found.outputs, again.outputs, strict=True):
        assert torch.allclose(one["texts"], two["texts"], atol=1e-6)


@pytest.mark.parametrize("duplicates", [True, False])
def test_the_size_of_the_portions_changes_nothing(duplicates, monkeypatch):
    draw = rng(1)
    captions = [[WORDS[int(i)] for i in draw.integers(5, size=1 + n % 3)] for n in range(23)]
    matches = Matches.of(captions, duplicates)
    vectors = torch.from_numpy(draw.normal(size=(23 + len(matches.owners), 4)))
    whole = matches.by_vectors(vectors[:23], vectors[23:])
    monkeypatch.setattr(matching, "CHUNK", 5)
    for one, two in zip(whole, matches.by_vectors(vectors[:23], vectors[23:]), strict=True):
        assert one.tolist() == two.tolist()


@pytest.mark.parametrize("duplicates", [True, False])
def test_a_model_that_says_the_same_of_everything_is_no_better_than_chance(duplicates):
    matches = Matches.of([[f"{n} {k}" for k in range(2)] for n in range(20)], duplicates)
    found = recalls(matches.by_vectors(torch.ones(20, 4), torch.ones(40, 4)), matches)
    assert found["t2i_r1"] == pytest.approx(1 / 20)
    assert found["i2t_r1"] == pytest.approx(1 / 20)
    assert found["t2i_r5"] == pytest.approx(5 / 20)


@pytest.mark.parametrize("duplicates", [True, False])
def test_chance_is_the_recall_of_random_orders(duplicates):
    draw = rng(2)
    captions = [[WORDS[int(i)] for i in draw.integers(5, size=1 + n % 3)] for n in range(12)]
    matches = Matches.of(captions, duplicates)
    texts = [(owner, words) for owner, own in enumerate(captions) for words in own]
    right = np.array(
        [[owner == p or (duplicates and words in captions[p]) for owner, words in texts] for p in range(12)]
    )
    found = recalls((np.zeros(12, np.int64), np.zeros(len(texts), np.int64)), matches)
    for k in (1, 5):
        by_way = [
            np.mean([row[draw.permutation(len(row))[:k]].any() for row in table for _ in range(400)])
            for table in (right, right.T)
        ]
        assert found[f"chance_r{k}"] == pytest.approx(np.mean(by_way), abs=0.02)


def test_scores_that_are_not_numbers_are_refused():
    matches = Matches.of([["a"], ["b"]], duplicates=True)
    with pytest.raises(DivergedError, match="scores are not numbers"):
        matches.by_vectors(torch.full((2, 4), torch.nan), torch.ones(2, 4))


def evaluated(tmp_path, model, **settings):
    log = Record()
    stage = Eval(model=str(model), protocol="task", source=pictures(), **settings)
    return stage.run(Job(tmp_path, log)), log


def test_a_file_with_a_contrastive_head_is_measured_by_the_task_that_is_named(folder, tmp_path):
    found, tokenizer = read_model(folder), pieces()
    heads = {name: value for name, value in found.tensors.items() if name.startswith("heads.")}
    other = {"heads.text_tokens.weight": torch.zeros(52, 8), "heads.text_tokens.bias": torch.zeros(52)}
    save_model(tmp_path / "alone", found.tensors, found.model, tokenizer=tokenizer)
    save_model(tmp_path / "itc", found.tensors | other, found.model, tokenizer=tokenizer)
    alone, first = evaluated(tmp_path, tmp_path / "alone", task=Retrieval())
    tuned, second = evaluated(tmp_path, tmp_path / "itc", task=Retrieval())
    assert len(heads) == 3
    assert alone == tuned
    assert (alone["examples"], alone["left_out"]) == (12, 1)
    assert set(alone["intervals_95"]) == {"i2t_r1", "t2i_r1"}
    assert "note" not in first.said
    (((note),),) = second.said["note"]
    assert note.endswith("not used: heads.text_tokens.bias, heads.text_tokens.weight")
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"p{n}" for n in range(13) if n != 4]


def test_a_file_without_a_contrastive_head_is_refused(folder, tmp_path):
    found = read_model(folder)
    body = {name: value for name, value in found.tensors.items() if name.startswith("model.")}
    save_model(tmp_path / "body", body, found.model, tokenizer=pieces())
    with pytest.raises(UserError, match=r"its heads are not those of the task .* missing, expected"):
        evaluated(tmp_path, tmp_path / "body", task=Retrieval())
