"""The heads of the family, and the model that a file's heads ask for."""

from dataclasses import replace

import pytest
import torch
from small import MODEL
from torch import nn
from torch.nn import functional as F

from beitctl.checkpoints import models
from beitctl.checkpoints.models import MODELS, model_with
from beitctl.model.dense import Segmenter
from beitctl.model.heads import Aggregation, BertHead, Classifier, ContrastiveHead, MlpHead, Pooler

DEIT = replace(MODEL, vocabulary=0, text_tokens=0, distill_token=True)
VLMO = replace(MODEL, layers=2, fusion_layers=1)


def filled(module):
    """The module with random parameters, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def tokens(config=MODEL, count=3):
    return torch.randn(count, config.picture_tokens, config.width, generator=torch.Generator().manual_seed(1))


def vectors(seed=2):
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


def test_a_model_without_a_final_norm_is_read_by_its_mean_patch_under_a_norm():
    head = filled(Classifier(replace(MODEL, final_norm=False), 5))
    mean = torch.stack([tokens()[:, place] for place in range(1, 17)]).sum(0) / 16
    normed = F.layer_norm(mean, (8,), head.norm.weight, head.norm.bias, MODEL.norm_eps)
    assert torch.allclose(head(tokens()), normed @ head.linear.weight.T + head.linear.bias, atol=1e-5)


def test_a_model_with_a_final_norm_is_read_by_its_class_token():
    head = filled(Classifier(MODEL, 5))
    assert head.norm is None
    assert torch.equal(head(tokens()), head.linear(tokens()[:, 0]))


def test_the_mean_patch_leaves_both_of_deits_tokens_out():
    head = filled(Classifier(replace(DEIT, final_norm=False), 5))
    seen = tokens(DEIT)
    by_class, _ = head.both(seen)
    assert torch.allclose(by_class, head.linear(head.norm(seen[:, 2:].mean(1))), atol=1e-5)


def test_both_logits_of_deit_are_those_of_its_two_tokens():
    head = filled(Classifier(DEIT, 5))
    by_class, by_teacher = head.both(tokens(DEIT))
    assert torch.equal(by_class, head.linear(tokens(DEIT)[:, 0]))
    assert torch.equal(by_teacher, head.distilled(tokens(DEIT)[:, 1]))


def test_the_prediction_of_deit_is_the_mean_of_both():
    head = filled(Classifier(DEIT, 5))
    assert torch.allclose(head(tokens(DEIT)), torch.stack(head.both(tokens(DEIT))).mean(0), atol=1e-5)


def test_a_model_with_one_class_token_has_no_second_logits():
    head = Classifier(MODEL, 5)
    assert head.both(tokens())[1] is None
    assert "distilled.weight" not in head.state_dict()


def test_a_pooler_is_tanh_of_a_linear_layer():
    head = filled(Pooler(8, norm=False))
    x = vectors()
    assert torch.allclose(head(x), torch.tanh(x @ head.linear.weight.T + head.linear.bias), atol=1e-5)
    assert sorted(head.state_dict()) == ["linear.bias", "linear.weight"]


def test_a_pooler_may_have_a_norm_before_it():
    head, x = filled(Pooler(8, norm=True)), vectors()
    normed = F.layer_norm(x, (8,), head.norm.weight, head.norm.bias, 1e-5)
    assert torch.allclose(head(x), torch.tanh(head.linear(normed)), atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_an_mlp_head_is_linear_norm_gelu_linear(norm):
    head, x = filled(MlpHead(8, 6, 4, norm)), vectors()
    before = F.layer_norm(x, (8,), head.norm.weight, head.norm.bias, 1e-5) if norm else x
    inner = F.layer_norm(head.up(before), (6,), head.inner_norm.weight, head.inner_norm.bias, 1e-5)
    assert torch.allclose(head(x), head.out(F.gelu(inner)), atol=1e-5)
    assert head(x).shape == (3, 4)


def test_berts_head_is_linear_gelu_norm_linear():
    head, x = filled(BertHead(8, 30)), vectors()
    inner = F.layer_norm(F.gelu(head.transform(x)), (8,), head.norm.weight, head.norm.bias, 1e-12)
    assert torch.allclose(head(x), head.out(inner), atol=1e-5)
    assert head(x).shape == (3, 30)


def test_a_contrastive_head_gives_unit_vectors_of_its_two_projections():
    head = filled(ContrastiveHead(8))
    pictures, texts = vectors(), vectors(3)
    seen, read, scale = head(pictures, texts)
    assert torch.allclose(seen, F.normalize(pictures @ head.vision.weight.T, dim=1), atol=1e-5)
    assert torch.allclose(read, F.normalize(texts @ head.language.weight.T, dim=1), atol=1e-5)
    assert torch.allclose(scale, head.logit_scale.exp())


def test_contrastive_vectors_are_fp32_whatever_is_computed_in():
    found = filled(ContrastiveHead(8)).bfloat16()(vectors().bfloat16(), vectors().bfloat16())
    assert {value.dtype for value in found} == {torch.float32}


def test_extra_blocks_carry_the_numbers_behind_the_early_ones():
    assert list(Aggregation(MODEL, 9, 2).blocks) == ["9", "10"]


def shapes(**heads):
    """Shapes of the tensors of some heads, as a file has them."""
    return {name: value.shape for name, value in nn.ModuleDict(heads).state_dict().items()}


POOLER, CONTRAST = {"pooler": Pooler(8, norm=False)}, {"contrastive": ContrastiveHead(8)}
WORDS = {"text_tokens": nn.Linear(8, 52)}
HEADS = {
    "classifier": (models.ClassificationModel, {"classifier": Classifier(MODEL, 5)}),
    "text classifier": (models.TextClassificationModel, {"text_classifier": nn.Linear(8, 5)}),
    "segmenter": (models.SegmentationModel, {"segmenter": Segmenter(VLMO, 5, auxiliary=True)}),
    "retrieval": (models.RetrievalModel, CONTRAST),
    "retrieval and pooler": (models.RetrievalModel, CONTRAST | POOLER),
    "answers": (models.AnswerModel, {"answers": MlpHead(8, 16, 5)} | POOLER),
    "reasoning": (models.ReasoningModel, {"reasoning": MlpHead(32, 16, 2, norm=True)}),
    "VLMo's reasoning": (models.ReasoningModel, {"reasoning": MlpHead(16, 16, 2)} | POOLER),
    "captions": (models.CaptioningModel, {"captions": nn.Linear(8, 52)}),
    "pooler": (models.PooledModel, POOLER),
    "codes": (models.MaskedModel, {"image_codes": nn.Linear(8, 40)}),
    "codes and words": (models.MaskedModel, {"image_codes": nn.Linear(8, 40)} | WORDS),
    "bottleneck": (
        models.MaskedModel,
        {"image_codes": nn.Linear(8, 40), "aggregation": Aggregation(VLMO, 1, 2)},
    ),
    "words and pooler": (models.MaskedModel, {"text_tokens": BertHead(8, 52)} | POOLER),
    "VLMo": (
        models.MatchingModel,
        CONTRAST | POOLER | WORDS | {"contrastive_fused": ContrastiveHead(8), "matching": nn.Linear(8, 2)},
    ),
    "contrast and words": (models.MatchingModel, CONTRAST | WORDS),
    "contrast and codes": (models.MatchingModel, {"image_codes": nn.Linear(8, 40)} | CONTRAST),
}


def test_every_class_is_chosen_by_some_heads():
    assert {kind for kind, _ in HEADS.values()} == set(MODELS)


@pytest.mark.parametrize("name", HEADS)
def test_the_class_is_the_one_that_has_the_heads(name):
    kind, heads = HEADS[name]
    assert type(model_with(VLMO, shapes(**heads))) is kind


@pytest.mark.parametrize("name", HEADS)
def test_the_model_has_the_tensors_of_its_heads_and_no_others(name):
    wanted = shapes(**HEADS[name][1])
    made = model_with(VLMO, wanted)
    assert {key: value.shape for key, value in made.heads.state_dict().items()} == wanted


@pytest.mark.parametrize(
    "heads",
    [{}, {"answers": MlpHead(8, 16, 5)}, {"strange": nn.Linear(8, 2)}, {"matching": nn.Linear(8, 2)}],
    ids=["none", "no pooler", "strange", "matching without its pooler"],
)
def test_no_class_has_other_heads(heads):
    assert model_with(VLMO, shapes(**heads)) is None


def test_extra_blocks_begin_where_their_numbers_do():
    made = model_with(replace(MODEL, layers=5), shapes(**{
        "image_codes": nn.Linear(8, 40), "aggregation": Aggregation(MODEL, 3, 2)
    }))  # fmt: skip
    assert made.depths() == [3]


def test_the_fused_vectors_need_the_rows_where_the_experts_of_pairs_begin():
    assert model_with(VLMO, shapes(**HEADS["VLMo"][1])).depths() == [1]


INPUTS = {"image": torch.zeros(2, 3, 16, 16), "text": torch.zeros(2, 4, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("classifier", ["image"], (2, 5)),
        ("answers", ["image", "text"], (2, 5)),
        ("captions", ["image", "text"], (2, 4, 52)),
        ("pooler", ["image"], (2, 8)),
        ("pooler", ["text"], (2, 8)),
        ("pooler", ["image", "text"], (2, 8)),
    ],
)
def test_the_output_has_a_row_for_every_sample(name, inputs, expected):
    made = filled(model_with(VLMO, shapes(**HEADS[name][1])))
    assert made(**{key: INPUTS[key] for key in inputs}).shape == expected


@pytest.mark.parametrize("name", ["reasoning", "VLMo's reasoning"])
def test_reasoning_reads_both_pictures_in_their_order(name):
    made = filled(model_with(replace(VLMO, token_types=3), shapes(**HEADS[name][1])))
    pictures = list(two_pictures())
    found = [made(a, INPUTS["text"], image2=b) for a in pictures for b in pictures]
    assert found[0].shape == (2, 2)
    assert not any(torch.allclose(found[i], found[j]) for i in range(4) for j in range(i))


def two_pictures():
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))


@pytest.mark.parametrize(
    ("name", "inputs", "expected"),
    [
        ("codes and words", ["image"], {"image": (2, 16, 40)}),
        ("codes and words", ["text"], {"text": (2, 4, 52)}),
        ("codes and words", ["image", "text"], {"image": (2, 16, 40), "text": (2, 4, 52)}),
        ("bottleneck", ["image"], {"image": (2, 16, 40), "class": (2, 16, 40)}),
        ("VLMo", ["image", "text"], {"match": (2, 2), "text": (2, 4, 52)}),
    ],
)
def test_a_pretraining_model_says_what_its_heads_can(name, inputs, expected):
    made = filled(model_with(VLMO, shapes(**HEADS[name][1])))
    found = made(**{key: INPUTS[key] for key in inputs})
    assert {key: tuple(value.shape) for key, value in found.items()} == expected


@pytest.mark.parametrize("name", ["retrieval", "VLMo"])
def test_vectors_of_pictures_and_texts_have_length_one(name):
    made = filled(model_with(VLMO, shapes(**HEADS[name][1])))
    image, _ = two_pictures()
    for found in (made.embed_image(image), made.embed_text(INPUTS["text"])):
        assert torch.allclose(found.norm(dim=-1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize(
    ("text_first", "reads"), [(True, "text"), (False, "picture")], ids=["text first", "picture first"]
)
def test_a_pair_is_pooled_by_its_first_token(text_first, reads):
    made = filled(model_with(replace(VLMO, text_first=text_first), shapes(**POOLER)))
    packed, _ = made.model.pack(**INPUTS)
    rows, plan = made.model.encode(packed), packed.layout.plan
    first = {"text": plan.text_starts[:2], "picture": [0, plan.picture_tokens]}[reads]
    assert torch.allclose(made(**INPUTS), made.heads["pooler"](rows[first]), atol=1e-5)


def test_codes_learnt_beside_contrast_are_given_for_every_patch():
    made = filled(model_with(VLMO, shapes(**HEADS["contrast and codes"][1])))
    assert made(**INPUTS)["image"].shape == (2, VLMO.patches, 40)
