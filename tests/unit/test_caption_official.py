"""What is asked of pycocoevalcap, and what is done where it fails; the package itself has no part in it."""

import pytest
from small import coloured, tools

from beitctl.errors import SetupError
from beitctl_plugins.tasks.captioning import CIDER, Captioning
from beitctl_plugins.tasks.measures import official

PAIRS = coloured("red", "blue", captions=("a {} square",))


def test_without_java_the_official_scores_are_refused_before_training(monkeypatch):
    monkeypatch.setattr(official.shutil, "which", lambda name: None)
    with pytest.raises(SetupError, match="needs pycocoevalcap and Java"):
        Captioning(official=True).heads(tools())


class Lines:
    """Stands for the Java tokenizer: every line of its input is a caption."""

    def tokenize(self, texts):
        lines = "\n".join(one["caption"] for several in texts.values() for one in several).splitlines()
        return {number: [lines.pop(0) for _ in several] for number, several in texts.items()}


class Scorer:
    def __init__(self, value, *, fails=False):
        self.value, self.fails = value, fails

    def compute_score(self, truth, mine):
        if self.fails:
            raise OSError("no network")
        assert {number: len(texts) for number, texts in mine.items()} == dict.fromkeys(truth, 1)
        return self.value, []


def stand_in(monkeypatch, **scorers):
    """Put others in place of the package's tokenizer and scorers, by the name of the class."""
    made = {"PTBTokenizer": Lines(), "Bleu": Scorer([0.4, 0.3, 0.2, 0.1])} | scorers
    monkeypatch.setattr(official, "need", lambda: None)
    monkeypatch.setattr(official, "_made", lambda place, *_: made.get(place.split(".")[-1], Scorer(0.5)))


def test_official_scores_stand_beside_the_others(monkeypatch):
    stand_in(monkeypatch)
    metrics = Captioning(official=True).score([["a", "b"]], PAIRS.examples, tools(), PAIRS.open()).metrics
    found = {name: value for name, value in metrics.items() if name.startswith("official_")}
    assert (found["official_Bleu_4"], found["official_SPICE"], len(found)) == (0.1, 0.5, 8)
    assert next(iter(metrics)) == CIDER


def test_a_failing_spice_is_left_out_and_said(monkeypatch):
    stand_in(monkeypatch, Spice=Scorer(0, fails=True))
    found = official.scores(["a"], [["a", "b"]])
    assert ("SPICE" in found, found["without_SPICE"], found["METEOR"]) == (False, 1, 0.5)


def test_another_failing_scorer_is_refused(monkeypatch):
    stand_in(monkeypatch, Meteor=Scorer(0, fails=True))
    with pytest.raises(SetupError, match="pycocoevalcap does not work here"):
        official.scores(["a"], [["a"]])


def test_line_ends_within_a_caption_shift_no_other(monkeypatch):
    stand_in(monkeypatch)
    seen = []
    tokenizer = Lines()
    monkeypatch.setattr(tokenizer, "tokenize", lambda texts: seen.append(texts) or Lines().tokenize(texts))
    stand_in(monkeypatch, PTBTokenizer=tokenizer)
    official.scores(["a\u2028b", "c\x85", "\ud800"], [["d\ne", "f"], ["g\x0b h"], ["i"]])
    assert [[one["caption"] for one in several] for several in seen[0].values()] == [
        ["d e", "f"],
        ["g h"],
        ["i"],
    ]
    assert [several[0]["caption"] for several in seen[1].values()] == ["a b", "c", "?"]
