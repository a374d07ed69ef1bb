"""Beam search with a cache finds what a search without one finds."""

from dataclasses import replace

import pytest
import torch
from small import MODEL
from torch import nn

from beitctl.model.decoding import CANDIDATES, Search, captions
from beitctl.model.multiway import Multiway

START, END, MASK = 0, 2, 51
CONFIGS = {
    "shared": replace(MODEL, layers=2),
    "decoupled": replace(MODEL, layers=2, attention="decoupled"),
    "fusion": replace(MODEL, layers=3, fusion_layers=2),
    "no final norm": replace(MODEL, layers=2, final_norm=False),
    "layer scale": replace(MODEL, layers=2, norm="pre", layer_scale=0.5, key_bias=False),
    "types": replace(MODEL, layers=2, token_types=2, text_norm=True),
}


def model_of(name, seed=0):
    """A model and a head with weights that make captions of several lengths."""
    torch.manual_seed(seed)
    model, head = Multiway(CONFIGS[name]), nn.Linear(8, 52)
    for parameter in (*model.parameters(), *head.parameters()):
        nn.init.normal_(parameter, std=0.6)
    nn.init.normal_(model.text_embed.position.weight, std=4.0)  # where a caption ends depends on the place
    with torch.no_grad():
        head.weight[END] *= 3
    return model.eval(), head


def pixels(count=3):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def log_likelihoods(model, head, picture, words):
    """Of the next word behind others, by a forward pass over all of them."""
    ids = torch.tensor([[START, *words, MASK]])
    packed, _ = model.pack(picture[None], ids, causal_text=True)
    rows = model.encode(packed)[packed.layout.plan.cuts[1] :]
    return head(rows[-1]).float().log_softmax(-1)


@torch.no_grad()
def searched(model, head, picture, search):
    """The caption of one picture by a search that keeps nothing."""
    beams, best, best_score = [([], 0.0)], [], float("-inf")
    for length in range(2, search.max_tokens):
        options = []
        for words, total in beams:
            scores = log_likelihoods(model, head, picture, words)
            options += [(total + float(score), words, word) for word, score in enumerate(scores)]
        options = sorted(options, key=lambda option: -option[0])[: CANDIDATES * search.beam_size]
        if best_score >= options[0][0] / (search.max_tokens - 1) ** search.length_penalty:
            break
        beams = []
        for total, words, word in options:
            if len(beams) == search.beam_size:
                break
            if word == END or length + 1 == search.max_tokens:
                score = total / (len(words) + 2) ** search.length_penalty
                if score > best_score:
                    best, best_score = words, score
            else:
                beams.append(([*words, word], total))
    return best, best_score


@pytest.mark.parametrize(("beams", "penalty"), [(1, 0.6), (2, 0.0), (3, 0.6), (5, 1.0)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_changes_nothing(name, seed, beams, penalty):
    model, head = model_of(name, seed)
    search = Search(START, END, MASK, 8, beams, penalty)
    found = captions(model, head, pixels(), search)
    for (words, score), picture in zip(found, pixels(), strict=True):
        expected, total = searched(model, head, picture, search)
        assert words == expected
        assert score == pytest.approx(total, rel=1e-4, abs=1e-4)


def test_captions_differ_in_length_so_that_the_search_has_something_to_decide():
    lengths = set()
    for name in CONFIGS:
        for seed in range(3):
            model, head = model_of(name, seed)
            lengths |= {
                len(words) for words, _ in captions(model, head, pixels(), Search(START, END, MASK, 8))
            }
    assert len(lengths) > 3


@pytest.mark.parametrize("seed", range(3))
def test_a_picture_alone_has_the_caption_that_it_has_in_a_batch(seed):
    model, head = model_of("shared", seed)
    search = Search(START, END, MASK, 8)
    together = captions(model, head, pixels(), search)
    alone = [captions(model, head, picture[None], search)[0] for picture in pixels()]
    assert [words for words, _ in together] == [words for words, _ in alone]


@pytest.mark.parametrize("longest", [3, 4, 10])
def test_no_caption_is_longer_than_allowed(longest):
    model, head = model_of("shared")
    with torch.no_grad():
        head.bias[END] = -1000.0
    found = captions(model, head, pixels(), Search(START, END, MASK, longest))
    assert [len(words) for words, _ in found] == [longest - 3] * 3


def test_more_beams_than_continuations_are_no_error():
    model, _ = model_of("shared")
    head = nn.Linear(8, 3)
    found = captions(model, head, pixels(), Search(0, 2, 1, 5, beam_size=5))
    assert all(set(words) <= {0, 1} for words, _ in found)


@pytest.mark.parametrize(
    ("config", "search", "message"),
    [
        (replace(MODEL, vocabulary=0, text_tokens=0), Search(0, 2, 1, 5), "need a language branch"),
        (replace(MODEL, position="relative-shared"), Search(0, 2, 1, 5), 'need position = "absolute"'),
        (MODEL, Search(0, 2, 1, 11), r"max_tokens \(11\) exceeds the model's 10 text tokens"),
    ],
    ids=["no text", "relative", "too long"],
)
def test_what_cannot_be_captioned_is_refused(config, search, message):
    with pytest.raises(ValueError, match=message):
        captions(Multiway(config), nn.Linear(8, 52), pixels(), search)


@pytest.mark.parametrize("settings", [{"beam_size": 0}, {"max_tokens": 2}], ids=["beams", "tokens"])
def test_a_search_without_beams_or_room_is_refused(settings):
    with pytest.raises(ValueError, match="must be at least 1"):
        Search(**{"start_id": 0, "end_id": 2, "mask_id": 1, "max_tokens": 5, **settings})
