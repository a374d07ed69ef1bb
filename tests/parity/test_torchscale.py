"""The decoupled Multiway Transformer equals torchscale's BEiT-3 (0.3.0) at sizes that no file has.

Reference: torchscale.model.BEiT3.BEiT3 with random weights, drop path 0, in eval mode. Tolerance 2e-5
absolute in fp32: the sums run in another order.
"""

import pytest
import torch

from beitctl.checkpoints import mapping
from beitctl.checkpoints.unilm_beit3 import UnilmBeit3
from beitctl.model.multiway import Multiway

pytest.importorskip("torchscale", reason="torchscale 0.3.0 is not installed")

TOLERANCE = 2e-5
SIZES = {
    "deep": {
        "encoder_layers": 3, "encoder_embed_dim": 40, "encoder_attention_heads": 10,
        "encoder_ffn_embed_dim": 56, "img_size": 24, "patch_size": 8, "vocab_size": 30,
        "max_source_positions": 16,
    },
    "wide": {
        "encoder_layers": 2, "encoder_embed_dim": 96, "encoder_attention_heads": 2,
        "encoder_ffn_embed_dim": 400, "img_size": 50, "patch_size": 10, "vocab_size": 70,
        "max_source_positions": 64,
    },
}  # fmt: skip
BATCH = 3
LENGTHS = {"padded": (7, 2, 5), "one token each": (1, 1, 1), "one token beside others": (1, 4, 6)}
FORM = UnilmBeit3()


def official(size):
    """torchscale's model with no weight at its start: gains, biases and both tokens differ from 1 and 0."""
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    torch.manual_seed(len(size))
    model = BEiT3(EncoderConfig(multiway=True, no_output_layer=True, drop_path_rate=0.0, **SIZES[size]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def ours(state, heads):
    """Our model with torchscale's weights; its names lie under ``beit3.`` in unilm's models and files."""
    state = {f"beit3.{name}": value for name, value in state.items()}
    config = FORM.config(state, {}, {"heads": heads})
    table = FORM.table(config, {name: value.shape for name, value in state.items()})
    assert mapping.problems(table, state) == []
    tensors, _ = mapping.read(table, state)
    model = Multiway(config)
    model.load_state_dict({name.removeprefix("model."): value for name, value in tensors.items()})
    return model.eval()


@pytest.fixture(scope="module", params=SIZES)
def both(request):
    theirs = official(request.param)
    return theirs, ours(theirs.state_dict(), SIZES[request.param]["encoder_attention_heads"])


@pytest.fixture
def images(both):
    px = both[1].config.image_px
    return torch.randn(BATCH, 3, px, px, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=LENGTHS)
def texts(both, request):
    """Ids (B, S), and True where they are padding."""
    lengths = torch.tensor(LENGTHS[request.param])
    pad = torch.arange(int(lengths.max())) >= lengths[:, None]
    draw = torch.Generator().manual_seed(2)
    return torch.randint(4, both[1].config.vocabulary, pad.shape, generator=draw), pad


def run(model, **inputs):
    return model(**inputs)["encoder_out"]


def real(model, pad):
    """(B, P + S) whether a row of a pair is a token."""
    return torch.cat([torch.ones(len(pad), model.config.picture_tokens, dtype=torch.bool), ~pad], 1)


@torch.no_grad()
def test_pictures_equal(both, images):
    theirs, model = both
    assert (model(images) - run(theirs, visual_tokens=images)).abs().max() < TOLERANCE


@torch.no_grad()
def test_masked_pictures_equal(both, images):
    theirs, model = both
    mask = torch.rand(BATCH, model.config.patches, generator=torch.Generator().manual_seed(3)) < 0.4
    expected = run(theirs, visual_tokens=images, vision_masked_position=mask)
    assert (model(images, image_mask=mask) - expected).abs().max() < TOLERANCE
    assert (model(images) - expected).abs().max() > 0.01


@torch.no_grad()
def test_texts_equal(both, texts):
    theirs, model = both
    ids, pad = texts
    expected = run(theirs, textual_tokens=ids, text_padding_position=pad)
    assert (model(text=ids, text_pad=pad) - expected)[~pad].abs().max() < TOLERANCE


@torch.no_grad()
def test_pairs_equal(both, images, texts):
    theirs, model = both
    ids, pad = texts
    expected = run(theirs, textual_tokens=ids, visual_tokens=images, text_padding_position=pad)
    found = model(images, ids, text_pad=pad)
    assert (found - expected)[real(model, pad)].abs().max() < TOLERANCE


@torch.no_grad()
def test_captions_that_see_no_later_words_equal(both, images, texts):
    theirs, model = both
    ids, pad = texts
    at, picture = torch.arange(model.config.picture_tokens + ids.shape[1]), model.config.picture_tokens
    seen = (at[None] < picture) | ((at[:, None] >= picture) & (at[None] <= at[:, None]))
    expected = run(
        theirs, textual_tokens=ids, visual_tokens=images, text_padding_position=pad, attn_mask=(~seen).long()
    )
    packed, tokens = model.pack(images, ids, text_pad=pad, causal_text=True)
    found = model.unpack(model.encode(packed), packed, tokens)
    assert (found - expected)[real(model, pad)].abs().max() < TOLERANCE


def changed(model, branch):
    """The weights with every number of one branch changed: A sees pictures, B texts."""
    whole = {"A": "vision_embed.", "B": "text_embed."}[branch]
    return {
        name: value + 1 if f".{branch}." in name or name.startswith(whole) else value
        for name, value in model.state_dict().items()
    }


@torch.no_grad()
def test_pictures_alone_do_not_read_the_language_branch(both, images):
    theirs, model = both
    other = ours(changed(theirs, "B"), model.config.heads)
    assert torch.equal(other(images), model(images))


@torch.no_grad()
def test_texts_alone_do_not_read_the_vision_branch(both, texts):
    theirs, model = both
    ids, pad = texts
    other = ours(changed(theirs, "A"), model.config.heads)
    assert torch.equal(other(text=ids, text_pad=pad), model(text=ids, text_pad=pad))


@torch.no_grad()
def test_pictures_and_texts_read_their_own_branch(both, images, texts):
    theirs, model = both
    ids, pad = texts
    other = ours(changed(theirs, "A"), model.config.heads)
    assert not torch.allclose(other(images), model(images), atol=0.01)
    other = ours(changed(theirs, "B"), model.config.heads)
    assert not torch.allclose(other(text=ids, text_pad=pad), model(text=ids, text_pad=pad), atol=0.01)
