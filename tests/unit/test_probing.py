"""k-NN on frozen features: which features, how neighbours vote, on any number of ranks, what is left out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import ALONE, MODEL, Given, Record, png, stored, tools
from torch.nn import functional as F

from beitctl.api import Example, Job
from beitctl.checkpoints.native import read_model, save_model
from beitctl.engine.dist import start
from beitctl.errors import ChangedError, DataError, DivergedError, UserError
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages.probing import knn
from beitctl_plugins.stages.probing.features import Features, depth_of, extracted, frozen, random_weights
from beitctl_plugins.stages.probing.knn import Protocol, votes

DEEP = replace(MODEL, layers=3)
LABELS = ("blue", "green", "red")
MEAN_PATCH = Features(2)


def pictures(count, seed, broken=()):
    """Pictures whose label is the strongest of their random colours; some are torn."""
    draw, made = np.random.default_rng(seed), []
    for number in range(count):
        colour = tuple(int(value) for value in draw.integers(256, size=3))
        label = ("red", "green", "blue")[int(np.argmax(colour))]
        image = b"torn" if number in broken else png(colour)
        made.append(Example(f"p{number}", image, label=label))
    return Given(examples=tuple(made))


def model_in(folder):
    """A model of three blocks on disk, with random weights that tell colours apart."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Multiway(DEEP).state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    save_model(folder, {f"model.{n}": torch.randn(s, generator=draw) / 3 for n, s in shapes.items()}, DEEP)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture
def learner(folder):
    found = read_model(folder)
    return frozen(found.tensors, found, ALONE)


def unit(rows, width, seed):
    vectors = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(vectors, dim=1)


def voted(asked, known, labels, count, weight):
    """The same votes by plain loops."""
    found = []
    for row in asked.double():
        ranked = sorted(range(len(known)), key=lambda i: -float(row @ known[i].double()))[:count]
        sums = dict.fromkeys((labels[i] for i in ranked), 0.0)
        for i in ranked:
            sums[labels[i]] += weight(float(row @ known[i].double()))
        found.append(max(sums, key=sums.__getitem__))
    return found


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.0, 0.07, 1.0])
def test_neighbours_vote_with_their_similarity_or_its_exponential(count, temperature):
    asked, known = unit(40, 6, 0), unit(60, 6, 1)
    labels = [LABELS[i * i % 3] for i in range(60)]
    protocol = Protocol(MEAN_PATCH, count, temperature)
    weight = (lambda s: math.exp(s / temperature)) if temperature else (lambda s: s)
    assert votes(asked, known, labels, protocol) == voted(asked, known, labels, count, weight)


def test_a_cold_vote_is_that_of_the_nearest():
    asked, known = unit(40, 6, 0), unit(60, 6, 1)
    labels = [LABELS[i % 3] for i in range(60)]
    cold = votes(asked, known, labels, Protocol(MEAN_PATCH, 20, 1e-6))
    assert cold == votes(asked, known, labels, Protocol(MEAN_PATCH, 1))
    assert cold != votes(asked, known, labels, Protocol(MEAN_PATCH, 20, 1.0))


def test_the_size_of_the_portions_changes_nothing():
    asked, known = unit(40, 6, 0), unit(60, 6, 1)
    labels = [LABELS[i % 3] for i in range(60)]
    whole = votes(asked, known, labels, Protocol(MEAN_PATCH, 5))
    assert votes(asked, known, labels, Protocol(MEAN_PATCH, 5), most=130) == whole


def test_more_neighbours_than_there_are_means_all():
    assert votes(unit(2, 4, 0), unit(3, 4, 1), ["a", "a", "a"], Protocol(MEAN_PATCH, 9)) == ["a", "a"]


@pytest.mark.parametrize("which", [0, 1])
def test_features_that_are_not_numbers_are_refused(which):
    vectors = [unit(2, 4, 0), unit(3, 4, 1)]
    vectors[which][0, 0] = torch.nan
    with pytest.raises(DivergedError, match="features are not numbers"):
        votes(*vectors, ["a", "b", "c"], Protocol(MEAN_PATCH, 1))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_features_are_read_behind_their_block(learner, depth):
    model = learner.model
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    packed, _ = model.pack(image=pixels)
    x = model.embed(packed)
    for block in range(depth):
        x = model.through(x, packed, [block])
    tokens = x.view(2, DEEP.picture_tokens, -1)
    own, patches = tokens[:, 0], tokens[:, 1:].mean(1)
    assert torch.allclose(Features(depth).of(model, pixels), model.patches(pixels, depth).mean(1))
    assert torch.allclose(Features(depth).of(model, pixels), patches, atol=1e-6)
    assert torch.allclose(Features(depth, "class").of(model, pixels), own, atol=1e-6)
    both = torch.cat([own, patches], dim=1)
    assert torch.allclose(Features(depth, "both").of(model, pixels), both, atol=1e-6)


@pytest.mark.parametrize(("layers", "depth"), [(1, 1), (3, 2), (12, 8), (24, 16)])
def test_the_block_is_two_thirds_up_unless_it_is_set(layers, depth):
    assert depth_of(0, replace(MODEL, layers=layers)) == depth
    assert depth_of(1, replace(MODEL, layers=layers)) == 1


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"depth \(4\) must not exceed the model's 3 blocks"):
        depth_of(4, DEEP)


