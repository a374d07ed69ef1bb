"""DALL-E's encoder and decoder: files of the official layout, made at random, against plain torch functions.

The functions are written from model-spec 3.1, and use nothing of beitctl. The official package dall_e 0.1 was
compared with by hand on such files: the largest difference of logits and of the decoder's output was 0.
"""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from beitctl.checkpoints.native import load_tokenizer

WIDTH, CODES, FIRST = 16, 40, 8
"""In place of 256, 8192 and 128."""
ENCODER = ([1, 2, 4, 8], (3, 3, 3, 1))
DECODER = ([8, 4, 2, 1], (1, 3, 3, 3))
"""Widths of the groups in units of WIDTH, and sides of the convolutions of a block."""


def layout(groups, kernels, begin, end):
    """Names and shapes (out, in, side) of the convolutions; begin and end are those of the first and last."""
    found = {"blocks.input": begin}
    width = begin[0]
    for number, times in enumerate(groups, 1):
        out = times * WIDTH
        for block in (1, 2):
            name = f"blocks.group_{number}.block_{block}"
            if width != out:
                found[f"{name}.id_path"] = (out, width, 1)
            sizes = [(out // 4, width), (out // 4, out // 4), (out // 4, out // 4), (out, out // 4)]
            for place, (size, side) in enumerate(zip(sizes, kernels, strict=True), 1):
                found[f"{name}.res_path.conv_{place}"] = (*size, side)
            width = out
    return found | {"blocks.output.conv": (end, width, 1)}


def drawn(convolutions, seed):
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, (out, fan_in, side) in convolutions.items():
        scale = (2 / (fan_in * side * side)) ** 0.5
        found[f"{name}.w"] = scale * torch.randn(out, fan_in, side, side, generator=draw)
        found[f"{name}.b"] = 0.1 * torch.randn(out, generator=draw)
    return found


def conv(state, x, name):
    weight = state[f"{name}.w"]
    return F.conv2d(x, weight, state[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)


def body(state, x, resize):
    """Groups of blocks with a change of size after the first three."""
    x = conv(state, x, "blocks.input")
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name = f"blocks.group_{group}.block_{block}"
            inner = x
            for place in (1, 2, 3, 4):
                inner = conv(state, F.relu(inner), f"{name}.res_path.conv_{place}")
            outer = conv(state, x, f"{name}.id_path") if f"{name}.id_path.w" in state else x
            x = outer + inner / 64
        x = resize(x) if group < 4 else x
    return conv(state, F.relu(x), "blocks.output.conv")


def encoded(state, x):
    """Logits (B, K, h, w) of pictures in 0..1."""
    return body(state, 0.8 * x + 0.1, lambda y: F.max_pool2d(y, 2))


def decoded(state, codes):
    """Pictures in 0..1 of codes (B, h, w)."""
    one = torch.stack([(codes == code).float() for code in range(CODES)], 1)
    out = body(state, one, lambda y: y.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return ((torch.sigmoid(out[:, :3]) - 0.1) / 0.8).clamp(0, 1)


@pytest.fixture(scope="module")
def encoder():
    return drawn(layout(*ENCODER, (WIDTH, 3, 7), CODES), 0)


@pytest.fixture(scope="module")
def decoder():
    return drawn(layout(*DECODER, (FIRST, CODES, 1), 6), 1)


@pytest.fixture(scope="module")
def views():
    draw = torch.Generator().manual_seed(2)
    coarse = torch.randint(0, 256, (2, 3, 14, 14), generator=draw).float()
    return F.interpolate(coarse, size=(112, 112), mode="bicubic").clamp(0, 255).to(torch.uint8)


def written(folder, state, name):
    file = folder / name
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    return file


def test_the_codes_of_a_112_px_view_are_those_of_the_plain_functions(tmp_path, encoder, views):
    found = load_tokenizer(written(tmp_path, encoder, "encoder.pkl"))
    logits = encoded(encoder, views.float() / 255)
    codes = found.encode(views)
    assert (codes.shape, found.grid, found.codes) == ((2, 196), 14, CODES)
    assert torch.equal(codes, logits.argmax(1).flatten(1))
    assert len(codes.unique()) > 5


def test_the_logits_are_those_of_the_plain_functions(tmp_path, encoder, views):
    found = load_tokenizer(written(tmp_path, encoder, "encoder.safetensors"))
    logits = encoded(encoder, views.float() / 255)
    ours = found.model(0.8 * views.float() / 255 + 0.1)
    assert float((ours - logits).abs().max()) < 2e-5
    best = found.closest(views)[1]
    assert torch.allclose(best, logits.log_softmax(1).max(1).values.flatten(1), atol=2e-5)


@pytest.mark.parametrize("end", ["pkl", "safetensors"])
def test_codes_are_drawn_by_the_decoder_beside_the_encoder(tmp_path, encoder, decoder, end):
    written(tmp_path, decoder, f"decoder.{end}")
    found = load_tokenizer(written(tmp_path, encoder, f"encoder.{end}"))
    codes = torch.arange(2 * 16).remainder(CODES).view(2, 16)
    expected = (255 * decoded(decoder, codes.view(2, 4, 4))).round()
    ours = found.reconstruct(codes)
    assert (ours.shape, ours.dtype) == ((2, 3, 32, 32), torch.uint8)
    assert float((ours.float() - expected).abs().max()) <= 1  # at a half, rounding may go either way
    assert float((ours.float() - expected).abs().mean()) < 1e-3
    assert float(expected.std()) > 10
