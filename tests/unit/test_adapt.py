"""Weights for a model with other settings: what can change, what is refused, that nothing gets lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import MODEL, weights

from beitctl.checkpoints import resize
from beitctl.checkpoints.adapt import adapted
from beitctl.checkpoints.loading import load_model
from beitctl.checkpoints.native import fit, save_model
from beitctl.errors import DataError, UserError
from beitctl.model.heads import Aggregation
from beitctl.model.multiway import Multiway
from beitctl.model.relative import picture_rows, table_rows

BASE = replace(MODEL, layers=2, image_px=(16, 12), norm="pre", key_bias=False)
SHARED = replace(BASE, position="relative-shared")
BLOCKS = replace(BASE, position="relative-per-block")
PICTURES = {"vocabulary": 0, "text_tokens": 0}
BEIT = replace(SHARED, **PICTURES, layer_scale=0.1)
TEXT = replace(
    BEIT, position="relative-per-block", mask_token=False, vocabulary=52, text_tokens=10, text_norm=True,
    token_types=2, text_first=True,
)  # fmt: skip
PAIRS = replace(TEXT, fusion_layers=1)
TABLES = [f"model.blocks.{n}.relative.table" for n in (0, 1)]
TABLE, POSITION, TYPES = "model.relative.table", "model.vision_embed.position", "model.token_type.weight"


def tensors(config):
    """Weights of a model, none of which is trivially zero or one."""
    generator = torch.Generator().manual_seed(0)
    found = weights(Multiway(config), "model.", config)
    return {name: torch.randn(value.shape, generator=generator) for name, value in found.items()}


def shapes(config):
    return {f"model.{name}": value.shape for name, value in Multiway(config).state_dict().items()}


def same(found, given, *changed):
    """All tensors but some are the given ones, bit for bit and under their names."""
    kept = {name: value for name, value in found.items() if name not in changed}
    wanted = {name: value for name, value in given.items() if name not in changed}
    return set(kept) == set(wanted) and all(torch.equal(value, wanted[name]) for name, value in kept.items())


ALLOWED = {
    "nothing": (SHARED, {}),
    "larger pictures": (SHARED, {"image_px": (24, 32)}),
    "smaller pictures": (BLOCKS, {"image_px": 8}),
    "larger pictures, learned positions": (BASE, {"image_px": 32}),
    "the same size said otherwise": (replace(SHARED, image_px=16), {"image_px": (16, 16)}),
    "a table for each block": (SHARED, {"position": "relative-per-block"}),
    "a table for each block, larger": (SHARED, {"position": "relative-per-block", "image_px": (24, 12)}),
    "no final norm": (BASE, {"final_norm": False}),
    "no final norms": (replace(BASE, attention="decoupled"), {"final_norm": False}),
    "no mask token": (BASE, {"mask_token": False}),
    "a third token type": (replace(BASE, token_types=2), {"token_types": 3}),
    "stochastic depth": (BASE, {"drop_path": 0.3}),
    "initialisation": (BASE, {"init": "beit"}),
    "normalisation of pixels": (BASE, {"pixels": "imagenet"}),
    "text first": (BASE, {"text_first": True}),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_an_allowed_change_gives_all_tensors_of_the_other_model_and_no_others(name):
    source, change = ALLOWED[name]
    target = replace(source, **change)
    found = adapted(tensors(source), source, target)
    assert {name: value.shape for name, value in found.items()} == shapes(target)


def test_weights_for_the_same_settings_are_the_given_ones():
    given = tensors(SHARED)
    assert same(adapted(given, SHARED, SHARED), given)


def test_the_given_tensors_stay_as_they_are():
    given = tensors(SHARED)
    before = {name: value.clone() for name, value in given.items()}
    adapted(given, SHARED, replace(SHARED, position="relative-per-block", image_px=24, final_norm=False))
    assert list(given) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in given.items())


def test_learned_positions_are_resampled_and_nothing_else_is_touched():
    given = tensors(BASE)
    found = adapted(given, BASE, replace(BASE, image_px=(24, 32)))
    assert same(found, given, POSITION)
    assert torch.equal(found[POSITION], resize.absolute(given[POSITION], (4, 3), (6, 8), 1))


def test_both_class_tokens_of_deit_keep_their_positions():
    source = replace(BASE, **PICTURES, distill_token=True)
    given = tensors(source)
    found = adapted(given, source, replace(source, image_px=24))[POSITION]
    assert torch.equal(found, resize.absolute(given[POSITION], (4, 3), (6, 6), 2))
    assert torch.equal(found[:2], given[POSITION][:2])


@pytest.mark.parametrize(("source", "names"), [(SHARED, [TABLE]), (BLOCKS, TABLES)])
def test_rows_of_pictures_are_resampled_in_every_table_and_those_of_texts_kept(source, names):
    given = tensors(source)
    found = adapted(given, source, replace(source, image_px=(24, 32)))
    before, after = picture_rows((4, 3)), picture_rows((6, 8))
    assert same(found, given, *names)
    for name in names:
        assert torch.equal(found[name][:after], resize.relative(given[name][:before], (4, 3), (6, 8)))
        assert torch.equal(found[name][after:], given[name][before:])


def test_a_shared_table_goes_into_every_block_as_a_tensor_of_its_own():
    given = tensors(SHARED)
    found = adapted(given, SHARED, BLOCKS)
    assert same(found, given, TABLE, *TABLES)
    assert all(torch.equal(found[name], given[TABLE]) for name in TABLES)
    assert len({found[name].data_ptr() for name in TABLES} | {given[TABLE].data_ptr()}) == 3


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"final_norm": False}, {"model.norm.vision.weight", "model.norm.vision.bias"}),
        ({"mask_token": False}, {"model.vision_embed.mask_token"}),
    ],
)
def test_what_the_other_model_has_not_is_left_out_and_nothing_more(change, gone):
    source = replace(BASE, attention="decoupled")
    given = tensors(source)
    found = adapted(given, source, replace(source, **change))
    gone |= {name.replace("vision", "language") for name in gone if "norm" in name}
    assert set(given) - set(found) == gone
    assert same(found, given, *gone)


def test_a_third_token_type_is_the_copy_of_the_second():
    source = replace(BASE, token_types=2)
    given = tensors(source)
    found = adapted(given, source, replace(source, token_types=3))
    assert same(found, given, TYPES)
    assert torch.equal(found[TYPES], given[TYPES][[0, 1, 1]])


@pytest.mark.parametrize("grown", [False, True])
def test_heads_pass_whatever_their_names(grown):
    heads = {
        f"heads.{name}": torch.randn(3, 2)
        for name in ("relative.table", "norm.weight", "x.mask_token", "vision_embed.position")
    }
    target = replace(BLOCKS, image_px=24, final_norm=False, mask_token=False)
    found = adapted(tensors(SHARED) | heads, SHARED, target, grown=grown)
    assert all(found[name] is value for name, value in heads.items())


def bottleneck(config):
    """Weights of extra blocks, as of BEiT v2."""
    return weights(Aggregation(config, 1, 2), "heads.aggregation.", config)


EXTRA = [f"heads.aggregation.blocks.{n}.relative.table" for n in (1, 2)]


@pytest.mark.parametrize(
    ("source", "change"),
    [
        (SHARED, {"position": "relative-per-block"}),
        (SHARED, {"position": "relative-per-block", "image_px": 24}),
        (BLOCKS, {"image_px": 24}),
        (BASE, {"image_px": 24}),
    ],
)
def test_extra_blocks_change_their_positions_like_the_others(source, change):
    target = replace(source, **change)
    found = adapted(tensors(source) | bottleneck(source), source, target)
    wanted = bottleneck(target)
    assert {n: v.shape for n, v in found.items() if n in wanted} == {n: v.shape for n, v in wanted.items()}
    assert len(found) == len(tensors(target)) + len(wanted)


def test_a_shared_table_goes_into_extra_blocks_as_well():
    given = tensors(SHARED)
    found = adapted(given | bottleneck(SHARED), SHARED, BLOCKS)
    assert all(torch.equal(found[name], given[TABLE]) for name in EXTRA)


def test_tensors_that_no_setting_speaks_of_pass():
    strange = {"model.strange": torch.zeros(2)}
    assert adapted(tensors(BASE) | strange, BASE, replace(BASE, image_px=24))["model.strange"] is not None


REFUSED = {
    "layers": (BASE, {"layers": 3}, "layers: 2 to 3"),
    "width": (BASE, {"width": 16}, "width: 8 to 16"),
    "heads": (BASE, {"heads": 4}, "heads: 2 to 4"),
    "ffn": (BASE, {"ffn": 8}, "ffn: 16 to 8"),
    "patch": (BASE, {"patch_px": 2}, "patch_px: 4 to 2"),
    "channels": (BASE, {"channels": 1}, "channels: 3 to 1"),
    "attention": (BASE, {"attention": "decoupled"}, "attention: 'shared' to 'decoupled'"),
    "norm": (BASE, {"norm": "sub"}, "norm: 'pre' to 'sub'"),
    "epsilon": (BASE, {"norm_eps": 1e-6}, "norm_eps: 1e-05 to 1e-06"),
    "key bias": (BASE, {"key_bias": True}, "key_bias: False to True"),
    "second class token": (BASE, {"distill_token": True}, "distill_token: False to True"),
    "relative": (BASE, {"position": "relative-shared"}, "position: 'absolute' to 'relative-shared'"),
    "absolute": (BLOCKS, {"position": "absolute"}, "position: 'relative-per-block' to 'absolute'"),
    "shared": (
        BLOCKS,
        {"position": "relative-shared"},
        "position: 'relative-per-block' to 'relative-shared'",
    ),
    "vocabulary": (BASE, {"vocabulary": 60}, "vocabulary: 52 to 60"),
    "no language": (BASE, PICTURES, "vocabulary: 52 to 0; text_tokens: 10 to 0"),
    "longer texts": (BLOCKS, {"text_tokens": 12}, "text_tokens: 10 to 12"),
    "norm of texts": (BASE, {"text_norm": True}, "text_norm: False to True"),
    "fewer types": (replace(BASE, token_types=3), {"token_types": 2}, "token_types: 3 to 2"),
    "no types": (replace(BASE, token_types=2), {"token_types": 0}, "token_types: 2 to 0"),
    "no layer scale": (replace(BASE, layer_scale=0.1), {"layer_scale": 0.0}, "layer_scale: 0.1 to 0.0"),
    "fewer experts of pairs": (PAIRS, {"fusion_layers": 0}, "fusion_layers: 1 to 0"),
}
GROWING = {
    "layer scale": (BASE, {"layer_scale": 0.1}, "layer_scale: 0.0 to 0.1"),
    "experts of pairs": (BASE, {"fusion_layers": 1}, "fusion_layers: 0 to 1"),
    "final norm": (replace(BASE, final_norm=False), {"final_norm": True}, "final_norm: False to True"),
    "mask token": (replace(BASE, mask_token=False), {"mask_token": True}, "mask_token: False to True"),
    "types": (BASE, {"token_types": 2}, "token_types: 0 to 2"),
    "language": (
        replace(BASE, **PICTURES),
        {"vocabulary": 52, "text_tokens": 10},
        "vocabulary: 0 to 52; text_tokens: 0 to 10",
    ),
}


def refusal(source, change, grown):
    with pytest.raises(UserError) as caught:
        adapted(tensors(source), source, replace(source, **change), grown=grown)
    return str(caught.value)


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_cannot_change_is_named_with_both_values_and_what_can(name, grown):
    source, change, listed = REFUSED[name]
    assert refusal(source, change, grown) == (
        f"these settings of the weights cannot be changed ({listed}); what can: image_px, drop_path, "
        "position from relative-shared to relative-per-block, final_norm and mask_token to false, "
        "token_types 2 to 3"
    )


@pytest.mark.parametrize("name", GROWING)
def test_what_would_be_new_is_refused_where_nothing_is_trained(name):
    source, change, listed = GROWING[name]
    assert f"cannot be changed ({listed});" in refusal(source, change, grown=False)


def test_all_refused_settings_are_listed_once():
    found = refusal(BASE, {"layers": 3, "fusion_layers": 1, "position": "relative-shared"}, grown=False)
    assert "(layers: 2 to 3; fusion_layers: 0 to 1; position: 'absolute' to 'relative-shared')" in found


@pytest.mark.parametrize("name", GROWING)
def test_what_is_new_is_left_to_a_training_and_all_else_kept(name):
    source, change, _ = GROWING[name]
    given, target = tensors(source), replace(source, **change)
    found = adapted(given, source, target, grown=True)
    assert same(found, given)
    assert set(found) < set(shapes(target))


def test_vlmos_text_stage_begins_with_beit():
    given = tensors(BEIT)
    found = adapted(given, BEIT, TEXT, grown=True)
    assert same(found, given, TABLE, *TABLES, "model.vision_embed.mask_token")
    new = set(shapes(TEXT)) - set(found)
    parts = ("ffn.language.", "text_embed.", "token_type.")
    assert new
    assert all(any(part in name for part in parts) for name in new)
    assert {name: value.shape for name, value in found.items()} == {
        name: shape for name, shape in shapes(TEXT).items() if name not in new
    }


def test_a_language_branch_that_is_new_has_zeros_in_the_tables():
    given = tensors(BEIT)
    found = adapted(given, BEIT, TEXT, grown=True)
    for name in TABLES:
        assert torch.equal(found[name][:38], given[TABLE])
        assert found[name][38:].shape == (table_rows(TEXT) - 38, 2)
        assert not found[name][38:].any()


def test_a_language_branch_may_come_with_another_size_of_pictures():
    given = tensors(BEIT)
    found = adapted(given, BEIT, replace(TEXT, image_px=24), grown=True)[TABLES[0]]
    assert torch.equal(found[: picture_rows((6, 6))], resize.relative(given[TABLE], (4, 3), (6, 6)))
    assert not found[picture_rows((6, 6)) :].any()


def test_vlmos_pair_stage_begins_with_the_text_stage_and_new_experts():
    given = tensors(TEXT)
    found = adapted(given, TEXT, PAIRS, grown=True)
    assert same(found, given)
    assert {name.partition(".fusion.")[0] for name in set(shapes(PAIRS)) - set(found)} == {
        "model.blocks.1.ffn"
    }


def test_experts_of_pairs_that_are_there_are_kept_when_others_join_below():
    given = tensors(PAIRS)
    found = adapted(given, PAIRS, replace(PAIRS, fusion_layers=2), grown=True)
    assert same(found, given)
    new = set(shapes(replace(PAIRS, fusion_layers=2))) - set(found)
    assert {name.partition(".fusion.")[0] for name in new} == {"model.blocks.0.ffn"}


@pytest.mark.parametrize(
    ("config", "name", "rows"),
    [(SHARED, TABLE, 60), (BLOCKS, TABLES[1], 60), (BASE, POSITION, 13)],
)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_table_of_other_rows_than_its_settings_say_is_damage(config, name, rows, change):
    given = tensors(config)
    given[name] = torch.zeros(rows + change, given[name].shape[1])
    with pytest.raises(DataError, match=rf"{name} is \({rows + change}, \d\), .* need {rows} rows: the file"):
        adapted(given, config, config)


def test_a_shared_table_that_is_missing_is_told_by_what_loads_it(tmp_path):
    given = tensors(SHARED)
    del given[TABLE]
    save_model(tmp_path, given, SHARED)
    with pytest.raises(DataError, match=r"missing model.relative.table"):
        load_model(tmp_path, position="relative-per-block")


@pytest.mark.parametrize("name", ALLOWED)
def test_a_changed_model_runs(name):
    source, change = ALLOWED[name]
    target = replace(source, **change)
    model = Multiway(target)
    fit(adapted(tensors(source), source, target), model, "model.", Path("file"))
    assert torch.isfinite(model(torch.randn(1, 3, *target.size), torch.zeros(1, 4, dtype=torch.int64))).all()
