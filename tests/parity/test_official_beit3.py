"""The decoupled form equals the official BEiT-3 (torchscale 4d1e0e8) on small random weights.

Reference: inputs and outputs of the official code in shared/reference/beit3. Tolerance 2e-5 absolute in fp32:
the sums run in another order.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from beitctl.config import ModelConfig
from beitctl.model.multiway import Multiway

FOLDER = Path(__file__).parents[3] / "shared" / "reference" / "beit3"
TOLERANCE = 2e-5
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the reference outputs are not beside this checkout"
)

BRANCH = {"A": "vision", "B": "language"}
RULES = (
    (r"^text_embed\.weight$", "text_embed.token.weight"),
    (r"^vision_embed\.(cls|mask)_token$", r"vision_embed.\1_token"),
    (
        r"^encoder\.layers\.(\d+)\.self_attn\.inner_attn_ln\.(.)\.(.*)$",
        r"blocks.\1.attention.{\2}.inner_norm.\3",
    ),
    (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.(.)\.(.*)$", r"blocks.\1.attention.{\2}.out.\3"),
    (r"^encoder\.layers\.(\d+)\.self_attn_layer_norm\.(.)\.(.*)$", r"blocks.\1.attention.{\2}.norm.\3"),
    (r"^encoder\.layers\.(\d+)\.final_layer_norm\.(.)\.(.*)$", r"blocks.\1.ffn.{\2}.norm.\3"),
    (r"^encoder\.layers\.(\d+)\.ffn\.(.)\.ffn_layernorm\.(.*)$", r"blocks.\1.ffn.{\2}.inner_norm.\3"),
    (r"^encoder\.layers\.(\d+)\.ffn\.(.)\.(fc[12]\..*)$", r"blocks.\1.ffn.{\2}.\3"),
    (r"^encoder\.layer_norm\.(.)\.(.*)$", r"norm.{\1}.\2"),
)


def translated(official, config):
    """Official tensors under our names."""
    found = {}
    state = {k.removeprefix("beit3."): v for k, v in official.items() if k.startswith("beit3.")}
    found["vision_embed.proj.weight"] = state["vision_embed.proj.weight"].flatten(1)
    found["vision_embed.proj.bias"] = state["vision_embed.proj.bias"]
    found["vision_embed.position"] = state["encoder.embed_positions.A.weight"][2:]  # fairseq's offset
    found["text_embed.position.weight"] = state["encoder.embed_positions.B.weight"][
        2 : 2 + config.text_tokens
    ]
    for layer in range(config.layers):
        for letter, branch in BRANCH.items():
            for kind in ("weight", "bias"):
                parts = [state[f"encoder.layers.{layer}.self_attn.{x}_proj.{letter}.{kind}"] for x in "qkv"]
                found[f"blocks.{layer}.attention.{branch}.qkv.{kind}"] = torch.cat(parts)
    for name, value in state.items():
        for pattern, target in RULES:
            if re.match(pattern, name):
                found[re.sub(pattern, target, name).format(**BRANCH)] = value.squeeze()
    return found


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        layers=2, width=48, heads=4, ffn=192, image_px=48, patch_px=16, vocabulary=320, text_tokens=64,
        attention="decoupled",
    )  # fmt: skip
    found = Multiway(config)
    file = torch.load(FOLDER / "beit3_retrieval.pth", map_location="cpu", weights_only=True)
    found.load_state_dict(translated(file["model"], config))
    return found.eval()


@pytest.fixture(scope="module")
def data():
    inputs = {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "inputs.npz").items()}
    return inputs, {k: torch.from_numpy(v) for k, v in np.load(FOLDER / "outputs.npz").items()}


def test_pictures_equal(model, data):
    inputs, outputs = data
    assert (model(inputs["images"]) - outputs["trunk.vision"]).abs().max() < TOLERANCE


def test_masked_pictures_equal(model, data):
    inputs, outputs = data
    found = model(inputs["images"], image_mask=inputs["vision_masked"].bool())
    assert (found - outputs["trunk.vision_masked"]).abs().max() < TOLERANCE


def test_texts_equal(model, data):
    inputs, outputs = data
    pad = inputs["padding"].bool()
    found = model(text=inputs["ids"], text_pad=pad)
    assert (found - outputs["trunk.text"])[~pad].abs().max() < TOLERANCE


def test_pairs_equal(model, data):
    inputs, outputs = data
    pad = inputs["padding"].bool()
    found = model(inputs["images"], inputs["ids"], text_pad=pad)
    real = torch.cat([torch.ones(3, 10, dtype=torch.bool), ~pad], 1)
    assert (found - outputs["trunk.pair"])[real].abs().max() < TOLERANCE


def test_gradients_of_pairs_equal(model, data):
    inputs, outputs = data
    pad = inputs["padding"].bool()
    model.zero_grad()
    found = model(inputs["images"], inputs["ids"], text_pad=pad)
    real = torch.cat([torch.ones(3, 10, dtype=torch.bool), ~pad], 1)
    (found[real].square().sum() / real.sum()).backward()
    norm = outputs["grad.beit3.encoder.layers.0.ffn.A.fc1.weight"]
    assert model.blocks[0].ffn["vision"].fc1.weight.grad.norm() == pytest.approx(float(norm), rel=1e-4)
    norm = outputs["grad.beit3.text_embed.weight"]
    assert model.text_embed.token.weight.grad.norm() == pytest.approx(float(norm), rel=1e-4)
