"""Names, shapes and parameter counts of the 15 registered BEiT-3 models, on the meta device.

Reference: every key and shape of the models of unilm 768a3c8 (shared/reference/official_keys), and the
counts in model-spec 1.4.4 and 6.5. Nothing is rounded: all is compared for equality.
"""

import math
from ast import literal_eval
from pathlib import Path

import pytest
import torch

from beitctl.checkpoints import mapping
from beitctl.checkpoints.models import model_with
from beitctl.checkpoints.unilm_beit3 import UnilmBeit3
from beitctl.config import ModelConfig
from beitctl.model.multiway import Multiway

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "official_keys"
FORM = UnilmBeit3()
HEADS = {"base": 12, "large": 16}
MODELS = {
    "base_patch16_224_imageclassification": (491, 221_754_856),
    "large_patch16_224_imageclassification": (971, 673_725_416),
    "base_patch16_224_nlvr2": (499, 225_719_810),
    "large_patch16_224_nlvr2": (979, 681_109_506),
    "base_patch16_384_vqav2": (497, 227_861_817),
    "large_patch16_384_vqav2": (977, 682_653_753),
    "base_patch16_480_vqav2": (497, 228_110_649),
    "large_patch16_480_vqav2": (977, 682_985_529),
    "large_patch16_768_vqav2": (977, 684_423_225),
    "base_patch16_224_captioning": (493, 270_211_082),
    "base_patch16_480_captioning": (493, 270_751_754),
    "large_patch16_480_captioning": (973, 739_033_610),
    "base_patch16_224_retrieval": (494, 222_167_041),
    "base_patch16_384_retrieval": (494, 222_458_881),
    "large_patch16_384_retrieval": (974, 675_188_737),
}
"""Entries of the state dict and parameters."""
WITHOUT_FILE = {
    "base body": ("base", {}, 220_987_392),
    "large body": ("large", {}, 672_702_464),
    "large retrieval": (
        "large", {"contrastive.vision.weight": (1024, 1024)}, 674_799_617,
    ),
    "base pretraining": (
        "base", {"text_tokens.weight": (64010, 768), "image_codes.weight": (8192, 768)}, 276_510_730,
    ),
    "large pretraining": (
        "large", {"text_tokens.weight": (64010, 1024), "image_codes.weight": (8192, 1024)}, 746_709_514,
    ),
}  # fmt: skip
"""Size, the heads by the shapes that say them, and parameters, all at 224 px."""
SIZES = {
    "base": {"layers": 12, "width": 768, "heads": 12, "ffn": 3072},
    "large": {"layers": 24, "width": 1024, "heads": 16, "ffn": 4096},
}


pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


def official(name):
    """The state dict of a registered model, without its numbers."""
    lines = (FOLDER / f"beit3_{name}.tsv").read_text().splitlines()
    keys = dict(line.split("\t") for line in lines)
    return {key: torch.empty(literal_eval(shape), device="meta") for key, shape in keys.items()}


def shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def count(tensors):
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


@pytest.fixture(scope="module")
def translated(name):
    """The official state dict, its settings, its table, our tensors and those unread."""
    state = official(name)
    config = FORM.config(state, {}, {"heads": HEADS[name.split("_")[0]]})
    table = FORM.table(config, shapes(state))
    assert mapping.problems(table, state) == []
    return state, config, *mapping.read(table, state)


def test_there_are_the_fifteen_registered_models():
    assert {file.stem for file in FOLDER.glob("beit3_*.tsv")} == {f"beit3_{one}" for one in MODELS}


def test_entries_and_parameters_are_those_of_the_registered_model(name):
    state = official(name)
    assert (len(state), count(state)) == MODELS[name]


def test_settings_are_those_of_the_registered_model(name, translated):
    size, _, px, task = name.split("_")
    assert translated[1] == ModelConfig(
        **SIZES[size], image_px=int(px), patch_px=16, vocabulary=64010, text_tokens=1022,
        attention="decoupled", norm="sub", init="released",
        final_norm=task not in ("imageclassification", "vqav2"),
    )  # fmt: skip


def test_our_model_has_the_translated_names_and_shapes(translated):
    _, config, tensors, _ = translated
    heads = {
        name.removeprefix("heads."): s for name, s in shapes(tensors).items() if name.startswith("heads.")
    }
    with torch.device("meta"):
        model = model_with(config, heads)
    assert shapes(model.state_dict()) == shapes(tensors)


def test_our_parameters_and_the_unread_rows_make_up_the_count(name, translated):
    _, config, tensors, unread = translated
    assert count(unread) == 4 * config.width
    assert count(tensors) + count(unread) == MODELS[name][1]


def test_ours_is_written_under_the_official_names_and_shapes(translated):
    state, config, tensors, unread = translated
    written = mapping.write(FORM.table(config, shapes(tensors)), tensors, unread)
    assert shapes(written) == shapes(state)


def test_a_final_norm_beside_a_head_that_reads_before_it_is_kept_unread(name, translated):
    state, config, *_ = translated
    names = [f"beit3.encoder.layer_norm.{x}.{part}" for x in "AB" for part in ("weight", "bias")]
    whole = state | {one: torch.empty(config.width, device="meta") for one in names}
    found = FORM.config(whole, {}, {"heads": config.heads})
    assert found == config
    table = FORM.table(found, shapes(whole))
    assert mapping.problems(table, whole) == []
    _, unread = mapping.read(table, whole)
    assert set(unread).isdisjoint(names) == config.final_norm
    assert set(unread) - {f"beit3.encoder.embed_positions.{x}.weight" for x in "AB"} <= set(names)


@pytest.mark.parametrize("model", WITHOUT_FILE)
def test_parameters_of_models_without_a_list_of_keys_follow_from_the_settings(model):
    size, heads, parameters = WITHOUT_FILE[model]
    config = ModelConfig(
        **SIZES[size], vocabulary=64010, text_tokens=1022, attention="decoupled", init="released"
    )
    with torch.device("meta"):
        built = model_with(config, {name: torch.Size(shape) for name, shape in heads.items()})
        ours = (
            built.state_dict()
            if built
            else {f"model.{k}": v for k, v in Multiway(config).state_dict().items()}
        )
    written = mapping.write(FORM.table(config, shapes(ours)), ours, {})
    assert count(written) == parameters
    assert mapping.problems(FORM.table(config, shapes(written)), written) == []
    assert FORM.config(written, {}, {"heads": config.heads}) == config
