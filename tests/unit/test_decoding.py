"""Beam search with a cache finds what a search without one finds."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from small import MODEL
from torch import nn

from beitctl.model.decoding import Search, captions
from beitctl.model.multiway import Multiway

START, PAD, END, MASK = 0, 1, 2, 51
SPECIAL = (START, PAD, END, MASK)
BF16 = 0.1
"""Of a sum of up to six log-likelihoods whose logits reach tens."""
CONFIGS = {
    "shared": replace(MODEL, layers=2),
    "decoupled": replace(MODEL, layers=2, attention="decoupled"),
    "fusion": replace(MODEL, layers=3, fusion_layers=2),
    "decoupled fusion": replace(MODEL, layers=2, attention="decoupled", fusion_layers=1),
    "no final norm": replace(MODEL, layers=2, final_norm=False),
    "layer scale": replace(MODEL, layers=2, norm="pre", layer_scale=0.5, key_bias=False),
    "types": replace(MODEL, layers=2, token_types=2, text_norm=True),
}


SEEDS = {"decoupled": 7, "fusion": 4, "decoupled fusion": 6, "no final norm": 1, "types": 2}
"""Where captions have several words or lengths; 0 for the others."""


def search_of(longest=8, beams=3, penalty=0.6):
    return Search(START, END, MASK, longest, beams, penalty, PAD)


@functools.cache
def model_of(name, seed=None):
    """A model and a head with weights that make captions of several lengths."""
    torch.manual_seed(SEEDS.get(name, 0) if seed is None else seed)
    model, head = Multiway(CONFIGS[name]), nn.Linear(8, 52)
    for parameter in (*model.parameters(), *head.parameters()):
        nn.init.normal_(parameter, std=0.6)
    nn.init.normal_(model.text_embed.position.weight, std=4.0)  # where a caption ends depends on the place
    with torch.no_grad():
        head.weight[END] *= 3
    return model.eval(), head


def pixels(count=3):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def log_likelihoods(model, head, picture, beams):
    """(K, V) of the next word behind K runs of words of one length, by a forward pass over all of them."""
    ids = torch.tensor([[START, *words, MASK] for words in beams])
    packed, _ = model.pack(picture.expand(len(ids), -1, -1, -1), ids, causal_text=True)
    logits = head(model.encode(packed)[packed.layout.plan.cuts[1] :]).float().log_softmax(-1)
    return logits.view(*ids.shape, -1)[:, -1]


@torch.no_grad()
def searched(model, head, picture, search):
    """The caption of one picture by a search that keeps nothing, special ids included."""
    beams, best, best_score = [([], 0.0)], [], float("-inf")
    for length in range(2, search.max_tokens):
        likely = log_likelihoods(model, head, picture, [words for words, _ in beams]).tolist()
        options = [
            (total + score, words, word)
            for (words, total), scores in zip(beams, likely, strict=True)
            for word, score in enumerate(scores)
        ]
        options = sorted(options, key=lambda option: -option[0])[: 3 * search.beam_size]
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


def without_special(words):
    return [word for word in words if word not in SPECIAL]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("beams", [1, 2, 3, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_changes_nothing(name, beams, penalty):
    model, head = model_of(name)
    search = search_of(8, beams, penalty)
    expected = [searched(model, head, picture, search) for picture in pixels()]
    found = captions(model, head, pixels(), search)
    assert [words for words, _ in found] == [without_special(words) for words, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4)


@pytest.mark.parametrize("seed", range(2, 8))
def test_the_cache_changes_nothing_with_other_weights(seed):
    model, head = model_of("no final norm", seed)
    expected = [searched(model, head, picture, search_of()) for picture in pixels()]
    found = captions(model, head, pixels(), search_of())
    assert [words for words, _ in found] == [without_special(words) for words, _ in expected]


def test_captions_differ_in_length_so_that_the_search_has_something_to_decide():
    found = [caption for name in CONFIGS for caption in captions(*model_of(name), pixels(), search_of())]
    assert len({len(words) for words, _ in found}) > 3


@pytest.mark.parametrize("name", CONFIGS)
def test_a_picture_alone_has_the_caption_that_it_has_in_a_batch(name):
    model, head = model_of(name)
    together = captions(model, head, pixels(), search_of())
    alone = [captions(model, head, picture[None], search_of())[0] for picture in pixels()]
    assert [words for words, _ in together] == [words for words, _ in alone]
    assert [score for _, score in together] == pytest.approx([score for _, score in alone], abs=1e-5)


def test_no_pictures_have_no_captions():
    assert captions(*model_of("shared"), pixels(0), search_of()) == []


def never(*ids):
    """A model and a head that does not say some ids."""
    model, head = model_of("shared")
    quiet = nn.Linear(8, 52)
    quiet.load_state_dict(head.state_dict())
    with torch.no_grad():
        quiet.bias[list(ids)] = -1000.0
    return model, quiet


def test_the_search_stops_where_no_running_caption_can_become_better():
    model, head = never(*(number for number in range(52) if number != END))
    steps = []
    with head.register_forward_hook(lambda *_: steps.append(1)):
        captions(model, head, pixels(), search_of(10))
    assert len(steps) == 2  # the second sees that all others are worse


@pytest.mark.parametrize("longest", [3, 4, 10])
def test_no_caption_is_longer_than_allowed(longest):
    found = captions(*never(*SPECIAL), pixels(), search_of(longest))
    assert [len(words) for words, _ in found] == [longest - 3] * 3


def test_special_ids_that_a_model_says_are_left_out_of_captions():
    model, head = never(*(number for number in range(52) if number not in (START, PAD, MASK, 7)))
    raw = [searched(model, head, picture, search_of()) for picture in pixels()]
    assert any(word in SPECIAL for words, _ in raw for word in words)
    found = captions(model, head, pixels(), search_of())
    assert [words for words, _ in found] == [without_special(words) for words, _ in raw]


def test_more_beams_than_continuations_are_no_error():
    model, _ = model_of("shared")
    found = captions(model, nn.Linear(8, 5), pixels(), Search(0, 2, 1, 5, beam_size=5))
    assert all(set(words) <= {3, 4} for words, _ in found)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_score_in_bf16_is_that_of_passes_over_the_whole_caption(name):
    model, head = (copy.deepcopy(module).bfloat16() for module in model_of(name))
    head.bias[[START, PAD, MASK]] = -1000.0
    for picture in pixels():
        ((words, score),) = captions(model, head, picture[None], search_of(8, 3, 0.0))
        steps = [log_likelihoods(model, head, picture, [words[:at]])[0] for at in range(len(words) + 1)]
        last = steps[-1].max() if len(words) == 8 - 3 else steps[-1][END]  # the longest end with any id
        total = float(last) + sum(float(step[word]) for step, word in zip(steps, words, strict=False))
        assert score == pytest.approx(total, abs=BF16)


def test_weights_that_give_nan_are_refused():
    model, head = never()
    with torch.no_grad():
        head.bias[5] = float("nan")
    with pytest.raises(ValueError, match="gives NaN for word 1"):
        captions(model, head, pixels(), search_of())


@pytest.mark.parametrize(
    ("config", "search", "message"),
    [
        (replace(MODEL, vocabulary=0, text_tokens=0), Search(0, 2, 1, 5), "need a language branch"),
        (replace(MODEL, position="relative-shared"), Search(0, 2, 1, 5), 'need position = "absolute"'),
        (replace(MODEL, position="relative-per-block"), Search(0, 2, 1, 5), 'need position = "absolute"'),
        (MODEL, Search(0, 2, 1, 11), r"max_tokens \(11\) exceeds the model's 10 text tokens"),
        (MODEL, Search(0, 2, 52, 5), r"id 52 is not in 0\.\.51"),
    ],
    ids=["no text", "relative", "relative per block", "too long", "mask id"],
)
def test_what_cannot_be_captioned_is_refused(config, search, message):
    model, head, seen = Multiway(config), nn.Linear(8, 52), pixels()
    with pytest.raises(ValueError, match=message):
        captions(model, head, seen, search)


@pytest.mark.parametrize(
    "seen", [torch.zeros(3, 16, 16), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)], ids=["one", "bytes"]
)
def test_pixels_that_are_no_batch_of_pictures_are_refused(seen):
    model, head = model_of("shared")
    with pytest.raises(ValueError, match="they must be"):
        captions(model, head, seen, search_of())


@pytest.mark.parametrize("settings", [{"beam_size": 0}, {"max_tokens": 2}], ids=["beams", "tokens"])
def test_a_search_without_beams_or_room_is_refused(settings):
    with pytest.raises(ValueError, match="must be at least 1"):
        Search(**{"start_id": 0, "end_id": 2, "mask_id": 1, "max_tokens": 5, **settings})
