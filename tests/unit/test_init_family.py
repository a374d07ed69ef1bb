"""Initial weights of the family: every row of the table in the docstring of ``initial``."""

import math
from dataclasses import replace

import pytest
import torch

from beitctl import recipe, smoke
from beitctl.api import Tools
from beitctl.config import ModelConfig
from beitctl.engine.learner import MultiwayLearner, Objective
from beitctl.model.heads import Aggregation
from beitctl.model.init import initial
from beitctl.model.multiway import Multiway

PRE = ModelConfig(
    layers=12, width=768, heads=12, ffn=3072, norm="pre", key_bias=False, layer_scale=0.1,
    position="relative-shared", vocabulary=900, text_tokens=20, text_norm=True, token_types=2,
)  # fmt: skip
SUB = replace(PRE, norm="sub", position="absolute", text_norm=False)
CUT = 0.02 * math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(0.5)))
"""Deviation of N(0, .02) that is cut at one deviation: .0108."""
D, F = 768, 3072
BLOCK = "model.blocks.3."
SHAPES = {
    "query": (f"{BLOCK}attention.shared.qkv.weight", (3 * D, D)),
    "key": (f"{BLOCK}attention.shared.qkv.weight", (3 * D, D)),
    "value": (f"{BLOCK}attention.shared.qkv.weight", (3 * D, D)),
    "fc1": (f"{BLOCK}ffn.vision.fc1.weight", (F, D)),
    "output projection": (f"{BLOCK}attention.shared.out.weight", (D, D)),
    "fc2": (f"{BLOCK}ffn.fusion.fc2.weight", (D, F)),
    "patch projection": ("model.vision_embed.proj.weight", (D, D)),
    "head": ("heads.image_codes.weight", (500, D)),
    "pooler": ("heads.pooler.linear.weight", (D, D)),
    "classifier": ("heads.classifier.linear.weight", (500, D)),
    "classifier of the distillation token": ("heads.classifier.distilled.weight", (500, D)),
    "NLVR2's head, up": ("heads.reasoning.up.weight", (500, D)),
    "NLVR2's head, out": ("heads.reasoning.out.weight", (500, D)),
    "VQA's head": ("heads.answers.out.weight", (500, D)),
    "picture positions": ("model.vision_embed.position", (197, D)),
    "text positions": ("model.text_embed.position.weight", (196, D)),
    "text embedding": ("model.text_embed.token.weight", (900, D)),
    "class token": ("model.vision_embed.cls_token", (40_000,)),
    "distillation token": ("model.vision_embed.distill_token", (40_000,)),
    "mask token": ("model.vision_embed.mask_token", (40_000,)),
    "token types": ("model.token_type.weight", (100, D)),
    "token type of BERT": ("model.text_embed.type_row", (40_000,)),
}
PART = {"query": slice(0, D), "key": slice(D, 2 * D), "value": slice(2 * D, 3 * D)}
GAIN = math.sqrt(math.log(24))
XAVIER = {name: math.sqrt(2 / (a + b)) for name, (a, b) in {"square": (D, D), "ffn": (D, F)}.items()}
PLAIN = ["query", "key", "value", "fc1", "patch projection", "head", "pooler", "VQA's head", "token types"]
SMALL = [name for name in SHAPES if name.startswith(("classifier", "NLVR2"))]
BEIT = {
    **dict.fromkeys([*PLAIN, "token type of BERT"], CUT),
    **dict.fromkeys(["picture positions", "text positions", "text embedding"], CUT),
    **dict.fromkeys(["class token", "distillation token", "mask token"], CUT),
    **dict.fromkeys(["output projection", "fc2"], CUT / math.sqrt(8)),
    **dict.fromkeys(SMALL, CUT / 1000),
}
MAGNETO = BEIT | {
    "query": XAVIER["square"],
    "key": XAVIER["square"],
    "value": GAIN * XAVIER["square"],
    "output projection": GAIN * XAVIER["square"],
    "fc1": GAIN * XAVIER["ffn"],
    "fc2": GAIN * XAVIER["ffn"],
    "patch projection": XAVIER["square"],
    "text embedding": D**-0.5,
}
RELEASED = BEIT | {
    **dict.fromkeys(["output projection", "fc2"], CUT),
    "patch projection": D**-0.5 / math.sqrt(3),
    **dict.fromkeys(["picture positions", "text positions"], 1.0),
    "text embedding": D**-0.5,
    **dict.fromkeys(["class token", "distillation token", "mask token"], 0.0),
}
COLUMNS = {
    "beit, pre": (replace(PRE, init="beit"), BEIT),
    "beit, sub": (replace(SUB, init="beit"), BEIT),
    "magneto, pre": (replace(PRE, init="magneto"), MAGNETO),
    "magneto, sub": (replace(SUB, init="magneto"), MAGNETO),
    "released, pre": (replace(PRE, init="released"), BEIT),
    "released, sub": (replace(SUB, init="released"), RELEASED),
}