def test_random_weights_differ_by_seed_alone():
    one, same, other = (random_weights(DEEP, seed) for seed in (0, 0, 1))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


def compared(folder, out, workers=0, **changes):
    """Metrics on every rank, and what was logged, of 11 pictures (2 torn) by 30 (1 torn)."""
    ranks, log = start(), Record()
    stored_model = read_model(Path(folder))
    sources = {
        "source": pictures(11, 0, broken=(4, 10)).open(), "reference": pictures(30, 1, broken=(7,)).open()
    }  # fmt: skip
    protocol = replace(Protocol(MEAN_PATCH, 5), **changes)
    made = tools(model=DEEP, train=False)
    metrics = knn.measured(stored_model, protocol, sources, made, Job(Path(out), log), ranks, workers)
    return metrics, log.said


def by_hand(folder, count):
    """Accuracy from every picture encoded alone."""
    model = Multiway(DEEP).eval()
    model.load_state_dict(
        {name.removeprefix("model."): value for name, value in read_model(folder).tensors.items()}
    )

    def vectors(source):
        used = [example for example in source.examples if example.image != b"torn"]
        made, found = tools(model=DEEP, train=False), []
        for example in used:
            image = MEAN_PATCH.prepare(example, np.random.default_rng(0), made).image
            pixels = (torch.from_numpy(image).float()[None] / 255 - 0.5) / 0.5
            with torch.no_grad():
                found.append(F.normalize(model.patches(pixels, 2).mean(1), dim=1)[0])
        return torch.stack(found), [example.label for example in used]

    (asked, truth), (known, labels) = (
        vectors(pictures(11, 0, broken=(4, 10))), vectors(pictures(30, 1, broken=(7,)))
    )  # fmt: skip
    said = voted(asked, known, labels, count, lambda s: s)
    return said, sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_accuracy_is_that_of_plain_loops_on_any_number_of_ranks(world, on_ranks, folder, tmp_path):
    found = [compared(folder, tmp_path)] if world == 1 else on_ranks(compared, world, folder, tmp_path)
    said, accuracy = by_hand(folder, 5)
    assert [metrics for metrics, _ in found] == [found[0][0]] * world
    assert 0 < accuracy < 1
    assert found[0][0]["pretrained"] == pytest.approx(accuracy)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["pretrained"] for line in lines] == said
    assert [line["id"] for line in lines] == [f"p{n}" for n in range(11) if n not in (4, 10)]


def test_what_cannot_be_used_is_counted_named_and_listed(folder, tmp_path):
    metrics, said = compared(folder, tmp_path)
    counts = ("examples", "left_out", "reference", "reference_left_out")
    assert [metrics[key] for key in counts] == [9, 2, 29, 1]
    assert [line[1].split(":")[0] for line in said["warning"]] == ["source", "reference"]
    assert "2 of 11 pictures could not be used, such as p4" in said["warning"][0][1]
    assert len((tmp_path / "left-out-measured-source.txt").read_text().splitlines()) == 2


def test_the_protocol_is_said_in_words(folder, tmp_path):
    metrics, _ = compared(folder, tmp_path, neighbours=50, temperature=0.07, features=Features(3, "class"))
    assert metrics["protocol"] == (
        "k-NN, k = 29, cosine similarity, votes weighed by exp(similarity / 0.07), class token after block 3 "
        "of 3, centre crop 16, fp32"
    )


def test_processes_that_load_change_nothing(folder, tmp_path):
    assert compared(folder, tmp_path, workers=1)[0] == compared(folder, tmp_path)[0]


def test_the_interval_holds_the_accuracy_and_the_majority_is_beside_it(folder, tmp_path):
    metrics, _ = compared(folder, tmp_path)
    low, high = metrics["intervals_95"]["pretrained"]
    assert low <= metrics["pretrained"] <= high
    labels = [e.label for e in pictures(30, 1).examples if e.id != "p7"]
    most = max(sorted(set(labels)), key=labels.count)
    truth = [e.label for e in pictures(11, 0).examples if e.id not in ("p4", "p10")]
    assert metrics["majority"] == pytest.approx(truth.count(most) / 9)


class _Gone:
    """Examples that changed since they were opened."""

    fingerprint = "gone"

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise ChangedError("it is not what it was")


def test_a_source_without_labels_or_that_changed_is_named(learner):
    made, bare = tools(model=DEEP, train=False), Given(examples=(Example("x", png()),)).open()
    with pytest.raises(DataError, match=r"reference: none of the 1 examples .*: x: no label"):
        extracted(learner, MEAN_PATCH, ("reference", bare), made, ALONE, 0)
    with pytest.raises(DataError, match="reference: it is not what it was"):
        extracted(learner, MEAN_PATCH, ("reference", _Gone()), made, ALONE, 0)


def test_weights_of_another_model_are_refused(tmp_path):
    found = read_model(stored(tmp_path))
    with pytest.raises(DataError, match=r"missing blocks\.1"):
        frozen(found.tensors, replace(found, model=DEEP), ALONE)
