"""CIDEr-D, BLEU, ROUGE-L and the words that they count, against recorded scores of coco-caption."""

import math

import numpy as np
import pytest

from beitctl_plugins.tasks.measures.captions import bleu, cider_d, rouge_l
from beitctl_plugins.tasks.measures.tokens import tokens

SAID = [
    "a man riding a wave on top of a surfboard",
    "a cat sitting on a table",
    "two dogs play in the snow",
    "a red bus on a street",
    "a plate of food with broccoli and rice",
    "people",
    "a group of people standing around a kitchen a group of people",
    "a small bird sits on a branch",
    "the the the the",
    "a train at the station next to a platform with people on it waiting",
    "boats on the calm blue sea",
    "a woman holds an umbrella in the rain",
]
TRUE = [
    [
        "a surfer rides a large wave",
        "a man surfing on a wave in the ocean",
        "a man riding a wave on a surfboard",
    ],
    ["a cat is sitting on a wooden table", "the cat lies on the table next to a cup"],
    ["two dogs are playing in the snow", "dogs run through snow", "a pair of dogs in a snowy field"],
    ["a double decker bus drives down a city street", "a red bus driving on a street"],
    ["a white plate with broccoli and rice", "some food on a plate", "broccoli with rice and meat"],
    ["a crowd of people", "many people walk through a market"],
    ["a group of people standing in a kitchen", "people cooking together in a kitchen"],
    ["a small bird is perched on a branch", "a bird sits on a thin branch of a tree"],
    ["the dog on the sofa", "a dog lying on a sofa"],
    ["a train at the station", "a passenger train next to a platform"],
    ["several boats on the sea", "boats float on calm blue water", "a harbor with small boats"],
    ["a woman holding an umbrella", "a lady with an umbrella walks in the rain"],
]
BLEU = [0.806818182, 0.691173851, 0.560820863, 0.425127972]
CIDER = [
    2.904228797, 2.211790922, 1.772092801, 2.932495868, 2.536739276, 0.924195820,
    1.952632568, 3.654408716, 0.178851001, 1.598686871, 1.985484859, 2.512232416,
]  # fmt: skip
ROUGE = [
    0.907063197, 0.835616438, 0.758706468, 0.910447761, 0.809734513, 0.360946746,
    0.726190476, 0.790496760, 0.435714286, 0.646643110, 0.739393939, 0.778723404,
]  # fmt: skip
"""What pycocoevalcap 1.2 says of them, cut at blanks: BleuScorer ("closest"), CiderScorer, Rouge."""


def cut(sentences):
    return [sentence.split() for sentence in sentences]


CANDIDATES, REFERENCES = cut(SAID), [cut(several) for several in TRUE]


def test_cider_d_is_that_of_coco_caption():
    assert cider_d(CANDIDATES, REFERENCES) == pytest.approx(CIDER, abs=1e-8)


def test_bleu_is_that_of_coco_caption():
    assert bleu(CANDIDATES, REFERENCES) == pytest.approx(BLEU, abs=1e-8)


def test_rouge_l_is_that_of_coco_caption():
    assert rouge_l(CANDIDATES, REFERENCES) == pytest.approx(ROUGE, abs=1e-8)


def test_what_people_say_themselves_scores_best():
    own = [several[0] for several in REFERENCES]
    assert cider_d(own, REFERENCES).mean() > cider_d(CANDIDATES, REFERENCES).mean()
    assert bleu(own, REFERENCES)[3] == pytest.approx(1, abs=1e-6)
    assert np.all(rouge_l(own, REFERENCES) > 0.99)


def test_an_empty_caption_scores_nothing_and_is_no_error():
    said = [[], *CANDIDATES[1:]]
    assert cider_d(said, REFERENCES)[0] == 0
    assert rouge_l(said, REFERENCES)[0] == 0
    assert bleu(said, REFERENCES)[0] < bleu(CANDIDATES, REFERENCES)[0]


def test_one_example_has_no_cider_because_no_word_is_rarer_than_another():
    assert cider_d(CANDIDATES[:1], REFERENCES[:1]).tolist() == [0.0]


@pytest.mark.parametrize("measure", [cider_d, bleu, rouge_l])
@pytest.mark.parametrize("references", [[[]], [], [[["a"]], [["b"]]]], ids=["empty", "none", "too many"])
def test_a_caption_without_references_is_refused(measure, references):
    with pytest.raises(ValueError, match="each needs at least one"):
        measure([["a"]], references)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man, riding a wave.", ["a", "man", "riding", "a", "wave"]),
        ("It's a dog's toy!", ["it", "'s", "a", "dog", "'s", "toy"]),
        ("They don't know; we can't.", ["they", "do", "n't", "know", "we", "ca", "n't"]),
        ("I cannot see it", ["i", "can", "not", "see", "it"]),
        ("a red-haired woman (left)", ["a", "red-haired", "woman", "-lrb-", "left", "-rrb-"]),
        ('a sign that says "STOP"', ["a", "sign", "that", "says", "stop"]),
        ("2.5 meters at 3:30 -- 1,000 people ...", ["2.5", "meters", "at", "3:30", "1,000", "people"]),
        ("cats & dogs", ["cats", "&", "dogs"]),
        ("a 19-foot-tall statue in St. Lucia", ["a", "19-foot-tall", "statue", "in", "st.", "lucia"]),
        ("flag of the U.S., 8ball!!", ["flag", "of", "the", "u.s.", "8ball", "!!"]),
        ("ein kleiner Bär läuft", ["ein", "kleiner", "bär", "läuft"]),
        ("\u4e00 \u732b", ["\u4e00", "\u732b"]),
        ("It was 12:30pm, a 2.5m wall", ["it", "was", "12:30", "pm", "a", "2.5", "m", "wall"]),
        ("cats vs. dogs, Mr. Lee etc.", ["cats", "vs.", "dogs", "mr.", "lee", "etc."]),
        ("the '80s rock 'n' roll", ["the", "'80s", "rock", "'n'", "roll"]),
        ("Plan B. with vitamin C. He", ["plan", "b.", "with", "vitamin", "c", "he"]),
        ("R&B and black&white", ["r&b", "and", "black", "&", "white"]),
        ("see www.foo.com or a@b.co", ["see", "www.foo.com", "or", "a@b.co"]),
        ("the dog.The cat.svg", ["the", "dog.the", "cat.svg"]),
        ("y'all smile :) for £5", ["y'", "all", "smile", ":-rrb-", "for", "#", "5"]),
        ("a &amp; b&#39;s", ["a", "&", "b", "&#39;", "s"]),
        ("odd\x82 \x00sign", ["odd", "sign"]),
        ("", []),
        ("...", []),
    ],
)
def test_captions_are_cut_into_words_as_stanfords_tokenizer_does(text, words):
    assert tokens(text) == words


def test_common_words_weigh_less_than_rare_ones():
    references = [[["a", name]] for name in ("dog", "cat", "bus")]
    common, rare = (cider_d([[word]] * 3, references)[0] for word in ("a", "dog"))
    assert common < rare
    assert math.isfinite(rare)
