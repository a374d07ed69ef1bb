"""Names, shapes and parameter counts of the three released VQ-KD tokenizers, without weights.

Reference: every key and shape of the models of microsoft/unilm 768a3c8, in shared/reference/official_keys;
counts: shared/design/model-spec.md 3.2 and 6.4.
"""

import ast
from pathlib import Path

import pytest
import torch

from beitctl.checkpoints import mapping
from beitctl.checkpoints.unilm_vqkd import read_vqkd, vqkd_table
from beitctl_plugins.tokenizers.vqkd import Shape

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "official_keys"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the official names are not beside this checkout")
PREFIX = "vqkd_encoder_base_decoder_"
MODELS = {  # name: entries, all parameters, trainable ones, the decoder's, decoder layers, width of features
    "1x768x12_clip": (194, 95_187_488, 94_655_008, 7_266_048, 1, 512),
    "3x768x12_clip": (220, 109_361_696, 108_829_216, 21_440_256, 3, 512),
    "1x768x12_dino": (194, 95_384_352, 94_851_872, 7_266_048, 1, 768),
}
ENCODER = 85_789_440
BUFFERS = ("quantize.cluster_size", "quantize.embedding.initted")


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def state(name):
    lines = (FOLDER / f"{PREFIX}{name}.tsv").read_text().splitlines()
    keys = dict(line.split("\t") for line in lines)
    return {key: torch.empty(ast.literal_eval(shape), device="meta") for key, shape in keys.items()}


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def built(sizes):
    with torch.device("meta"):
        return sizes.model()


def test_there_are_the_three_released_tokenizers():
    assert {file.stem for file in FOLDER.glob("vqkd_*.tsv")} == {PREFIX + one for one in MODELS}


def test_entries_and_parameters_are_those_of_the_released_tokenizer(name, state):
    parameters = sum(value.numel() for key, value in state.items() if key not in BUFFERS)
    assert (len(state), parameters) == MODELS[name][:2]


def test_sizes_are_those_of_the_released_tokenizer(name, state):
    sizes, _, _ = read_vqkd(state)
    assert sizes.encoder == Shape().encoder()
    assert (sizes.codes, sizes.code_width) == (8192, 32)
    assert (sizes.decoder_layers, sizes.features) == MODELS[name][4:]


def test_our_model_has_the_translated_names_and_shapes(state):
    sizes, tensors, _ = read_vqkd(state)
    assert shapes(built(sizes).state_dict()) == shapes(tensors)


def test_our_parameters_are_the_trainable_ones(name, state):
    model = built(read_vqkd(state)[0])
    assert (count(model), count(model.encoder), count(model.decoder)) == (
        MODELS[name][2],
        ENCODER,
        MODELS[name][3],
    )


def test_ours_is_written_under_the_official_names_and_shapes(state):
    sizes, tensors, unread = read_vqkd(state)
    assert shapes(mapping.write(vqkd_table(sizes), tensors, unread)) == shapes(state)
