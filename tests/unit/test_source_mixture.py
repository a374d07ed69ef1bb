import numpy as np
import pytest
from pydantic import ValidationError
from source_files import fill, ids

from beitctl.api import Tools
from beitctl.config import ModelConfig
from beitctl.data.loader import Stream
from beitctl_plugins.sources.mixture import Mixture
from beitctl_plugins.sources.opened import Opened

MODEL = ModelConfig(layers=1, width=8, heads=2, ffn=8, image_px=8, patch_px=4)


def tables(folder):
    fill(folder, *(f"a/{i}.png" for i in range(3)), *(f"b/{i}.png" for i in range(12)))
    return [{"kind": "image-folder", "path": str(folder / name)} for name in "ab"]


def stream(examples):
    return Stream("image", object(), examples, 5, Tools(MODEL))


def drawn(examples, count, seed=0):
    order = stream(examples).order
    return [order.at(position, seed) for position in range(count)]


def test_a_mixture_holds_the_examples_of_all_sources(tmp_path):
    opened = Mixture(sources=tables(tmp_path)).open()
    assert ids(opened) == [f"0/{i}.png" for i in range(3)] + sorted(f"1/{i}.png" for i in range(12))


def test_without_weights_an_epoch_holds_every_example_once(tmp_path):
    found = drawn(Mixture(sources=tables(tmp_path)).open(), 30)
    assert sorted(index for _, index in found[:15]) == list(range(15))
    assert [epoch for epoch, _ in found] == [0] * 15 + [1] * 15


def test_with_weights_each_source_has_its_own_epochs(tmp_path):
    found = drawn(Mixture(sources=tables(tmp_path), weights=[1, 1]).open(), 4096)
    small = [(epoch, index) for epoch, index in found if index < 3]
    assert len(small) == 2048
    assert [epoch for epoch, _ in small] == [i // 3 for i in range(2048)]
    assert sorted(index for _, index in small[:3]) == [0, 1, 2]


def test_a_mixture_keeps_the_shards_and_lengths_of_its_sources():
    def example(row):
        return row

    one = Opened("abcd", example, "x", shards=(3, 1), lengths=[1, 2, 3, 4], window=50)
    two = Opened("ef", example, "y", lengths=[5, 6])
    from beitctl_plugins.sources.mixture import Mixed

    mixed = Mixed([one, two])
    assert mixed.shards == (3, 1, 1, 1)
    assert mixed.lengths.tolist() == [1, 2, 3, 4, 5, 6]
    assert mixed.window == 50
    assert Mixed([two, two]).shards == ()


def test_the_fingerprint_follows_sources_and_weights(tmp_path):
    given = tables(tmp_path)
    mixtures = [{"sources": given}, {"sources": given[::-1]}, {"sources": given, "weights": [1, 2]}]
    assert len({Mixture(**mixture).open().fingerprint for mixture in mixtures}) == 3


@pytest.mark.parametrize(
    ("weights", "message"), [([1], "1 weights for 2 sources"), ([1, 1e6], "at least 1/4096 of their sum")]
)
def test_weights_that_cannot_be_are_refused(tmp_path, weights, message):
    with pytest.raises(ValidationError, match=message):
        Mixture(sources=tables(tmp_path), weights=weights)


def test_a_mixture_in_a_mixture_keeps_its_weights(tmp_path):
    first, second = tables(tmp_path)
    inner = {"kind": "mixture", "sources": [first, second], "weights": [3, 1]}
    opened = Mixture(sources=[inner, second], weights=[1, 1]).open()
    assert [weight for weight, _ in opened.parts] == [0.75, 0.25, 1]
    counts = np.bincount(np.digitize([index for _, index in drawn(opened, 4096)], [3, 15]))
    assert counts.tolist() == [1536, 512, 2048]


def test_weights_inside_a_mixture_without_weights_are_refused(tmp_path):
    inner = {"kind": "mixture", "sources": tables(tmp_path), "weights": [3, 1]}
    with pytest.raises(ValidationError, match="give all sources weights"):
        Mixture(sources=[inner, tables(tmp_path)[0]])