def value(name, shape, config, seed=0):
    return initial(name, torch.Size(shape), config, seed)


def test_the_deviation_of_the_cut_normal_is_the_measured_one():
    assert pytest.approx(0.0108, rel=0.002) == CUT


@pytest.mark.parametrize("row", SHAPES)
@pytest.mark.parametrize("column", COLUMNS)
def test_a_weight_has_the_deviation_of_its_row(column, row):
    config, expected = COLUMNS[column]
    found = value(*SHAPES[row], config)[PART.get(row, slice(None))]
    assert float(found.std()) == pytest.approx(expected[row], rel=0.02)
    assert abs(float(found.mean())) <= 0.02 * expected[row]


@pytest.mark.parametrize("row", ["query", "fc1", "head", "mask token"])
def test_truncated_normals_are_cut_at_one_deviation(row):
    found = value(*SHAPES[row], COLUMNS["beit, pre"][0])
    assert 0.0199 < float(found.abs().max()) <= 0.02


def test_the_released_patch_projection_is_uniform():
    found = value(*SHAPES["patch projection"], COLUMNS["released, sub"][0])
    assert 0.999 * D**-0.5 < float(found.abs().max()) <= D**-0.5


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.relative.table", (732, 12), 0.0),
        ("model.blocks.3.relative.table", (732, 12), 0.0),
        ("model.blocks.3.attention_scale", (D,), 0.1),
        ("model.blocks.3.ffn_scale", (D,), 0.1),
        ("model.blocks.3.attention.shared.q_bias", (D,), 0.0),
        ("model.blocks.3.attention.shared.v_bias", (D,), 0.0),
        ("model.blocks.3.attention.shared.qkv.bias", (3 * D,), 0.0),
        ("model.blocks.3.ffn.vision.fc1.bias", (F,), 0.0),
        ("model.vision_embed.proj.bias", (D,), 0.0),
        ("heads.classifier.linear.bias", (5,), 0.0),
        ("model.norm.shared.weight", (D,), 1.0),
        ("model.norm.shared.bias", (D,), 0.0),
        ("model.blocks.3.attention.shared.inner_norm.weight", (D,), 1.0),
        ("model.text_embed.norm.weight", (D,), 1.0),
        ("model.text_embed.norm.bias", (D,), 0.0),
        ("heads.classifier.norm.weight", (D,), 1.0),
        ("heads.contrastive.logit_scale", (1,), math.log(1 / 0.07)),
    ],
)
def test_a_constant_is_that_of_its_row(column, name, shape, expected):
    assert torch.equal(value(name, shape, COLUMNS[column][0]), torch.full(shape, expected))


@pytest.mark.parametrize("number", [0, 3, 11])
@pytest.mark.parametrize("layer", ["attention.shared.out.weight", "ffn.language.fc2.weight"])
def test_output_matrices_are_divided_by_the_root_of_twice_their_block(layer, number):
    found = value(f"model.blocks.{number}.{layer}", (D, D), replace(PRE, init="beit"))
    assert float(found.std()) == pytest.approx(CUT / math.sqrt(2 * (number + 1)), rel=0.02)


EXTRA = "heads.aggregation.blocks.{}."


@pytest.mark.parametrize("number", [9, 10])
@pytest.mark.parametrize("layer", ["attention.shared.out.weight", "ffn.vision.fc2.weight"])
@pytest.mark.parametrize(
    ("init", "start"), [("beit", CUT), ("released", D**-0.5 / math.sqrt(3))], ids=["beit", "released"]
)
def test_output_matrices_of_extra_blocks_are_divided_by_their_number_behind_the_early_ones(
    init, start, layer, number
):
    found = value(EXTRA.format(number) + layer, (D, D), replace(PRE, init=init))
    assert float(found.std()) == pytest.approx(start / math.sqrt(2 * (number + 1)), rel=0.02)


MEASURED = {  # model-spec 1.2: standard deviations in a model that the released code has built
    "model.blocks.0.attention.shared.qkv.weight": 0.0108,
    "model.blocks.0.ffn.vision.fc1.weight": 0.0108,
    "model.blocks.0.ffn.vision.fc1.bias": 0.0,
    EXTRA.format(9) + "attention.shared.qkv.weight": 0.0208,
    EXTRA.format(9) + "ffn.vision.fc1.weight": 0.0208,
    EXTRA.format(9) + "ffn.vision.fc1.bias": 0.021,
}
WIDE = {"qkv.weight": (3 * D, D), "fc1.weight": (F, D), "fc1.bias": (F,)}


