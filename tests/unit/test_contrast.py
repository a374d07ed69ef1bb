"""VLMo's contrast and matching: negatives, labels, and the losses as a plain computation gives them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import MODEL, Letters, coloured, png, rng, tools
from torch.nn import functional as F

from beitctl.api import Example, Item
from beitctl.data.batch import Portion, collate
from beitctl.engine.learner import HALF, MultiwayLearner, Objective, normalise
from beitctl.errors import UserError
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway
from beitctl_plugins.stages.shared import check_share
from beitctl_plugins.tasks.contrast import ContrastAndMatch, _drawn
from beitctl_plugins.tasks.masked import MaskedPair

VLMO = replace(
    MODEL, layers=3, fusion_layers=1, norm="pre", key_bias=False, layer_scale=0.1, text_norm=True,
    position="relative-per-block", token_types=2, mask_token=False, text_first=True,
)  # fmt: skip
LENGTHS = (3, 10, 2, 6)


def learner_of(*objectives):
    """A learner whose parameters are all away from where they begin, so that similarities differ."""
    made = objectives or (Objective("contrast", ContrastAndMatch()),)
    given_tools = dict.fromkeys([o.name for o in made], tools(model=VLMO))
    learner = MultiwayLearner(Multiway(VLMO), made, given_tools)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            parameter.copy_(initial(name, parameter.shape, VLMO, 0))
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return learner


def items(lengths=LENGTHS):
    draw = rng(3)
    return [
        Item(
            image=draw.integers(0, 256, (3, 16, 16), dtype=np.uint8),
            text=np.array([0, *draw.integers(4, 50, length - 2), 2]),
            chance=(float(draw.random()), float(draw.random())),
        )
        for length in lengths
    ]


def batch_of(found, keep=None, *others):
    return collate([Portion("contrast", "dual", found, keep), *others], VLMO)


def plain(learner, found, keep):
    """Contrast and matching, pair after pair; ``keep`` (samples, layers, 2) or None."""
    model, heads = learner.model, learner.heads
    images = [normalise(torch.from_numpy(item.image)[None], HALF) for item in found]
    texts = [torch.from_numpy(item.text)[None] for item in found]
    places = range(len(found))

    def encoded(image, text, of):
        packed, _ = model.pack(image, text)
        scales = None if keep is None else torch.from_numpy(keep[of])[:, :, None]
        return model.encoded(replace(packed, keep=scales), [2])

    seen = [encoded(images[i], None, i) for i in places]
    read = [encoded(None, texts[i], i) for i in places]
    contrast, tables = 0.0, {}
    for name, first in (
        ("contrastive", lambda one: one.rows[0]),
        ("contrastive_fused", lambda one: one.fused()[0]),
    ):
        head = heads[name]
        v = F.normalize(torch.stack([first(one) for one in seen]) @ head.vision.weight.T, dim=1)
        t = F.normalize(torch.stack([first(one) for one in read]) @ head.language.weight.T, dim=1)
        tables[name] = head.logit_scale.exp() * v @ t.T
        both = tables[name].log_softmax(1).diagonal() + tables[name].log_softmax(0).diagonal()
        contrast = contrast - both.sum() / 2
    table, matching = tables["contrastive"].detach().double(), 0.0
    for i in places:
        wrong_text = chosen(table[i], i, found[i].chance[0])
        wrong_picture = chosen(table[:, i], i, found[i].chance[1])
        for image, text, right in ((i, i, 1), (wrong_picture, i, 0), (i, wrong_text, 0)):
            pair = encoded(images[image], texts[text], i)
            logits = heads["matching"](heads["pooler"](pair.rows[VLMO.picture_tokens]))
            matching = matching - logits.log_softmax(0)[right]
    return contrast / 2, matching / 3


def chosen(logits, own, chance):
    """The other whose share of the softmax a number in 0..1 falls into."""
    shares = logits.exp().clone()
    shares[own] = 0
    shares = (shares / shares.sum()).tolist()
    for index, share in enumerate(shares):
        if chance < share:
            return index
        chance -= share
    raise AssertionError("a chance beyond 1")


KEEP = np.random.default_rng(5).choice([0.0, 1.0, 1.5], (4, 3, 2)).astype(np.float32)


@pytest.mark.parametrize("keep", [None, KEEP], ids=["whole", "stochastic depth"])
def test_both_losses_equal_a_plain_computation(keep):
    learner = learner_of().train()
    found = learner(batch_of(items(), keep))
    contrast, matching = plain(learner, items(), keep)
    assert found["contrast"][0].item() == pytest.approx(contrast.item(), rel=1e-4)
    assert found["contrast.match"][0].item() == pytest.approx(matching.item(), rel=1e-4)


@pytest.mark.parametrize("term", [0, 1], ids=["contrast", "matching"])
def test_gradients_equal_those_of_a_plain_computation(term):
    learner = learner_of().train()
    wanted = gradients(learner, plain(learner, items(), KEEP)[term])
    found = gradients(learner, list(learner(batch_of(items(), KEEP)).values())[term][0])
    for name, value in found.items():
        assert torch.allclose(value, wanted[name], rtol=1e-3, atol=1e-5), name


def gradients(learner, loss):
    named = dict(learner.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), found, strict=True)
    }


def test_negatives_follow_each_samples_own_chances():
    """The plain computation above tells the two chances apart, and those of the samples."""
    learner = learner_of()
    seen, read, scale = learner.outputs(batch_of(items()))["contrast"]
    table = (scale * seen @ read.T).detach().double()
    for rows in (table, table.T):
        drawn = [
            [chosen(rows[i], i, item.chance[which]) for i, item in enumerate(order)]
            for order in (items(), items()[::-1])
            for which in (0, 1)
        ]
        assert len(set(map(tuple, drawn))) == 4


def test_stochastic_depth_reaches_the_matching_pass(monkeypatch):
    passes = []
    encoded = Multiway.encoded
    monkeypatch.setattr(
        Multiway, "encoded", lambda self, packed, *a: passes.append(packed) or encoded(self, packed, *a)
    )
    learner_of().train()(batch_of(items(), KEEP))
    mine = torch.from_numpy(KEEP).permute(1, 2, 0)
    assert torch.equal(passes[1].keep, torch.cat([mine] * 3, dim=2))


def test_the_matching_pass_has_three_pairs_for_each_sample(monkeypatch):
    passes = []
    encoded = Multiway.encoded
    monkeypatch.setattr(
        Multiway, "encoded", lambda self, packed, *a: passes.append(packed) or encoded(self, packed, *a)
    )
    learner_of()(batch_of(items()))
    assert [len(one.layout.plan.pair_lengths) for one in passes] == [0, 12]
    assert passes[1].layout.plan.pair_lengths[:8] == LENGTHS * 2


def test_losses_are_the_same_beside_other_objectives():
    pair = MaskedPair(image_mask_ratio=0.0)
    learner = learner_of(Objective("words", pair), Objective("contrast", ContrastAndMatch()))
    words = [pair.prepare(e, rng(), tools(model=VLMO)) for e in coloured("red", "blue").examples]
    beside = learner(batch_of(items(), None, Portion("words", "pair", words)))
    empty = learner(batch_of(items(), None, Portion("words", "pair", [])))
    for term in ("contrast", "contrast.match"):
        assert beside[term][0].item() == pytest.approx(empty[term][0].item(), rel=1e-4)


@pytest.mark.parametrize(("bias", "right"), [((0.0, 50.0), 1), ((50.0, 0.0), 2)], ids=["match", "no match"])
def test_a_third_of_the_pairs_match(bias, right):
    learner = learner_of()
    with torch.no_grad():
        learner.heads["matching"].weight.zero_()
        learner.heads["matching"].bias.copy_(torch.tensor(bias))
    total, hits = learner(batch_of(items()))["contrast.match"]
    assert hits.item() == pytest.approx(4 * right / 3)
    assert total.item() == pytest.approx(50 * (12 - 4 * right) / 3)


def test_right_answers_of_contrast_are_pictures_that_find_their_text():
    learner = learner_of()
    seen, read, scale = learner.outputs(batch_of(items()))["contrast"]
    wanted = ((scale * seen @ read.T).argmax(1) == torch.arange(4)).sum()
    assert learner(batch_of(items()))["contrast"][1] == wanted


def test_the_similarities_that_negatives_are_drawn_from_get_no_gradient():
    learner = learner_of()
    learner(batch_of(items()))["contrast.match"][0].backward()
    for name in ("contrastive", "contrastive_fused"):
        assert all(p.grad is None or not p.grad.any() for p in learner.heads[name].parameters())


def test_without_matching_there_is_one_term_and_no_head_for_it():
    task = ContrastAndMatch(match=False)
    learner = learner_of(Objective("contrast", task))
    assert sorted(learner.heads) == ["contrastive", "contrastive_fused"]
    assert list(learner(batch_of(items()))) == list(learner.weights) == ["contrast"]


def test_matching_has_the_weight_of_the_recipe():
    learner = learner_of(Objective("contrast", ContrastAndMatch(match_weight=0.25), 2.0))
    assert learner.weights == {"contrast": 2.0, "contrast.match": 0.5}


def test_contrast_without_experts_of_pairs_is_refused():
    with pytest.raises(UserError, match="needs vision-language experts: set fusion_layers above 0"):
        ContrastAndMatch().heads(tools(model=replace(VLMO, fusion_layers=0)))


def test_the_output_is_unit_vectors_and_the_scale():
    seen, read, scale = learner_of().outputs(batch_of(items()))["contrast"]
    assert torch.allclose(torch.cat([seen, read]).norm(dim=1), torch.ones(8), atol=1e-5)
    assert scale.shape == (1,)


EXTREMES = [0.0, 1e-30, 0.5, 0.999999, 1 - 2**-26]
"""The last is a number below 1 that is 1 in fp32."""
TABLES = {
    "ties": torch.zeros(4, 4),
    "own ahead": 5.0 * torch.eye(4),
    "own far ahead": 300.0 * torch.eye(4),
    "one far ahead": torch.tensor([[300.0, 0, 0, 0]] * 4),
    "last far ahead": torch.tensor([[0, 0, 0, 300.0]] * 4),
    "two pairs": torch.tensor([[1.0, -1.0], [-1.0, 1.0]]),
}


@pytest.mark.parametrize("chance", EXTREMES)
@pytest.mark.parametrize("table", TABLES)
def test_a_negative_is_never_ones_own_pair(table, chance):
    logits = TABLES[table]
    own = torch.arange(len(logits))
    found = _drawn(logits, own, torch.full((len(logits),), chance, dtype=torch.float32))
    assert not (found == own).any()
    assert ((found >= 0) & (found < len(logits))).all()


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=6), st.floats(0, 1, width=32), st.data())
def test_no_similarities_lead_to_ones_own_pair(row, chance, data):
    own = data.draw(st.integers(0, len(row) - 1))
    assert _drawn(torch.tensor([row]), torch.tensor([own]), torch.tensor([chance])).item() != own


@pytest.mark.parametrize("chance", EXTREMES[:-1])
def test_what_has_no_share_is_not_drawn(chance):
    found = _drawn(torch.tensor([[-300.0, 300, -300, 0]]), torch.tensor([3]), torch.tensor([chance]))
    assert found.tolist() == [1]


@pytest.mark.parametrize("own", [0, 2, 3])
def test_negatives_are_drawn_by_the_softmax_of_the_others(own):
    row = torch.tensor([0.5, -1.0, 1.5, 0.0])
    chances = (torch.arange(20_000) + 0.5) / 20_000
    found = _drawn(row.expand(20_000, 4), torch.full((20_000,), own), chances)
    shares = row.exp()
    shares[own] = 0
    assert torch.allclose(found.bincount(minlength=4) / 20_000, shares / shares.sum(), atol=2e-4)


def test_own_pairs_of_other_ranks_may_be_drawn():
    own = torch.tensor([2, 3])
    found = [_drawn(torch.zeros(2, 4), own, torch.full((2,), c)).tolist() for c in (0.0, 0.5, 0.9)]
    assert found == [[0, 0], [1, 1], [3, 2]]


def prepared(caption="cat", train=True, seed=0, **settings):
    example = Example("x", png(), (caption,))
    return ContrastAndMatch(**settings).prepare(example, rng(seed), tools(model=VLMO, train=train))


def test_an_item_is_a_picture_its_framed_caption_and_two_chances():
    item = prepared()
    assert item.image.shape == (3, 16, 16)
    assert item.text.tolist() == [0, *Letters().encode("cat"), 2]
    assert len(item.chance) == 2
    assert item.chance[0] != item.chance[1]


def test_chances_depend_on_the_draw():
    assert prepared(seed=1).chance == prepared(seed=1).chance != prepared(seed=2).chance


@pytest.mark.parametrize(("setting", "length"), [(0, VLMO.text_tokens), (6, 6), (2, 2)])
def test_a_caption_that_is_too_long_is_cut_and_still_ends(setting, length):
    text = prepared("a very long caption", text_tokens=setting).text
    assert text.tolist() == [0, *Letters().encode("a very long caption")[: length - 2], 2]


def test_captions_longer_than_the_models_texts_are_refused():
    with pytest.raises(UserError, match=r"the task's text_tokens \(11\) exceed the model's \(10\)"):
        prepared(text_tokens=11)


@pytest.mark.parametrize("task", [ContrastAndMatch(text_tokens=1), MaskedPair(text_tokens=1)])
def test_captions_without_room_for_a_word_are_refused(task):
    with pytest.raises(UserError, match=r"text_tokens \(1\) must be 0 or at least 2: start and end take two"):
        task.prepare(Example("x", png(), ("cat",)), rng(), tools())


def test_one_sample_has_nothing_to_be_compared_with():
    with pytest.raises(UserError, match="pairs: a contrastive task compares samples; it needs at least 2, f"):
        check_share("pairs", ContrastAndMatch(), 1, 0, None)


def test_toy_size_reads_texts_of_the_toy_models_length():
    assert ContrastAndMatch.smoke({"text_tokens": 40, "match_weight": 0.5}) == {
        "text_tokens": 0,
        "match_weight": 0.5,
    }


def test_the_fused_route_is_asked_for_where_the_experts_of_pairs_begin():
    assert ContrastAndMatch().depths(VLMO) == list(learner_of().encode(batch_of(items())).inner) == [2]