@pytest.mark.parametrize("name", MEASURED)
def test_extra_blocks_of_the_released_beit_v2_are_as_wide_as_measured(name):
    shape = next(shape for end, shape in WIDE.items() if name.endswith(end))
    found = float(value(name, shape, replace(PRE, init="released")).std())
    assert found == pytest.approx(MEASURED[name], rel=0.02)


@pytest.mark.parametrize(
    ("layer", "shape", "bound"),
    [
        ("attention.shared.out.bias", (D,), D**-0.5),
        ("ffn.vision.fc1.bias", (F,), D**-0.5),
        ("ffn.vision.fc2.bias", (D,), F**-0.5),
    ],
)
def test_biases_of_extra_blocks_of_the_released_beit_v2_are_uniform(layer, shape, bound):
    found = value(EXTRA.format(9) + layer, shape, replace(PRE, init="released"))
    assert 0.98 * bound < float(found.abs().max()) <= bound
    assert float(found.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [("attention.shared.norm.weight", 1.0), ("ffn.vision.norm.bias", 0.0), ("ffn_scale", 0.1)],
)
def test_norms_and_scales_of_extra_blocks_begin_like_all_others(layer, expected):
    found = value(EXTRA.format(9) + layer, (D,), replace(PRE, init="released"))
    assert torch.equal(found, torch.full((D,), expected))


@pytest.mark.parametrize("init", ["beit", "magneto"])
def test_biases_of_extra_blocks_begin_at_zero_otherwise(init):
    assert not value(EXTRA.format(9) + "ffn.vision.fc1.bias", (F,), replace(PRE, init=init)).any()


@pytest.mark.parametrize(
    "change",
    [{"layers": 20}, {"vocabulary": 0, "text_tokens": 0}, {"fusion_layers": 2}, {"drop_path": 0.3}],
    ids=["blocks", "no language", "experts of pairs", "stochastic depth"],
)
def test_a_value_does_not_depend_on_what_else_the_model_holds(change):
    first, second = replace(PRE, init="beit"), replace(PRE, init="beit", **change)
    for row in ("query", "fc2", "patch projection", "head", "class token"):
        assert torch.equal(value(*SHAPES[row], first), value(*SHAPES[row], second)), row


def test_parameters_of_one_shape_begin_with_values_of_their_own():
    names = [f"model.blocks.{n}.ffn.{e}.fc1.weight" for n in (0, 1) for e in ("vision", "language")]
    found = [value(name, (40, 40), replace(PRE, init="beit")) for name in names]
    assert len({tuple(x.flatten().tolist()) for x in found}) == 4


@pytest.mark.parametrize("init", ["beit", "magneto", "released"])
@pytest.mark.parametrize("norm", ["pre", "sub"])
def test_every_parameter_of_a_bottleneck_has_a_rule(norm, init):
    config = replace(PRE, width=8, heads=2, ffn=8, norm=norm, init=init, position="relative-per-block")
    for name, parameter in Aggregation(config, 9, 2).named_parameters():
        found = initial(f"heads.aggregation.{name}", parameter.shape, config, 0)
        assert found.shape == parameter.shape, name
        assert torch.isfinite(found).all(), name


class Codes:
    """A token store with the grid of every toy model."""

    codes, grid = 32, 4


class Words:
    """A text tokenizer of the toy models' size."""

    size = 402


def tables():
    """Every table of every recipe that pretrains."""
    found = []
    for name in recipe.names():
        keys = [key for key, table in recipe.load(name).tables.items() if table.stage == "pretrain"]
        found += [(name, key) for key in keys]
    return found


@pytest.mark.parametrize(("name", "key"), tables())
def test_every_parameter_of_a_recipes_toy_model_has_a_rule(name, key):
    stage = smoke.shrunk(recipe.load(name), "pretrain", [key]).tables[key].plugin
    tools = Tools(stage.model, Words(), Codes(), labels=("first", "second"))
    objectives = [Objective(n, table.task) for n, table in stage.objectives.items()]
    learner = MultiwayLearner(Multiway(stage.model), objectives, dict.fromkeys(stage.objectives, tools))
    for parameter, tensor in learner.named_parameters():
        found = initial(parameter, tensor.shape, stage.model, 0)
        assert found.shape == tensor.shape, parameter
        assert torch.isfinite(found).all(), parameter
